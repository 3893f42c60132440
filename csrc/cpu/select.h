// The k largest logits of a row: the threshold and the numbers of columns above it and equal to it,
// exactly, without a sort.  The search compares integer keys that have the order of the values.
// Keys distinguish subnormal values, which the arithmetic of the kernels flushes to 0, and the
// search takes at most as many steps as a key has bits.
#pragma once

#include "lanes.h"

namespace caref::cpu::CAREF_ISA {

template <typename T>
using Keys = typename Lanes<T>::Mask;
template <typename T>
struct KeyType {
  using Type = int32_t;
};
template <>
struct KeyType<double> {
  using Type = int64_t;
};
template <typename T>
using Key = typename KeyType<T>::Type;

template <typename T>
constexpr Key<T> kSignBit = static_cast<Key<T>>(uint64_t{1} << (8 * sizeof(T) - 1));
template <typename T>
constexpr Key<T> kInfinityKey =
    static_cast<Key<T>>(sizeof(T) == 4 ? 0x7f800000 : 0x7ff0000000000000);
// A key below the keys of all values, including -inf.  It is not the least integer, because
// values_of negates keys.
template <typename T>
constexpr Key<T> kNoKey = -kInfinityKey<T> - 1;

// The bits of the magnitude as an integer with the sign of the value, so -0.0 and 0.0 have the same
// key.  values_of is the inverse.
template <typename T>
CAREF_HD Keys<T> keys_of(Vec<T> values) {
  const Keys<T> bits = bit_cast<Keys<T>>(values), sign = bits >> (8 * sizeof(T) - 1);
  const Keys<T> magnitude = bits & ~kSignBit<T>;
  return (magnitude ^ sign) - sign;
}

template <typename T>
CAREF_HD Vec<T> values_of(Keys<T> keys) {
  const Keys<T> sign = keys >> (8 * sizeof(T) - 1);
  return bit_cast<Vec<T>>(((keys ^ sign) - sign) | (sign & kSignBit<T>));
}

template <typename S>
CAREF_HD Key<typename Storage<S>::Arithmetic> key_at(const S* place) {
  using T = typename Storage<S>::Arithmetic;
  S lanes[Lanes<T>::kCount] = {};
  lanes[0] = *place;
  return keys_of<T>(load(lanes))[0];
}

template <typename T>
CAREF_HD T value_of(Key<T> key) {
  return values_of<T>(Keys<T>{} + key)[0];
}

template <typename T>
CAREF_HD Keys<T> load_keys(const Key<T>* from) {
  Keys<T> keys;
  memcpy(&keys, from, sizeof(keys));
  return keys;
}

// The result of select_top.
template <typename T>
struct Selection {
  Key<T> threshold;  // the k-th largest key
  int64_t above;     // columns with a larger key
  int64_t equal;     // columns with this key
  // A list that includes every key above the threshold, padded with kNoKey to a whole register;
  // null if the caller has to read the row again instead.
  Key<T>* listed;
  int64_t size;
};

// Finds the k-th largest of the columns, 1 <= k <= columns; no column may be NaN.  The workspace
// has room for the keys of the row and a few registers more (launch.cpp).
template <typename S, typename T = typename Storage<S>::Arithmetic>
Selection<T> select_top(const S* row, int64_t columns, int64_t k, Key<T>* workspace);

}  // namespace caref::cpu::CAREF_ISA
