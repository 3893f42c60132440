// The division of a row among blocks, and the arithmetic of elements on the device.  A block keeps
// its chunk of a row in shared memory, so a row is split among several blocks if it does not fit,
// or if there are few rows.
#pragma once

#include "reduce.cuh"

namespace caref::cuda {

// Split s of row r belongs to block (r - first_row) * count + s.
struct Splits {
  int64_t first_row;
  int count;    // splits of a row
  int columns;  // of every split except the last one of a row
};

// The row and the columns that one block works on.
struct BlockIndex {
  int64_t row;
  int split;
  int begin;    // first column
  int columns;  // number of columns; the last splits of a row may have none

  __device__ BlockIndex(const Splits& splits, int64_t row_columns)
      : row(splits.first_row + blockIdx.x / splits.count),
        split(static_cast<int>(blockIdx.x % splits.count)),
        begin(split * splits.columns),
        columns(static_cast<int>(row_columns) - begin) {
    if (columns > splits.columns) columns = splits.columns;
    if (columns < 0) columns = 0;
  }
};

// Addresses are computed from labels, so a label that is out of range must be detected: it makes
// the terms of its row NaN and its gradient 0.
__device__ __forceinline__ bool is_outside(const Target& target, int64_t columns) {
  return target.has_label && (target.label < 0 || target.label >= columns);
}

// The statistics of a row that an earlier launch has stored.
template <typename T>
struct SavedRow {
  T maximum, argmax, residual;

  __device__ SavedRow(const RowParams& params, int64_t row) {
    const T* stats = static_cast<const T*>(params.stats) + row * kNumStatistics;
    maximum = stats[kMaximum];
    argmax = stats[kArgmax];
    residual = stats[kResidual];
  }

  // Whether the row has a softmax and is not one-hot.  The arg-max is checked before it is used.
  __device__ bool needs_sced(int64_t columns) const {
    return residual == residual && !is_one_hot(residual) && argmax >= 0 && argmax < T(columns);
  }
};

// y is clamped from below wherever it is a factor, because 0 * -inf would be NaN.
__device__ __forceinline__ float clamp_shift(float y) { return fmaxf(y, -1e4f); }
__device__ __forceinline__ double clamp_shift(double y) { return fmax(y, -1e4); }

// The maximum, or the lowest finite number if all columns are -inf, because -inf - -inf would be
// NaN.
__device__ __forceinline__ float reference_of(float maximum) {
  return maximum > -kInfinity ? maximum : -3.402823466e38f;
}
__device__ __forceinline__ double reference_of(double maximum) {
  return maximum > -kInfinity ? maximum : -1.7976931348623157e308;
}

// e^y; for float these are two instructions, a product and ex2 (setup.py compiles with -ftz).
__device__ __forceinline__ float exponential(float y) { return exp2f(y * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double y) { return exp(y); }

}  // namespace caref::cuda

namespace caref {
template <>
struct Ops<float> {
  static CAREF_HD float absolute(float x) { return fabsf(x); }
  static CAREF_HD float sign(float x) {
    return static_cast<float>(x > 0.0f) - static_cast<float>(x < 0.0f);
  }
  static CAREF_HD float fractional_power(float x, double fraction) {
    return exp2f(static_cast<float>(fraction) * log2f(x));
  }
};
}  // namespace caref
