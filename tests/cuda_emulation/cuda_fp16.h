// The part of CUDA's cuda_fp16.h that csrc/cuda uses, for the emulation in cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half2 {
  _Float16 x, y;
};

inline float2 __half22float2(__half2 pair) {
  return {static_cast<float>(pair.x), static_cast<float>(pair.y)};
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {static_cast<_Float16>(low), static_cast<_Float16>(high)};
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  return {static_cast<_Float16>(std::fmax(static_cast<float>(a.x), static_cast<float>(b.x))),
          static_cast<_Float16>(std::fmax(static_cast<float>(a.y), static_cast<float>(b.y)))};
}
