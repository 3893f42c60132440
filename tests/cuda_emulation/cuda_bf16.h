// The part of CUDA's cuda_bf16.h that csrc/cuda uses, for the emulation in cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

namespace cuda_emulation {

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// Rounds to nearest even; every NaN becomes the NaN that the hardware writes.
inline uint16_t float_to_bfloat16(float value) {
  if (value != value) return 0x7fff;
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

}  // namespace cuda_emulation

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {cuda_emulation::float_to_bfloat16(low), cuda_emulation::float_to_bfloat16(high)};
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  using cuda_emulation::bfloat16_to_float;
  return __floats2bfloat162_rn(std::fmax(bfloat16_to_float(a.x), bfloat16_to_float(b.x)),
                               std::fmax(bfloat16_to_float(a.y), bfloat16_to_float(b.y)));
}
