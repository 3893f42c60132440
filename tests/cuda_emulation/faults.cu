// Kernels with one fault each, and correct ones, for tests/test_cuda_emulation.py: the emulation
// must detect every fault and describe it.
#include <cuda_runtime.h>

#include "reduce.cuh"

namespace {

using caref::cuda::kAllLanes;
using caref::cuda::kWarp;
using caref::cuda::SharedArray;

constexpr int kThreads = 64;

// Reverses the values of the threads through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(int* out) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<int> values(memory, 0);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// Overwrites elements that other threads may still read.
__global__ void reuse_kernel(int* out) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<int> values(memory, 0);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + kWarp) % kThreads];
  values[threadIdx.x] = 2;
}

// The second warp overwrites elements that the first warp has read since the last barrier.
__global__ void late_reuse_kernel(int* out) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<int> values(memory, 0);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x % kWarp];
  if (threadIdx.x >= kWarp) values[threadIdx.x % kWarp] = 2;
}

// Only half of the block reaches the barrier.
__global__ void half_barrier_kernel(int* out) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  out[threadIdx.x] = 1;
}

// Each half reaches a barrier of its own.
__global__ void two_barriers_kernel(int* out) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

// One lane of the mask does not reach the shuffle.
__global__ void missing_lane_kernel(int* out) {
  if (threadIdx.x % kWarp == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

// The first element has not been written.
__global__ void unwritten_kernel(int* out) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<int> values(memory, 0);
  if (threadIdx.x > 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[0];
}

__global__ void beyond_kernel(int* out) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<int> values(memory, 0);
  values[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

// Neighbouring lanes exchange values, with a __syncwarp in between, which is sufficient, or
// without.
template <bool kBarrier>
__global__ void neighbours_kernel(int* out) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<int> values(memory, 0);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void votes_kernel(int* out) {
  const bool odd = threadIdx.x % 2 == 1;
  const unsigned votes = __ballot_sync(kAllLanes, odd);
  const bool some = __any_sync(kAllLanes, odd), all = __all_sync(kAllLanes, odd);
  out[threadIdx.x] = votes == 0xaaaaaaaau && some && !all ? __shfl_sync(kAllLanes, 7, 3) : 0;
}

// Every thread adds to one sum, which is cleared, added to and read, with barriers in between or
// with one of them missing.
template <bool kCleared, bool kBarrierBefore, bool kBarrierAfter>
__global__ void sum_kernel(int* out) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<int> sums(memory, 0);
  if (kCleared && threadIdx.x == 0) sums[0] = 0;
  if (kBarrierBefore) __syncthreads();
  atomicAdd(&sums[0], static_cast<int>(threadIdx.x));
  if (kBarrierAfter) __syncthreads();
  out[threadIdx.x] = sums[0];
}

__global__ void scan_kernel(int* out) {
  const int lane = threadIdx.x % kWarp;
  int sum = 1;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  out[threadIdx.x] = sum + 64 - __clzll(static_cast<long long>(lane));
}

struct Named {
  const char* name;
  void (*kernel)(int*);
};
const Named kKernels[] = {
    {"reverse", reverse_kernel<true>},
    {"missing barrier", reverse_kernel<false>},
    {"reuse", reuse_kernel},
    {"late reuse", late_reuse_kernel},
    {"half a barrier", half_barrier_kernel},
    {"two barriers", two_barriers_kernel},
    {"missing lane", missing_lane_kernel},
    {"unwritten", unwritten_kernel},
    {"beyond the end", beyond_kernel},
    {"neighbours", neighbours_kernel<true>},
    {"missing __syncwarp", neighbours_kernel<false>},
    {"votes", votes_kernel},
    {"sum", sum_kernel<true, true, true>},
    {"sum of nothing", sum_kernel<false, true, true>},
    {"sum before it is cleared", sum_kernel<true, false, true>},
    {"sum read early", sum_kernel<true, true, false>},
    {"scan", scan_kernel},
};

}  // namespace

// Runs the kernel called `name` on `out` (64 elements); returns the error, or null.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(const char* name,
                                                                         int* out) {
  for (const Named& one : kKernels) {
    if (strcmp(one.name, name)) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kThreads * sizeof(int);
    const cudaError_t error = cudaLaunchKernelEx(&config, one.kernel, out);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "there is no such kernel";
}
