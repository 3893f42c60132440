// Shared by forward.cpp and backward.cpp: the dispatch on storage type and kind of kernel, and the
// reader that presents a row as blocks of registers.
#pragma once

#include <cmath>
#include <limits>

#include "../row_results.h"
#include "lanes.h"

namespace caref::cpu::CAREF_ISA {

// Calls visitor(kind) with the kind of kernel that the top-k mask and the exponents of `params`
// need.
template <typename Visitor>
void visit_kind(const RowParams& params, Visitor visitor) {
  visit_exponents(params, [&](auto kind) {
    if constexpr (decltype(kind)::kSced) {
      if (params.has_topk_mask()) return visitor(TopKMasked<decltype(kind)>{});
    }
    visitor(kind);
  });
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

// 1024 columns are a few KiB, so when a block is read a second time it is still in the first-level
// cache; and a float32 lane adds at most 256 elements (4 lanes) before its sum is added in double.
constexpr int64_t kBlock = 1024;

// A row as a sequence of blocks of whole registers.  The tail of the row is a last block of one
// register, padded with -inf.  One column of a block can be excluded: it then reads as -inf too.
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

  // Excludes one column of the current block from every sum; this is used for the arg-max.
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

  // The largest value of the current block.  A NaN is never the maximum; it makes the row NaN
  // through the sums.
  T maximum() const {
    constexpr int kChains = 4;  // independent chains hide the latency of the comparisons
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

  // The sum of x - pivot over the columns of the current block, before one of them is excluded.
  double total(T pivot) const {
    constexpr int kChains = 4;
    Vec<T> sums[kChains] = {};
    const int64_t whole = values_ == tail_ ? 0 : registers_;
    int64_t i = 0;
    for (; i + kChains <= whole; i += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) sums[chain] += (*this)[i + chain] - pivot;
    }
    for (; i < whole; ++i) sums[0] += (*this)[i] - pivot;
    double total = 0.0;
    for (const Vec<T>& sum : sums)
      for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sum[lane]);
    if (whole == 0)
      for (int64_t lane = 0; lane < end_ - start_; ++lane)
        total += static_cast<double>(load_one(tail_ + lane)) - static_cast<double>(pivot);
    return total;
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

  // Prefetches the same position of the next block while this one is summed; otherwise the search
  // for the next maximum would wait for memory.  Prefetching an address past the row has no effect.
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
