// Integer keys that have the order of the logits, for top-k masks.  Unlike comparisons of floats
// under -ftz, comparisons of keys distinguish subnormal numbers from 0; and a search over keys
// takes at most as many steps as a key has bits.
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
// The bits of an element, and the integer type of its key.
template <typename Element>
using BitsOf = typename KeyTypes<sizeof(Element)>::Bits;
template <typename Element>
using KeyOf = typename KeyTypes<sizeof(Element)>::Key;

// The key of 0.0 and of -0.0.  Keys of positive numbers are larger and those of negative numbers
// smaller, by the magnitude of the number.
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
