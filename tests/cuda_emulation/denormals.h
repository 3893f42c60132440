// Flushes denormals to 0, as the compiled float32 code does on a GPU (setup.py passes -ftz).
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace cuda_emulation {

class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace cuda_emulation
