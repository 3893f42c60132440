// The first pass over a row, shared by the dense forward and the one with a top-k mask: the copy in
// shared memory without its arg-max column, the sums of a thread, and the result of a row. Included
// by files that are compiled once per storage type, which is the macro CAREF_STORAGE.
#pragma once

#include "splits.cuh"

namespace caref::cuda {
namespace {

using S = CAREF_STORAGE;
using T = S::Arithmetic;
using Element = S::Element;

template <typename Kind>
constexpr int kSums = 2 + Kind::kMoments;
constexpr int kScedSums = 2;  // sum f and sum p f'

// Vectors that a thread loads at a time: 64 bytes in flight per thread hide the latency of memory
// at this occupancy.
constexpr int kBatch = 4;

// e^(D-J) u^J as a product of two halves, so that the compiler shares halves among different D and
// J.
template <int D, int J>
__device__ __forceinline__ T monomial(T e, T u) {
  if constexpr (D == 1) {
    return J == 0 ? e : u;
  } else {
    constexpr int kLow = D / 2, kLowJ = J > kLow ? kLow : J;
    return monomial<kLow, kLowJ>(e, u) * monomial<D - kLow, J - kLowJ>(e, u);
  }
}

// The sums of one thread in T.  A thread sums at most 256 columns, which bounds the rounding error.
template <typename Kind>
struct ThreadSums {
  T sum[kSums<Kind>] = {};

  __device__ __forceinline__ void add(T y) {
    const T e = exponential(y);      // propagates NaN
    const T u = e * clamp_shift(y);  // the clamp does not propagate NaN
    sum[0] += e;
    sum[1] += u;
    if constexpr (Kind::kOnePass) add_moments<0>(e, u);
  }

 private:
  template <int K>
  __device__ __forceinline__ void add_moments(T e, T u) {
    constexpr int kPowers = Kind::Sums::kPowers;
    sum[2 + K] += monomial<Kind::Sums::kAlpha + K / kPowers, K % kPowers>(e, u);
    if constexpr (K + 1 < Kind::kMoments) add_moments<K + 1>(e, u);
  }
};

// Copies the chunk into shared memory, and returns the largest of the thread's columns and the
// vector that holds it.
__device__ __forceinline__ Top<T> fetch(const RowChunk<S>& chunk, const SharedArray<Vector>& row) {
  Top<T> top{static_cast<T>(-kInfinity), 0};
  for_each_vector<kBatch>(chunk, [&](const Vector& vector, int index) {
    row[index] = vector;
    const T largest = S::maximum(vector);
    if (largest > top.value) top = {largest, index};
  });
  return top;
}

// Finds the column of the maximum in its vector and sets it to -inf in shared memory.  Only the
// thread that sums this vector calls this, so no barrier is needed for the change.
template <typename Memory>
__device__ void exclude_argmax(const Top<T>& top, const Memory& shared) {
  const Vector vector = shared.row[top.vector];
  const auto z = S::unpack(vector);
  int within = 0;
  CAREF_UNROLL
  for (int i = S::kWidth - 1; i >= 0; --i) within = z.at[i] == top.value ? i : within;
  const int column = top.vector * S::kWidth + within;
  shared.columns[column] = S::narrow(-kInfinity);
  shared.flags[0] = column;
}

// The result of a row from its sums `totals`, an array in shared memory or of a thread.
template <typename Kind, typename Totals>
__device__ __forceinline__ RowResult<T> row_result(const RowParams& params, const Target& target,
                                                   const Totals& totals, double maximum,
                                                   int64_t argmax, double label_logit) {
  const RowSums sums{maximum, argmax, totals[0], totals[1]};
  const Exponents exponents = Kind::exponents(params);
  RowResult<T> result(params, target, exponents, sums, label_logit);
  if constexpr (Kind::kOnePass) {
    typename Kind::Sums moments;
    CAREF_UNROLL
    for (int k = 0; k < Kind::kMoments; ++k) moments.sum[k] = totals[2 + k];
    if (result.needs_sced()) result.add_sced(moments, exponents);
  }
  return result;
}

}  // namespace
}  // namespace caref::cuda
