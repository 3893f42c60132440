// What is decided once per row or call, alike on CPU and GPU: whether a row counts and where its
// label is, and which kind of kernel the exponents need.
#pragma once

#include "row_math.h"

namespace caref {

// The label of a row, or how it counts.
struct Target {
  bool counts;
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

// The SCED exponents for which the forward takes one pass; elsewhere the expansion of (1-p)^B and
// (y-c)^A into powers cancels more digits than float32 elements carry.
template <int A, int B>
struct EvenExponents {
  static constexpr bool kOnePass = true;
  static constexpr bool kSced = true;
  using Sums = Moments<A, B>;
  static constexpr int kMoments = Sums::kCount;
  // Constants, so that the compiler leaves real powers out.
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

// A kind whose SCED is over the top k alone.
template <typename Kind>
struct Masked : Kind {};
template <typename Kind>
constexpr bool kIsMasked = false;
template <typename Kind>
constexpr bool kIsMasked<Masked<Kind>> = true;

// The sums of a row, or of a part of it, relative to its maximum; the arg-max column is left out.
template <typename Kind>
struct PartialSums {
  double residual = 0.0;      // sum e^y; NaN poisons the row
  double first_moment = 0.0;  // sum e^y y

  // The maximum rises by -delta: everything is seen from the new one, and the old maximum, which
  // was left out, joins.
  CAREF_HD void raise(double delta) {
    if (delta > -700.0) {
      const double scale = exp(delta);
      first_moment = scale * (first_moment + delta * residual + delta);
      residual = scale * (residual + 1.0);
    } else {  // nothing is left of it: no product of 0 with a huge power of delta
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

// Calls visitor(kind) with the kind of kernel that the exponents of `params` need.
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
