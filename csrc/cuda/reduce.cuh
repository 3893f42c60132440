// What the threads of a block know together: shared memory, and sums and maxima over a block.
// Every reduction has one order, whatever the timing, so results are the same from run to run.
#pragma once

#include "storage.cuh"

// Dynamic shared memory, the only kind the kernels use, and always through SharedArray: the host
// emulation (tests/cuda_emulation) defines both its own way and then sees every access.
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
constexpr int kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarp;

// The largest number that a thread, warp or block has seen and the first vector that holds it.
template <typename T>
struct Top {
  T value;
  int vector;

  __device__ __forceinline__ void merge(T other_value, int other_vector) {
    if (other_value > value || (other_value == value && other_vector < vector)) {
      value = other_value;
      vector = other_vector;
    }
  }
};

// Every thread gets the block's; `values` and `vectors` have an element per warp.
template <typename T>
__device__ __forceinline__ Top<T> block_top(Top<T> top, SharedArray<T> values,
                                            SharedArray<int> vectors) {
  CAREF_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T value = __shfl_xor_sync(kAllLanes, top.value, step);
    const int vector = __shfl_xor_sync(kAllLanes, top.vector, step);
    top.merge(value, vector);
  }
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    values[warp] = top.value;
    vectors[warp] = top.vector;
  }
  __syncthreads();
  for (int i = 0; i < warps; ++i) top.merge(values[i], vectors[i]);
  return top;
}

// Sums of every thread, in T over a warp and in double from there on: a float32 sum over a long row
// would lose four digits.  The last threads' view of `totals` is good after the next barrier,
// thread 0's at once.  `scratch` has kCount elements per warp.
template <int kCount, typename T>
__device__ __forceinline__ void block_sums(T (&sums)[kCount], SharedArray<double> scratch,
                                           SharedArray<double> totals) {
  static_assert(kCount <= kWarp, "one warp adds up the others");
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  CAREF_UNROLL
  for (int k = 0; k < kCount; ++k) {
    CAREF_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sums[k] += __shfl_xor_sync(kAllLanes, sums[k], step);
    }
    if (threadIdx.x % kWarp == 0) scratch[warp * kCount + k] = static_cast<double>(sums[k]);
  }
  __syncthreads();  // the first warp reads what the others have written
  if (threadIdx.x < kCount) {
    double total = 0.0;
    for (int i = 0; i < warps; ++i) total += scratch[i * kCount + threadIdx.x];
    totals[threadIdx.x] = total;
  }
  if (warp == 0) __syncwarp();  // thread 0 reads what its neighbours have written
}

}  // namespace caref::cuda
