// How the columns of a call are divided among blocks.  A block keeps its share of a row in shared
// memory, so a row that does not fit, or one of few rows, is cut into slices.
#pragma once

#include "reduce.cuh"

namespace caref::cuda {

// Slice s of row r belongs to block (r - first_row) * count + s.
struct Slices {
  int64_t first_row;
  int count;    // slices of a row
  int columns;  // of a slice, except the last one of a row
};

// What one block works on.
struct Place {
  int64_t row;
  int slice;
  int begin;    // first column
  int columns;  // how many; the last slices of a row may have none

  __device__ Place(const Slices& slices, int64_t row_columns)
      : row(slices.first_row + blockIdx.x / slices.count),
        slice(static_cast<int>(blockIdx.x % slices.count)),
        begin(slice * slices.columns),
        columns(static_cast<int>(row_columns) - begin) {
    if (columns > slices.columns) columns = slices.columns;
    if (columns < 0) columns = 0;
  }
};

// Labels form addresses: one that is no column makes its row NaN, with a gradient of 0.
__device__ __forceinline__ bool is_outside(const Target& target, int64_t columns) {
  return target.has_label && (target.label < 0 || target.label >= columns);
}

// What an earlier launch has stored of a row.
template <typename T>
struct SavedRow {
  T maximum, argmax, residual;

  __device__ SavedRow(const RowParams& params, int64_t row) {
    const T* stats = static_cast<const T*>(params.stats) + row * kNumStatistics;
    maximum = stats[kMaximum];
    argmax = stats[kArgmax];
    residual = stats[kResidual];
  }

  // Whether it has a softmax, and is not one-hot.  Statistics are data: they are checked.
  __device__ bool needs_sced(int64_t columns) const {
    return residual == residual && !is_one_hot(residual) && argmax >= 0 && argmax < T(columns);
  }
};

// y is clamped here from below where it is a factor, because 0 * -inf is NaN.
__device__ __forceinline__ float clamp_shift(float y) { return fmaxf(y, -1e4f); }
__device__ __forceinline__ double clamp_shift(double y) { return fmax(y, -1e4); }

// The finite stand-in for a maximum where all columns are -inf: -inf - -inf would be NaN.
__device__ __forceinline__ float reference_of(float maximum) {
  return maximum > -kInfinity ? maximum : -3.402823466e38f;
}
__device__ __forceinline__ double reference_of(double maximum) {
  return maximum > -kInfinity ? maximum : -1.7976931348623157e308;
}

// e^y: of float by the two instructions that the hardware has for it (setup.py compiles with -ftz).
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
