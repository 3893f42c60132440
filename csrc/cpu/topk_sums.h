// SCED over the top k of a row whose softmax is known: the row's top-k mask, and the sums over it.
#pragma once

#include "rows.h"
#include "select.h"

namespace caref::cpu::CAREF_ISA {

struct ScedSums {
  double density = 0.0;
  double slope = 0.0;
};

// The sums over the columns above the threshold, without the arg-max column.
template <typename T, typename Kind>
class TopKSums {
 public:
  using V = Vec<T>;

  TopKSums(T maximum, Key<T> threshold, const RowConstants<T>& row, const Exponents& exponents)
      : maximum_(maximum),
        inverse_d_(static_cast<T>(row.p_top)),
        c_(static_cast<T>(row.c)),
        threshold_(threshold),
        exponents_(exponents) {}

  // The sums over a list of keys.  One entry equal to `top`, the key of the arg-max column, is
  // removed from the list.
  ScedSums of_list(Key<T>* list, int64_t size, Key<T> top) {
    for (int64_t i = 0; i < size; ++i) {
      if (list[i] == top) {
        list[i] = kNoKey<T>;
        break;
      }
    }
    constexpr int64_t kLanes = Lanes<T>::kCount;
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const int64_t end = begin + kBlock < size ? begin + kBlock : size;
      for (int64_t i = begin; i < end; i += kLanes) add(load_keys<T>(list + i));
      flush();
    }
    return take();
  }

  template <typename S>
  ScedSums of_row(BlockReader<S>& block, int64_t argmax) {
    block.rewind();
    while (block.next()) {
      if (block.contains(argmax)) block.exclude(argmax);
      block.for_each([&](V x) CAREF_INLINE { add(keys_of<T>(x)); });
      flush();
    }
    return take();
  }

 private:
  // Adds the columns above the threshold; all others read as -inf.  The columns that equal the
  // threshold all have the same value, and the caller adds them.
  CAREF_HD void add(Keys<T> keys) {
    const V empty = splat<T>(-std::numeric_limits<T>::infinity());
    const V x = keys > threshold_ ? values_of<T>(keys) : empty;
    const V y = clamp_shift<T>(x - maximum_);
    const V p = exponential<T>(y) * inverse_d_;
    const V log_ratio = y - c_, q = 1 - p;
    if constexpr (Kind::kOnePass) {
      const V t = p * log_ratio;
      V density = t * t;
#pragma GCC unroll 8
      for (int i = 2; i < Kind::Sums::kAlpha; ++i) density *= t;
#pragma GCC unroll 8
      for (int i = 0; i < Kind::Sums::kBeta; ++i) density *= q;
      density_ += density;
      slope_ += p * even_slope<Kind::Sums::kAlpha, Kind::Sums::kBeta>(p, log_ratio);
    } else {
      density_ += sced_density(p, log_ratio, q, exponents_);
      slope_ += p * sced_slope<T>(p, log_ratio, q, exponents_) / q;
    }
  }

  CAREF_HD void flush() {
    wide_density_.add(density_);
    wide_slope_.add(slope_);
    density_ = slope_ = V{};
  }

  ScedSums take() { return {wide_density_.take(), wide_slope_.take()}; }

  T maximum_, inverse_d_, c_;
  Key<T> threshold_;
  const Exponents& exponents_;
  V density_ = {}, slope_ = {};
  WideSum<T> wide_density_, wide_slope_;
};

// The top-k mask of a row: k, the threshold, the weight of each column that equals the threshold,
// and the key of the arg-max column.
template <typename T>
struct TopKMask {
  int64_t num_kept;
  Key<T> top;
  Selection<T> selection;
  double tie_weight;

  double weight(Key<T> key) const {
    return key > selection.threshold ? 1.0 : key == selection.threshold ? tie_weight : 0.0;
  }
};

// Selects the top-k mask of a row with this entropy.
template <typename S, typename T = typename Storage<S>::Arithmetic>
TopKMask<T> select_mask(const RowParams& params, const S* logits, int64_t argmax, double entropy,
                        void* workspace) {
  TopKMask<T> mask = {};
  mask.top = key_at(logits + argmax);
  Key<T>* keys = static_cast<Key<T>*>(workspace);
  mask.num_kept = row_num_kept(entropy, params.k_scale, params.k_min, params.k_max);
  mask.selection = select_top(logits, params.columns, mask.num_kept, keys);
  if (mask.selection.threshold == -kInfinityKey<T>) {  // fewer than k logits are finite: keep those
    mask.num_kept = mask.selection.above;
    mask.selection = select_top(logits, params.columns, mask.num_kept, keys);
  }
  mask.tie_weight = static_cast<double>(mask.num_kept - mask.selection.above) /
                    static_cast<double>(mask.selection.equal);
  return mask;
}

// sum w f and sum w p f' over the columns other than the arg-max.
template <typename S, typename Kind, typename T = typename Storage<S>::Arithmetic>
ScedSums sum_topk(BlockReader<S>& block, const TopKMask<T>& mask, T maximum, int64_t argmax,
                  const RowConstants<T>& row, const Exponents& exponents) {
  const Selection<T>& found = mask.selection;
  ScedSums sums;
  if (found.above > (mask.top > found.threshold)) {
    TopKSums<T, Kind> above(maximum, found.threshold, row, exponents);
    sums = found.listed ? above.of_list(found.listed, found.size, mask.top)
                        : above.of_row(block, argmax);
  }
  const int64_t tied = found.equal - (mask.top == found.threshold);
  if (tied > 0) {
    const double y =
        static_cast<double>(value_of<T>(found.threshold)) - static_cast<double>(maximum);
    const double p = exp(y) / row.d, q = 1.0 - p, log_ratio = y - row.c;
    const double tied_weight = mask.tie_weight * static_cast<double>(tied);
    sums.density += tied_weight * sced_density(p, log_ratio, q, exponents);
    sums.slope += tied_weight * p * sced_slope<double>(p, log_ratio, q, exponents) / q;
  }
  return sums;
}

}  // namespace caref::cpu::CAREF_ISA
