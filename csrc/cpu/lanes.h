// SIMD vectors of one register of the instruction set that this file is compiled for, written with
// the vector extensions of GCC and Clang: loads from every storage type, rounding stores, exp, log.
//
// The kernels are compiled once per instruction set (setup.py passes CAREF_ISA and the flags).
// Everything here is in a namespace with the name of the instruction set, so that the linker never
// keeps the AVX-512 copy of an inline function for a machine without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#include "../row_layout.h"
#include "../row_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace caref::cpu::CAREF_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = kRegisterBytes / 4;
  typedef float Value __attribute__((vector_size(kRegisterBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t Mask __attribute__((vector_size(kRegisterBytes)));
  typedef uint16_t Half __attribute__((vector_size(kRegisterBytes / 2)));
  static constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23 + exponent bias
  static constexpr int kMantissaBits = 23;
  // exp(-88) rounds to the scale 2^-127, whose bit pattern is 0, so clamping y at -88 also flushes
  // e^y to 0 and no comparison is needed.
  static constexpr float kFloor = -88.0f;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2 = 0.693147180559945309f;
  static constexpr float kLn2High = 0.693359375f;  // 10 bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
};

template <>
struct Lanes<double> {
  static constexpr int kCount = kRegisterBytes / 8;
  typedef double Value __attribute__((vector_size(kRegisterBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t Mask __attribute__((vector_size(kRegisterBytes)));
  static constexpr double kMagic = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52 + exponent bias
  static constexpr int kMantissaBits = 52;
  static constexpr double kFloor = -709.0;
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
};

template <typename T>
using Vec = typename Lanes<T>::Value;
using VecF = Vec<float>;
using VecD = Vec<double>;
using BitsF = Lanes<float>::Bits;

template <typename To, typename From>
CAREF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
CAREF_HD Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

// ---- Loads and stores.  T is the arithmetic type; BFloat16 and Float16 are storage types. ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename S>
struct Storage {
  using Arithmetic = float;
};
template <>
struct Storage<double> {
  using Arithmetic = double;
};

template <typename T>
CAREF_HD Vec<T> load(const T* from) {
  Vec<T> value;
  memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
CAREF_HD void store(T* to, Vec<T> value) {
  memcpy(to, &value, sizeof(value));
}

CAREF_HD BitsF load_bits(const void* from) {
  Lanes<float>::Half half;
  memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, BitsF);
}

CAREF_HD void store_bits(void* to, BitsF bits) {
  const auto half = __builtin_convertvector(bits, Lanes<float>::Half);
  memcpy(to, &half, sizeof(half));
}

CAREF_HD VecF load(const BFloat16* from) { return bit_cast<VecF>(load_bits(from) << 16); }

// The conversion uses integer arithmetic, so it is correct whether or not the machine flushes
// denormals.
CAREF_HD VecF load(const Float16* from) {
  const BitsF half = load_bits(from);
  const BitsF sign = (half & 0x8000u) << 16;
  const BitsF exponent = half & 0x7c00u;
  const BitsF rebased = ((half & 0x7fffu) << 13) + (112u << 23);
  const VecF subnormal =
      __builtin_convertvector(bit_cast<Lanes<float>::Mask>(half & 0x3ffu), VecF) *
      5.9604644775390625e-8f;
  BitsF magnitude = exponent == 0u ? bit_cast<BitsF>(subnormal) : rebased;
  magnitude = exponent == 0x7c00u ? rebased + (112u << 23) : magnitude;
  return bit_cast<VecF>(magnitude | sign);
}

// Rounds to nearest, ties to even; NaN stays NaN.
CAREF_HD void store(BFloat16* to, VecF value) {
  const BitsF bits = bit_cast<BitsF>(value);
  const BitsF rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitsF nan = (bits >> 16) | 0x40u;
  store_bits(to, value != value ? nan : rounded);
}

CAREF_HD void store(Float16* to, VecF value) {
  const BitsF bits = bit_cast<BitsF>(value);
  const BitsF sign = (bits >> 16) & 0x8000u;
  const BitsF magnitude = bits & 0x7fffffffu;
  const BitsF normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 moves the subnormal result into the low bits, and the addition rounds it once.
  const BitsF subnormal = bit_cast<BitsF>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  BitsF half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? BitsF{} + 0x7c00u : half;  // 65,520 and above round to infinity
  half = magnitude > 0x7f800000u ? BitsF{} + 0x7e00u : half;
  store_bits(to, half | sign);
}

template <typename S>
CAREF_HD typename Storage<S>::Arithmetic load_one(const S* from) {
  S lanes[Lanes<typename Storage<S>::Arithmetic>::kCount] = {};
  lanes[0] = *from;
  return load(lanes)[0];
}

template <typename S>
CAREF_HD void store_one(S* to, double value) {
  using T = typename Storage<S>::Arithmetic;
  S lanes[Lanes<T>::kCount];
  store(lanes, splat<T>(static_cast<T>(value)));
  *to = lanes[0];
}

// ---- Arithmetic. ----

// a > b ? a : b, so the result is b if one operand is NaN.  Compilers emit a single instruction for
// the select only under -ffast-math, which would also drop NaN; the x86 maximum instruction has
// exactly these semantics.
CAREF_HD VecF larger(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(static_cast<__mmask16>(-1), a,
                             b);  // plain _mm512_max_ps warns in GCC 12
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
CAREF_HD VecD larger(VecD a, VecD b) { return a > b ? a : b; }

// NaN passes through the clamp.
template <typename T>
CAREF_HD Vec<T> clamp_shift(Vec<T> y) {
  return larger(splat<T>(Lanes<T>::kFloor), y);
}

CAREF_HD VecF exp_polynomial(VecF f) {
  VecF poly = 1.3814540579915047e-3f * f + 8.36874544620514e-3f;
  poly = poly * f + 4.166838899254799e-2f;
  poly = poly * f + 1.666652113199234e-1f;
  poly = poly * f + 4.999999403953552e-1f;
  poly = poly * f + 1.0f;
  return poly * f + 1.0f;
}

CAREF_HD VecD exp_polynomial(VecD f) {
  double factorial = 6227020800.0;  // 13!
  VecD poly = splat<double>(1.0 / factorial);
#pragma GCC unroll 13
  for (int n = 13; n > 0; --n) {
    factorial /= n;
    poly = poly * f + 1.0 / factorial;
  }
  return poly;
}

// e^x for x in [kFloor, -kFloor]: exactly 0 at kFloor, NaN for NaN.  The relative error is 1e-7 for
// float and 2e-16 for double.  The power of two is a factor rather than an addition to the exponent
// bits, because the addition could turn a NaN into a finite number.
template <typename T>
CAREF_HD Vec<T> exponential(Vec<T> x) {
  using L = Lanes<T>;
  const Vec<T> shifted = x * L::kLog2E + L::kMagic;
  const Vec<T> n = shifted - L::kMagic;
  Vec<T> f;
  if constexpr (sizeof(T) == 4 && kHasFma) {
    f = x - n * L::kLn2;
  } else {
    f = (x - n * L::kLn2High) - n * L::kLn2Low;
  }
  const auto scale = bit_cast<typename L::Bits>(shifted) << L::kMantissaBits;
  return exp_polynomial(f) * bit_cast<Vec<T>>(scale);
}

// log x for normal x > 0; about -88 for 0.
CAREF_HD VecF logarithm(VecF x) {
  const BitsF bits = bit_cast<BitsF>(x) - 0x3f3504f3u;  // sqrt(1/2)
  const auto exponent = bit_cast<Lanes<float>::Mask>(bits) >> 23;
  const VecF mantissa = bit_cast<VecF>((bits & 0x7fffffu) + 0x3f3504f3u);
  const VecF f = mantissa - 1.0f;
  VecF poly = 7.0376836292e-2f * f - 1.1514610310e-1f;
  poly = poly * f + 1.1676998740e-1f;
  poly = poly * f - 1.2420140846e-1f;
  poly = poly * f + 1.4249322787e-1f;
  poly = poly * f - 1.6668057665e-1f;
  poly = poly * f + 2.0000714765e-1f;
  poly = poly * f - 2.4999993993e-1f;
  poly = poly * f + 3.3333331174e-1f;
  const VecF n = __builtin_convertvector(exponent, VecF);
  const VecF square = f * f;
  return n * 0.693359375f + (f - 0.5f * square + (poly * f * square + n * -2.12194440e-4f));
}

// float64 is used for verification, so accuracy is preferred to speed.
CAREF_HD VecD logarithm(VecD x) {
  for (int i = 0; i < Lanes<double>::kCount; ++i) x[i] = x[i] > 0.0 ? __builtin_log(x[i]) : -745.0;
  return x;
}

// A sum in double with one partial sum per lane.  Blocks of the row are summed in float32 registers
// and then added here, so that float32 rounding errors do not accumulate over a row.
template <typename T>
struct WideSum {
  static constexpr int kParts = sizeof(double) / sizeof(T);
  VecD parts[kParts] = {};

  CAREF_HD void add(VecD block) { parts[0] += block; }
  CAREF_HD void add(VecF block) {
    typedef float HalfRegister __attribute__((vector_size(kRegisterBytes / 2)));
    HalfRegister halves[2];
    memcpy(halves, &block, sizeof(halves));
    parts[0] += __builtin_convertvector(halves[0], VecD);
    parts[kParts - 1] += __builtin_convertvector(halves[1], VecD);
  }

  // Returns the sum and resets the lanes to 0.
  CAREF_HD double take() {
    double sum = 0.0;
    for (int part = 0; part < kParts; ++part) {
      for (int i = 0; i < Lanes<double>::kCount; ++i) sum += parts[part][i];
      parts[part] = VecD{};
    }
    return sum;
  }
};

template <typename T>
CAREF_HD bool any_equal(Vec<T> x, T value) {
  const auto equal = x == value;
  uint64_t words[kRegisterBytes / 8], any = 0;
  memcpy(words, &equal, sizeof(words));
  for (uint64_t word : words) any |= word;
  return any != 0;
}

template <typename T>
CAREF_HD T lane_maximum(Vec<T> x) {
  T lanes[Lanes<T>::kCount];
  store(lanes, x);
  for (int half = Lanes<T>::kCount / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

template <typename T>
struct VectorOps {
  static CAREF_HD Vec<T> absolute(Vec<T> x) { return x < 0 ? -x : x; }
  static CAREF_HD Vec<T> sign(Vec<T> x) {
    const Vec<T> zero = {}, one = zero + 1;
    return (x > 0 ? one : zero) - (x < 0 ? one : zero);
  }
  static CAREF_HD Vec<T> fractional_power(Vec<T> x, double fraction) {
    return exponential<T>(clamp_shift<T>(logarithm(x) * static_cast<T>(fraction)));
  }
};

}  // namespace caref::cpu::CAREF_ISA

namespace caref {
template <>
struct Ops<cpu::CAREF_ISA::VecF> : cpu::CAREF_ISA::VectorOps<float> {};
template <>
struct Ops<cpu::CAREF_ISA::VecD> : cpu::CAREF_ISA::VectorOps<double> {};
}  // namespace caref
