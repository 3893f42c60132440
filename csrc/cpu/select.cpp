// Selection in three steps.  A sample of the row gives a bracket of the threshold; one pass lists
// the columns inside the bracket and counts those above it; bisection over the keys finds the
// threshold in the list.  If the bracket turns out not to hold the threshold, the whole row is
// listed, which is slower and gives the same result.
#include "select.h"

#include <cmath>
#include <type_traits>

namespace caref::cpu::CAREF_ISA {
namespace {

// Rows of at most this many columns are listed whole, because bisection of the whole row takes less
// time than a sample.
constexpr int64_t kShortRow = 4096;
// Registers of the sample, spread evenly over the row.
constexpr int64_t kSampledRegisters = 128;
// The ranks of the bracket differ from the expected rank by this many standard deviations plus this
// many ranks.
constexpr double kMargin = 4.0;
// A list of at most this many keys is not shrunk during the search.  It then still holds every
// column above the threshold and is summed instead of the row.  It fits the first-level cache.
constexpr int64_t kShortList = 8192;

#if defined(__AVX512F__)
CAREF_HD int64_t append(int32_t* out, Keys<float> keys, Keys<float> chosen) {
  const __mmask16 mask = _mm512_movepi32_mask(bit_cast<__m512i>(chosen));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, bit_cast<__m512i>(keys)));
  return __builtin_popcount(mask);
}
CAREF_HD int64_t append(int64_t* out, Keys<double> keys, Keys<double> chosen) {
  const __mmask8 mask = _mm512_movepi64_mask(bit_cast<__m512i>(chosen));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(mask, bit_cast<__m512i>(keys)));
  return __builtin_popcount(mask);
}
#else
CAREF_HD unsigned lane_bits(Keys<float> chosen) {
#if defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(bit_cast<__m256>(chosen)));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps(bit_cast<__m128>(chosen)));
#else
  unsigned bits = 0;
  for (int lane = 0; lane < Lanes<float>::kCount; ++lane) bits |= (chosen[lane] & 1u) << lane;
  return bits;
#endif
}
CAREF_HD unsigned lane_bits(Keys<double> chosen) {
  unsigned bits = 0;
  for (int lane = 0; lane < Lanes<double>::kCount; ++lane)
    bits |= static_cast<unsigned>(chosen[lane] & 1) << lane;
  return bits;
}
// Writes the chosen lanes to `out` contiguously and returns their number.  Up to a whole register
// after them may be overwritten.
template <typename K, typename V>
CAREF_HD int64_t append(K* out, V keys, V chosen) {
  unsigned bits = lane_bits(chosen);
  int64_t count = 0;
  for (; bits; bits &= bits - 1) out[count++] = keys[__builtin_ctz(bits)];
  return count;
}
#endif

template <typename T>
void pad(Key<T>* list, int64_t size) {
  for (int lane = 0; lane < Lanes<T>::kCount; ++lane) list[size + lane] = kNoKey<T>;
}

template <typename T>
CAREF_HD int64_t lane_sum(Keys<T> lanes) {
  int64_t sum = 0;
  for (int lane = 0; lane < Lanes<T>::kCount; ++lane) sum += lanes[lane];
  return sum;
}

// Lists the keys in [low, high] of a row; `above` counts the larger ones.
template <typename S, typename T = typename Storage<S>::Arithmetic>
int64_t list_columns(const S* row, int64_t columns, Key<T> low, Key<T> high, Key<T>* out,
                     int64_t& above) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t size = 0, i = 0;
  Keys<T> larger_keys = {};
  for (; i + kLanes <= columns; i += kLanes) {
    const Keys<T> keys = keys_of<T>(load(row + i));
    larger_keys -= keys > high;
    size += append(out + size, keys, (keys >= low) & (keys <= high));
  }
  above = lane_sum<T>(larger_keys);
  for (; i < columns; ++i) {
    const Key<T> key = key_at(row + i);
    above += key > high;
    if (key >= low && key <= high) out[size++] = key;
  }
  pad<T>(out, size);
  return size;
}

// Keeps the keys of a list that are in [low, high], in place.
template <typename T>
int64_t shrink(Key<T>* list, int64_t size, Key<T> low, Key<T> high) {
  int64_t kept = 0;
  for (int64_t i = 0; i < size; i += Lanes<T>::kCount) {
    const Keys<T> keys = load_keys<T>(list + i);
    kept += append(list + kept, keys, (keys >= low) & (keys <= high));
  }
  pad<T>(list, kept);
  return kept;
}

template <typename T>
int64_t count_from(const Key<T>* list, int64_t size, Key<T> low) {
  constexpr int kChains = 4, kLanes = Lanes<T>::kCount;
  Keys<T> counts[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain)
      counts[chain] -= load_keys<T>(list + i + chain * kLanes) >= low;
  }
  for (; i < size; i += kLanes) counts[0] -= load_keys<T>(list + i) >= low;
  return lane_sum<T>(counts[0] + counts[1] + counts[2] + counts[3]);
}

