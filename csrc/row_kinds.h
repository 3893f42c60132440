// Decisions that are made once per row or per call, for the CPU and the GPU alike: whether a row is
// valid, where its label is, and which kind of kernel the exponents need.
#pragma once

#include "row_math.h"

namespace caref {

// Whether a row is valid (not left out by ignore_index or by a valid mask), and its label.
struct Target {
  bool is_valid;
  bool has_label;
  int64_t label;
};

CAREF_HD Target target_of(const RowParams& params, int64_t row) {
  int64_t label = 0;
  switch (params.targets_dtype) {
    case DType::kInt32:
      label = static_cast<const int32_t*>(params.targets)[row];
      break;
    case DType::kInt64:
      label = static_cast<const int64_t*>(params.targets)[row];
      break;
    case DType::kBool:
      return {static_cast<const uint8_t*>(params.targets)[row] != 0, false, 0};
    default:
      return {true, false, 0};
  }
  return {label != params.ignore_index, true, label};
}

// The SCED exponents for which the forward takes one pass over the row.  For other exponents the
// expansion of (1-p)^B and (y-c)^A into powers would cancel more digits than float32 elements have.
template <int A, int B>
struct EvenExponents {
  static constexpr bool kOnePass = true;
  static constexpr bool kSced = true;
  using Sums = Moments<A, B>;
  static constexpr int kMoments = Sums::kCount;
  // These are compile-time constants, so the compiler emits no code for fractional powers.
  static CAREF_HD Exponents exponents(const RowParams&) {
    constexpr Exponents kExponents(A, B);
    return kExponents;
  }
};
struct AnyExponents {
  static constexpr bool kOnePass = false;
  static constexpr bool kSced = true;
  static constexpr int kMoments = 0;
  static CAREF_HD Exponents exponents(const RowParams& params) {
    return Exponents(params.alpha, params.beta);
  }
};
struct NoSced {
  static constexpr bool kOnePass = false;
  static constexpr bool kSced = false;
  static constexpr int kMoments = 0;
  static CAREF_HD Exponents exponents(const RowParams&) {
    constexpr Exponents kExponents(1.0, 0.0);
    return kExponents;
  }
};

// A kind whose SCED sums only the columns of the row's top-k mask.
template <typename Kind>
struct TopKMasked : Kind {};
template <typename Kind>
constexpr bool kIsTopKMasked = false;
template <typename Kind>
constexpr bool kIsTopKMasked<TopKMasked<Kind>> = true;

// The sums of a row, or of a part of its columns, relative to the maximum of those columns.  The
// arg-max column is excluded.
template <typename Kind>
struct PartialSums {
  double residual = 0.0;      // sum e^y; a NaN here makes the whole row NaN
  double first_moment = 0.0;  // sum e^y y

  // Moves the sums to a maximum that is larger by -delta, and readmits the column of the old
  // maximum, which had been excluded.
  CAREF_HD void raise(double delta) {
    if (delta > -700.0) {
      const double scale = exp(delta);
      first_moment = scale * (first_moment + delta * residual + delta);
      residual = scale * (residual + 1.0);
    } else {  // e^delta underflows; multiplying 0 by a huge power of delta could give NaN
      residual = residual != residual ? residual : 0.0;
      first_moment = 0.0;
    }
  }
};

template <int A, int B>
struct PartialSums<EvenExponents<A, B>> : PartialSums<NoSced> {
  Moments<A, B> moments = {};

  CAREF_HD void raise(double delta) {
    PartialSums<NoSced>::raise(delta);
    if (delta > -700.0) {
      const double e = exp(delta);
      moments.shift(delta, e);
      moments.add(delta, e);
    } else {
      moments.clear();
    }
  }
};

// Calls visitor(kind) with the kind of kernel that the exponents of `params` need.  The pairs are
// those of tiling.ONE_PASS_EXPONENTS in Python; a test compares the two lists.
template <typename Visitor>
void visit_exponents(const RowParams& params, Visitor visitor) {
  if (!params.with_sced) return visitor(NoSced{});
  const double alpha = params.alpha, beta = params.beta;
  if (alpha == 2.0 && beta == 0.0) return visitor(EvenExponents<2, 0>{});
  if (alpha == 2.0 && beta == 1.0) return visitor(EvenExponents<2, 1>{});
  if (alpha == 2.0 && beta == 2.0) return visitor(EvenExponents<2, 2>{});
  if (alpha == 4.0 && beta == 0.0) return visitor(EvenExponents<4, 0>{});
  if (alpha == 4.0 && beta == 1.0) return visitor(EvenExponents<4, 1>{});
  if (alpha == 4.0 && beta == 2.0) return visitor(EvenExponents<4, 2>{});
  visitor(AnyExponents{});
}

}  // namespace caref
