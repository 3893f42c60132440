// What forward.cpp and backward.cpp share: how a row is seen, and the choice of a kernel for a
// call.
#pragma once

#include <cmath>
#include <limits>

#include "lanes.h"

namespace caref::cpu::CAREF_ISA {

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
};
struct AnyExponents {
  static constexpr bool kOnePass = false;
  static constexpr bool kSced = true;
};
struct NoSced {
  static constexpr bool kOnePass = false;
  static constexpr bool kSced = false;
};
// A kind whose SCED is over the top k alone.
template <typename Kind>
struct Masked : Kind {};
template <typename Kind>
constexpr bool kIsMasked = false;
template <typename Kind>
constexpr bool kIsMasked<Masked<Kind>> = true;

template <typename Visitor>
void visit_sced(const RowParams& params, Visitor visitor) {
  const double alpha = params.alpha, beta = params.beta;
  if (alpha == 2.0 && beta == 0.0) return visitor(EvenExponents<2, 0>{});
  if (alpha == 2.0 && beta == 1.0) return visitor(EvenExponents<2, 1>{});
  if (alpha == 2.0 && beta == 2.0) return visitor(EvenExponents<2, 2>{});
  if (alpha == 4.0 && beta == 0.0) return visitor(EvenExponents<4, 0>{});
  if (alpha == 4.0 && beta == 1.0) return visitor(EvenExponents<4, 1>{});
  if (alpha == 4.0 && beta == 2.0) return visitor(EvenExponents<4, 2>{});
  visitor(AnyExponents{});
}

// Calls visitor(kind) with the kind of kernel that the mask and the exponents of `params` need.
template <typename Visitor>
void visit_kind(const RowParams& params, Visitor visitor) {
  if (!params.with_sced) return visitor(NoSced{});
  visit_sced(params, [&](auto kind) {
    if (params.is_masked()) return visitor(Masked<decltype(kind)>{});
    visitor(kind);
  });
}

// f' for even alpha = A and integer beta = B, where (p|L|)^(A-1) sgn(L) = (pL)^(A-1).
template <int A, int B, typename V>
CAREF_HD V even_slope(V p, V log_ratio) {
  const V t = p * log_ratio;
  const V q = 1 - p;
  V slope = A * (log_ratio + 1);
  if constexpr (B > 0) slope = slope * q - B * t;
#pragma GCC unroll 8
  for (int i = 1; i < A; ++i) slope *= t;
#pragma GCC unroll 8
  for (int i = 1; i < B; ++i) slope *= q;
  return slope;
}

// Calls visitor(storage) with a value of the type that the logits are stored in.
template <typename Visitor>
void visit_storage(DType dtype, Visitor visitor) {
  switch (dtype) {
    case DType::kFloat64:
      return visitor(double{});
    case DType::kBFloat16:
      return visitor(BFloat16{});
    case DType::kFloat16:
      return visitor(Float16{});
    default:
      return visitor(float{});
  }
}

// 1024 columns: a few KiB, so the second look at a block comes from the first-level cache, and a
// float32 lane adds at most 256 elements (4 lanes) before its sum is folded into double.
constexpr int64_t kBlock = 1024;

// A row as the kernels read it: blocks of whole registers, and the tail of the row, padded with
// -inf, as a last block of one register.  One column can be left out of a block: it then reads as
// -inf too.
template <typename S>
class BlockReader {
 public:
  using T = typename Storage<S>::Arithmetic;
  static constexpr int kLanes = Lanes<T>::kCount;
  static_assert(kBlock % (4 * kLanes) == 0, "blocks are whole registers");

  BlockReader(const S* row, int64_t columns) : row_(row), columns_(columns) { rewind(); }

  void rewind() { start_ = end_ = 0; }

  // Makes the next block current; false at the end of the row.
  bool next() {
    start_ = end_;
    if (start_ == columns_) return false;
    excluded_ = -1;
    const int64_t whole = columns_ - columns_ % kLanes;
    if (start_ < whole) {
      end_ = start_ + kBlock < whole ? start_ + kBlock : whole;
      values_ = row_ + start_;
    } else {
      end_ = columns_;
      for (int lane = 0; lane < kLanes; ++lane)
        store_one(tail_ + lane, -std::numeric_limits<double>::infinity());
      memcpy(tail_, row_ + start_, static_cast<size_t>(end_ - start_) * sizeof(S));
      values_ = tail_;
    }
    registers_ = (end_ - start_ + kLanes - 1) / kLanes;
    return true;
  }

  bool contains(int64_t column) const { return column >= start_ && column < end_; }

  // Leaves one column of the current block out: how the arg-max stays out of every sum.
  void exclude(int64_t column) {
    excluded_ = (column - start_) / kLanes;
    patched_ = (*this)[excluded_];
    patched_[(column - start_) % kLanes] = -std::numeric_limits<T>::infinity();
  }

  // body(register) for every register of the block.
  template <typename Body>
  CAREF_HD void for_each(Body body) const {
    int64_t i = 0;
    if (excluded_ >= 0) {
      for (; i < excluded_; ++i) visit(i, body);
      body(patched_);
      ++i;
    }
    for (; i < registers_; ++i) visit(i, body);
  }

  // The largest value of the current block.  NaN never wins: it reaches the result through the
  // sums.
  T maximum() const {
    constexpr int kChains = 4;  // a single chain would wait for the latency of each comparison
    Vec<T> largest[kChains];
    for (int chain = 0; chain < kChains; ++chain)
      largest[chain] = splat<T>(-std::numeric_limits<T>::infinity());
    int64_t i = 0;
    for (; i + kChains <= registers_; i += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain)
        largest[chain] = larger((*this)[i + chain], largest[chain]);
    }
    for (; i < registers_; ++i) largest[0] = larger((*this)[i], largest[0]);
    return lane_maximum<T>(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
  }

  // The first column of the current block that holds `value`, its maximum.
  int64_t find(T value) const {
    int64_t i = 0;
    while (i < registers_ - 1 && !any_equal<T>((*this)[i], value)) ++i;
    const Vec<T> x = (*this)[i];
    int lane = 0;
    while (lane < kLanes - 1 && x[lane] != value) ++lane;
    return start_ + i * kLanes + lane;
  }

  bool any_nan() const {
    bool found = false;
    for (int64_t i = 0; i < registers_; ++i) {
      const Vec<T> x = (*this)[i];
      for (int lane = 0; lane < kLanes; ++lane) found |= x[lane] != x[lane];
    }
    return found;
  }

 private:
  CAREF_HD Vec<T> operator[](int64_t index) const { return load(values_ + index * kLanes); }

  // Fetches the same place of the next block: the look for its maximum would otherwise wait for
  // memory that has been idle during the arithmetic of this one.  An address past the row is
  // harmless here.
  template <typename Body>
  CAREF_HD void visit(int64_t index, Body& body) const {
    __builtin_prefetch(reinterpret_cast<const void*>(
        reinterpret_cast<uintptr_t>(values_ + index * kLanes) + kBlock * sizeof(S)));
    body((*this)[index]);
  }

  const S* row_;
  int64_t columns_;
  int64_t start_, end_;
  int64_t registers_ = 0;
  int64_t excluded_ = -1;
  const S* values_ = nullptr;
  Vec<T> patched_;
  S tail_[kLanes];
};

}  // namespace caref::cpu::CAREF_ISA
