// What forward.cpp and backward.cpp share: how a row is seen, and the choice of a kernel for a call.
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

inline Target target_of(const RowParams& params, int64_t row) {
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

// A block of a row as the kernels read it: whole registers, no branch on the tail.
template <typename S>
class BlockReader {
 public:
  using T = typename Storage<S>::Arithmetic;

  BlockReader(const S* row, int64_t columns) : row_(row), columns_(columns) {}

  // Makes block [start, start + kBlock) current; columns past the end read as -inf.
  void open(int64_t start) {
    start_ = start;
    const int64_t left = columns_ - start;
    size_ = left < kBlock ? left : kBlock;
    values_ = row_ + start;
    if (size_ % Lanes<T>::kCount != 0) copy();
  }

  // Makes one column of the current block read as -inf: how the arg-max stays out of every sum.
  void exclude(int64_t column) {
    if (values_ != copy_) copy();
    store_one(copy_ + (column - start_), -std::numeric_limits<double>::infinity());
  }

  int64_t registers() const { return (size_ + Lanes<T>::kCount - 1) / Lanes<T>::kCount; }
  int64_t size() const { return size_; }
  Vec<T> operator[](int64_t index) const { return load(values_ + index * Lanes<T>::kCount); }

  // The first column of the current block that holds `value`.
  int64_t find(T value) const {
    for (int64_t i = 0; i < registers(); ++i) {
      const Vec<T> x = (*this)[i];
      for (int lane = 0; lane < Lanes<T>::kCount; ++lane) {
        if (x[lane] == value) return start_ + i * Lanes<T>::kCount + lane;
      }
    }
    return start_;
  }

 private:
  void copy() {
    memcpy(copy_, values_, static_cast<size_t>(size_) * sizeof(S));
    for (int64_t i = size_; i < registers() * Lanes<T>::kCount; ++i) {
      store_one(copy_ + i, -std::numeric_limits<double>::infinity());
    }
    values_ = copy_;
  }

  const S* row_;
  int64_t columns_;
  int64_t start_ = 0;
  int64_t size_ = 0;
  const S* values_ = nullptr;
  alignas(kRegisterBytes) S copy_[kBlock];
};

}  // namespace caref::cpu::CAREF_ISA