// The smallest key of a list that is at least `low`.
template <typename T>
Key<T> least_from(const Key<T>* list, int64_t size, Key<T> low) {
  Keys<T> least = Keys<T>{} + kInfinityKey<T>;
  for (int64_t i = 0; i < size; i += Lanes<T>::kCount) {
    const Keys<T> keys = load_keys<T>(list + i);
    least = (keys >= low) & (keys < least) ? keys : least;
  }
  Key<T> result = least[0];
  for (int lane = 1; lane < Lanes<T>::kCount; ++lane)
    result = least[lane] < result ? least[lane] : result;
  return result;
}

// The rank-th largest of the listed keys, 1 <= rank <= size.  Every step halves the interval of
// keys that contains it.  A long list is shrunk to that interval whenever less than half of it is
// inside, which drops the keys above the interval.
template <typename T>
Selection<T> search(Key<T>* list, int64_t size, int64_t rank) {
  using Unsigned = std::make_unsigned_t<Key<T>>;
  const bool is_short = size <= kShortList;
  Key<T> low = -kInfinityKey<T>, high = kInfinityKey<T>;  // the threshold is in [low, high]
  int64_t from_low = size, beyond_high = 0;               // counts of keys >= low and > high
  int64_t dropped = 0;                                    // keys > high that were dropped
  while (low < high) {
    const Unsigned width = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    const Key<T> middle = static_cast<Key<T>>(static_cast<Unsigned>(low) + width / 2 + (width & 1));
    const int64_t count = dropped + count_from<T>(list, size, middle);
    if (count >= rank) {
      low = middle;
      from_low = count;
      if (count == rank) {  // the smallest of these keys is the result, so the search can stop
        low = high = least_from<T>(list, size, middle);
      }
    } else {
      high = middle - 1;
      beyond_high = count;
    }
    if (!is_short && size > kShortList && 2 * (from_low - beyond_high) < size && low < high) {
      size = shrink<T>(list, size, low, high);
      dropped = beyond_high;
    }
  }
  const int64_t above = dropped + count_from<T>(list, size, low + 1);
  const int64_t equal = dropped + count_from<T>(list, size, low) - above;
  return {low, above, equal, is_short ? list : nullptr, size};
}

// The interval of keys in which the k-th largest key of the whole row is expected; at worst
// [-inf, inf].
template <typename S, typename T = typename Storage<S>::Arithmetic>
void bracket(const S* row, int64_t columns, int64_t k, Key<T>* workspace, Key<T>& low,
             Key<T>& high) {
  constexpr int kLanes = Lanes<T>::kCount;
  constexpr int64_t kSize = kSampledRegisters * kLanes;
  const int64_t registers = columns / kLanes;
  for (int64_t i = 0; i < kSampledRegisters; ++i) {
    const int64_t sampled = i * registers / kSampledRegisters;
    const Keys<T> keys = keys_of<T>(load(row + sampled * kLanes));
    memcpy(workspace + i * kLanes, &keys, sizeof(keys));
  }
  const double rank = static_cast<double>(k) * kSize / static_cast<double>(columns);
  const double margin = kMargin * (std::sqrt(rank) + 1.0);
  const int64_t lower = static_cast<int64_t>(rank + margin) + 1;
  const int64_t upper = static_cast<int64_t>(rank - margin);
  low = lower <= kSize ? search<T>(workspace, kSize, lower).threshold : -kInfinityKey<T>;
  const bool list_is_short = static_cast<double>(lower) * columns / kSize <= kShortList;
  high =
      !list_is_short && upper >= 1 ? search<T>(workspace, kSize, upper).threshold : kInfinityKey<T>;
}

}  // namespace

template <typename S, typename T>
Selection<T> select_top(const S* row, int64_t columns, int64_t k, Key<T>* workspace) {
  int64_t above = 0;
  if (columns > kShortRow) {
    Key<T> low, high;
    bracket<S>(row, columns, k, workspace, low, high);
    const int64_t size = list_columns<S>(row, columns, low, high, workspace, above);
    if (above < k && k <= above + size) {
      Selection<T> found = search<T>(workspace, size, k - above);
      if (above > 0) found.listed = nullptr;
      found.above += above;
      return found;
    }
  }
  const int64_t size =
      list_columns<S>(row, columns, -kInfinityKey<T>, kInfinityKey<T>, workspace, above);
  return search<T>(workspace, size, k);
}

template Selection<float> select_top(const float*, int64_t, int64_t, int32_t*);
template Selection<double> select_top(const double*, int64_t, int64_t, int64_t*);
template Selection<float> select_top(const BFloat16*, int64_t, int64_t, int32_t*);
template Selection<float> select_top(const Float16*, int64_t, int64_t, int32_t*);

}  // namespace caref::cpu::CAREF_ISA
