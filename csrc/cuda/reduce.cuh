// Shared memory, and sums and maxima over the threads of a block.  Every reduction has a fixed
// order, so results are bitwise identical from run to run.
#pragma once

#include "storage.cuh"

// The kernels use dynamic shared memory only, and access it only through SharedArray.  The host
// emulation (tests/cuda_emulation) replaces both definitions to check every access.
#if !defined(CAREF_DYNAMIC_SHARED)
#define CAREF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
namespace caref::cuda {
template <typename E>
class SharedArray {
 public:
  __device__ __forceinline__ SharedArray(unsigned char* memory, int offset)
      : data_(reinterpret_cast<E*>(memory + offset)) {}
  __device__ __forceinline__ E& operator[](int index) const { return data_[index]; }

 private:
  E* data_;
};
}  // namespace caref::cuda
#endif

namespace caref::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;

// The maximum of the columns of a thread, warp or block, and the first vector that holds it.
template <typename T>
struct Top {
  T value;
  int vector;

  __device__ __forceinline__ void combine(T other_value, int other_vector) {
    if (other_value > value || (other_value == value && other_vector < vector)) {
      value = other_value;
      vector = other_vector;
    }
  }
};

// Returns the maximum of the block to every thread.  `values` and `vectors` have one element per
// warp.
template <typename T>
__device__ __forceinline__ Top<T> block_top(Top<T> top, SharedArray<T> values,
                                            SharedArray<int> vectors) {
  CAREF_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T value = __shfl_xor_sync(kAllLanes, top.value, step);
    const int vector = __shfl_xor_sync(kAllLanes, top.vector, step);
    top.combine(value, vector);
  }
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    values[warp] = top.value;
    vectors[warp] = top.vector;
  }
  __syncthreads();
  for (int i = 0; i < warps; ++i) top.combine(values[i], vectors[i]);
  return top;
}

// Adds the sums of all threads, in T within a warp and in double across warps, because a float32
// sum over a long row would lose four digits.  Thread 0 may read `totals` at once, other threads
// after the next barrier.  `scratch` has kCount elements per warp.
template <int kCount, typename T>
__device__ __forceinline__ void block_sums(T (&sums)[kCount], SharedArray<double> scratch,
                                           SharedArray<double> totals) {
  static_assert(kCount <= kWarp, "one warp adds the sums of all warps");
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  CAREF_UNROLL
  for (int k = 0; k < kCount; ++k) {
    CAREF_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sums[k] += __shfl_xor_sync(kAllLanes, sums[k], step);
    }
    if (threadIdx.x % kWarp == 0) scratch[warp * kCount + k] = static_cast<double>(sums[k]);
  }
  __syncthreads();  // the sums of all warps are written before the first warp reads them
  if (threadIdx.x < kCount) {
    double total = 0.0;
    for (int i = 0; i < warps; ++i) total += scratch[i * kCount + threadIdx.x];
    totals[threadIdx.x] = total;
  }
  if (warp == 0) __syncwarp();  // the totals are written before thread 0 reads them
}

}  // namespace caref::cuda
