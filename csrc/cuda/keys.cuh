// Logits as integers in their order, for top-k masks: comparisons of these see subnormal numbers,
// which comparisons of floats take for 0 (-ftz), and a search over them takes at most as many steps
// as a key has bits.
#pragma once

#include "storage.cuh"

namespace caref::cuda {

template <int kBytes>
struct KeyTypes {
  using Bits = uint32_t;
  using Key = uint32_t;
};
template <>
struct KeyTypes<2> {
  using Bits = uint16_t;
  using Key = uint32_t;
};
template <>
struct KeyTypes<8> {
  using Bits = uint64_t;
  using Key = uint64_t;
};
// An element, and what compares as it does.
template <typename Element>
using BitsOf = typename KeyTypes<sizeof(Element)>::Bits;
template <typename Element>
using KeyOf = typename KeyTypes<sizeof(Element)>::Key;

// The key of 0.0, and of -0.0: the magnitudes lie to both sides of it.
template <typename Element>
constexpr KeyOf<Element> kZeroKey = KeyOf<Element>{1} << (8 * sizeof(Element) - 1);

template <typename Element>
__device__ __forceinline__ KeyOf<Element> key_of(Element element) {
  constexpr KeyOf<Element> kZero = kZeroKey<Element>;
  const KeyOf<Element> bits = bits_as<BitsOf<Element>>(element), magnitude = bits & (kZero - 1);
  return bits & kZero ? kZero - magnitude : kZero + magnitude;
}

template <typename Element>
__device__ __forceinline__ Element element_of(KeyOf<Element> key) {
  constexpr KeyOf<Element> kZero = kZeroKey<Element>;
  const KeyOf<Element> bits = key < kZero ? (kZero - key) | kZero : key - kZero;
  return bits_as<Element>(static_cast<BitsOf<Element>>(bits));
}

}  // namespace caref::cuda
