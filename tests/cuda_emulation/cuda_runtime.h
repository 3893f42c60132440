// The part of the CUDA language and runtime that csrc/cuda uses, so that tests can compile the .cu
// files unmodified with g++ and run them on the host.  Each thread of a block is a fiber, and
// blocks run one after another (emulator.cpp).  A kernel fails with a launch error that names the
// place if
//   - not all threads of a barrier or of a warp operation reach it at the same place;
//   - shared memory is accessed out of bounds, or read before it is written;
//   - two threads access the same shared memory without a barrier in between, and at least one of
//     them writes.  Only atomic additions need no barrier between one another.
// Shared memory must come from the macro CAREF_DYNAMIC_SHARED.  Accesses to a plain __shared__
// array could not be checked, and it does not compile.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define CAREF_DYNAMIC_SHARED(name) \
  unsigned char* const name = nullptr /* the emulated SharedArray does not use the address */

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_emulation {

constexpr int kWarp = 32;

// The place in the sources at which a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// Waits for all threads of the block.
void block_barrier(const Site& site);
// Waits for the lanes `mask` of the warp; `orders_memory` says whether this orders memory accesses,
// as __syncwarp does.
void warp_barrier(unsigned mask, const Site& site, bool orders_memory);
// The value of a lane in the current warp operation, a slot of 16 bytes.
void* warp_slot(int lane);
void next_warp_slots();
int lane();

// These check an access to shared memory and return its address; they do not return if the access
// is a fault.
void* shared_for_reading(std::ptrdiff_t offset, std::size_t bytes);
void* shared_for_writing(std::ptrdiff_t offset, std::size_t bytes);
void* shared_for_adding(std::ptrdiff_t offset, std::size_t bytes);

// The address of an element of shared memory.
template <typename E>
struct SharedAddress {
  std::ptrdiff_t offset;
};

template <typename Value>
Value exchange(unsigned mask, Value value, int from, const Site& site) {
  static_assert(sizeof(Value) <= 16, "a slot has 16 bytes");
  std::memcpy(warp_slot(lane()), &value, sizeof(value));
  warp_barrier(mask, site, false);
  Value received;
  std::memcpy(&received, warp_slot(from), sizeof(received));
  next_warp_slots();
  return received;
}

unsigned ballot(unsigned mask, bool predicate, const Site& site);

}  // namespace cuda_emulation

#define CUDA_EMULATION_SITE(what) \
  ::cuda_emulation::Site { what, __FILE__, __LINE__ }
#define __syncthreads() ::cuda_emulation::block_barrier(CUDA_EMULATION_SITE("__syncthreads"))
#define __syncwarp() \
  ::cuda_emulation::warp_barrier(0xffffffffu, CUDA_EMULATION_SITE("__syncwarp"), true)
#define __shfl_xor_sync(mask, value, step)                                   \
  ::cuda_emulation::exchange(mask, value, ::cuda_emulation::lane() ^ (step), \
                             CUDA_EMULATION_SITE("__shfl_xor_sync"))
#define __shfl_up_sync(mask, value, step)                                                       \
  ::cuda_emulation::exchange(                                                                   \
      mask, value, ::cuda_emulation::lane() - ((step) > ::cuda_emulation::lane() ? 0 : (step)), \
      CUDA_EMULATION_SITE("__shfl_up_sync"))
#define __shfl_sync(mask, value, from) \
  ::cuda_emulation::exchange(mask, value, (from) % 32, CUDA_EMULATION_SITE("__shfl_sync"))
#define __ballot_sync(mask, predicate) \
  ::cuda_emulation::ballot(mask, predicate, CUDA_EMULATION_SITE("__ballot_sync"))
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))

namespace caref::cuda {

// The SharedArray of csrc/cuda/reduce.cuh, with a check of every access.
template <typename E>
class SharedArray {
 public:
  class Reference {
   public:
    explicit Reference(std::ptrdiff_t offset) : offset_(offset) {}
    operator E() const {
      E value;
      std::memcpy(&value, cuda_emulation::shared_for_reading(offset_, sizeof(E)), sizeof(E));
      return value;
    }
    const Reference& operator=(const E& value) const {
      std::memcpy(cuda_emulation::shared_for_writing(offset_, sizeof(E)), &value, sizeof(E));
      return *this;
    }
    const Reference& operator=(const Reference& other) const {
      return *this = static_cast<E>(other);
    }
    cuda_emulation::SharedAddress<E> operator&() const { return {offset_}; }

   private:
    std::ptrdiff_t offset_;
  };

  SharedArray(unsigned char*, int offset) : offset_(offset) {}
  Reference operator[](std::ptrdiff_t index) const {
    return Reference(offset_ + index * static_cast<std::ptrdiff_t>(sizeof(E)));
  }

 private:
  std::ptrdiff_t offset_;
};

}  // namespace caref::cuda

template <typename E>
E atomicAdd(cuda_emulation::SharedAddress<E> address, E value) {
  void* const place = cuda_emulation::shared_for_adding(address.offset, sizeof(E));
  E old;
  std::memcpy(&old, place, sizeof(E));
  const E sum = old + value;
  std::memcpy(place, &sum, sizeof(E));
  return old;
}

inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMaxGridDimX = 5,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim{0, 0, 0};
  dim3 blockDim{0, 0, 0};
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace cuda_emulation {
cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                void* arguments);
}  // namespace cuda_emulation

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return cuda_emulation::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto call = [&] { kernel(Parameters(arguments)...); };
  using Call = decltype(call);
  return cuda_emulation::run(
      *config, reinterpret_cast<const void*>(kernel),
      [](void* closure) { (*static_cast<Call*>(closure))(); }, &call);
}
