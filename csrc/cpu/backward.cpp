// The gradient of rows, with one read and one write of each element.  p is recomputed from the
// logits; the gradients of the three terms are scaled by the row's incoming gradient, added in T,
// and rounded once.
#include "kernels.h"
#include "rows.h"
#include "select.h"

namespace caref::cpu::CAREF_ISA {
namespace {

// A row with its top-k mask; without a mask every weight is 1.
template <typename T>
struct TopKRow : RowBackward<T> {
  Key<T> threshold = -kInfinityKey<T>;
  double tie_weight = 1.0;

  TopKRow(const RowParams& params, int64_t row, const Target& target, const Exponents& exponents)
      : RowBackward<T>(params, row, target, exponents) {
    if (!params.has_topk_mask()) return;
    const T* stats = static_cast<const T*>(params.stats) + row * params.num_statistics();
    threshold = key_at(stats + kThreshold);
    tie_weight = static_cast<double>(stats[kTieWeight]);
  }

  // w of the column with this key.
  double weight(Key<T> key) const {
    return key > threshold ? 1.0 : key == threshold ? tie_weight : 0.0;
  }
};

// The gradient p (C + grad_kl y + grad_sced f') + K of a column, where C holds the constants of the
// row, and K is 0 without label smoothing. It does not hold for the arg-max and the label columns,
// which the caller overwrites.
template <typename S, typename T, typename Kind>
struct ColumnGradient {
  T maximum, inverse_d, c, constant, kl, sced, everywhere;
  // grad_sced q_a p_a f'_a e / r is formed from two factors, because 1 / r times the rest could
  // overflow.
  T inverse_residual, top_slope;
  Key<T> threshold;
  T tied_sced;  // grad_sced times the weight of a column that equals the threshold
  const Exponents& exponents;

  ColumnGradient(const TopKRow<T>& row, const Exponents& all)
      : maximum(row.maximum),
        inverse_d(static_cast<T>(row.constants.p_top)),
        c(static_cast<T>(row.constants.c)),
        kl(static_cast<T>(row.grad_kl)),
        sced(static_cast<T>(row.grad_sced)),
        everywhere(static_cast<T>(row.constant)),
        inverse_residual(0),
        top_slope(0),
        threshold(row.threshold),
        tied_sced(static_cast<T>(row.grad_sced * row.tie_weight)),
        exponents(all) {
    double sum = row.grad_sced == 0.0 ? 0.0 : row.slope_sum;
    if (Kind::kSced && row.grad_sced != 0.0) {
      if (Kind::kOnePass) {
        sum += row.top_slope / row.constants.q_top;  // beta is an integer: p_a f'_a is finite
      } else {
        inverse_residual = static_cast<T>(1.0 / row.constants.residual);
        top_slope = static_cast<T>(row.grad_sced * row.top_slope);
      }
    }
    constant = static_cast<T>(row.grad_ce + row.factor - row.grad_sced * sum -
                              row.grad_kl * row.mean_shift);
  }

  CAREF_HD Vec<T> operator()(Vec<T> x) const {
    const Vec<T> y = clamp_shift<T>(x - maximum);
    const Vec<T> e = exponential<T>(y);
    const Vec<T> p = e * inverse_d;
    Vec<T> inner = kl * y + constant;
    if constexpr (Kind::kOnePass) {
      inner += weight(x) * even_slope<Kind::Sums::kAlpha, Kind::Sums::kBeta>(p, y - c);
    } else if constexpr (Kind::kSced) {
      const Vec<T> q = 1 - p;
      inner += weight(x) * (sced_slope<T>(p, y - c, q, exponents) / q);
      return p * inner - e * inverse_residual * top_slope + everywhere;
    }
    return p * inner + everywhere;
  }

  // grad_sced w.
  CAREF_HD auto weight(Vec<T> x) const {
    if constexpr (kIsTopKMasked<Kind>) {
      const Keys<T> keys = keys_of<T>(x);
      const Vec<T> tied = keys == threshold ? splat<T>(tied_sced) : Vec<T>{};
      return keys > threshold ? splat<T>(sced) : tied;
    } else {
      return sced;
    }
  }
};

template <typename S>
void fill_row(S* out, int64_t columns, double value) {
  S element;
  store_one(&element, value);
  for (int64_t i = 0; i < columns; ++i) out[i] = element;
}

// Hardware prefetchers stop at the end of a page, and a row spans many pages.
template <typename S>
CAREF_HD void fetch_ahead(const S* place) {
  constexpr uintptr_t kBytesAhead = 2048;
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(place) + kBytesAhead));
}

template <typename S, typename Kind>
void backward_row(const S* logits, S* out, int64_t columns,
                  TopKRow<typename Storage<S>::Arithmetic>& row, const Target& target,
                  const Exponents& exponents) {
  using T = typename Storage<S>::Arithmetic;
  constexpr int kLanes = Lanes<T>::kCount;
  if constexpr (kIsTopKMasked<Kind>) row.top_slope *= row.weight(key_at(logits + row.argmax));
  // The two columns with their own formula are computed before the row may be overwritten in place.
  const double top = row.top(target);
  const bool has_label_column = target.has_label && target.label != row.argmax;
  double label = 0.0;
  if (has_label_column) {
    const S* place = logits + target.label;
    const double weight = kIsTopKMasked<Kind> ? row.weight(key_at(place)) : 1.0;
    const double raw_shift =
        static_cast<double>(load_one(place)) - static_cast<double>(row.maximum);
    label = row.label(raw_shift, weight, exponents);
  }
  const ColumnGradient<S, T, Kind> gradient(row, exponents);
  const int64_t whole = columns - columns % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    fetch_ahead(logits + i);
    fetch_ahead(out + i);
    store(out + i, gradient(load(logits + i)));
  }
  if (whole < columns) {
    const size_t tail = static_cast<size_t>(columns - whole) * sizeof(S);
    S lanes[kLanes] = {};
    memcpy(lanes, logits + whole, tail);
    store(lanes, gradient(load(lanes)));
    memcpy(out + whole, lanes, tail);
  }
  store_one(out + row.argmax, top);
  if (has_label_column) store_one(out + target.label, label);
}

template <typename S, typename Kind>
void backward_rows(const RowParams& params, int64_t begin, int64_t end) {
  using T = typename Storage<S>::Arithmetic;
  const Exponents exponents(params.alpha, params.beta);
  for (int64_t i = begin; i < end; ++i) {
    const S* logits = static_cast<const S*>(params.logits) + params.logits_offset(i);
    S* out = static_cast<S*>(params.grad_logits) + params.out_offset(i);
    const Target target = target_of(params, i);
    if (!target.is_valid) {
      fill_row(out, params.columns, 0.0);
      continue;
    }
    TopKRow<T> row(params, i, target, exponents);
    if (!row.is_usable(params.columns)) {
      fill_row(out, params.columns, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    backward_row<S, Kind>(logits, out, params.columns, row, target, exponents);
  }
}

}  // namespace

void backward(const RowParams& params, int64_t begin, int64_t end, void*) {
  visit_storage(params.logits_dtype, [&](auto storage) {
    visit_kind(params, [&](auto kind) {
      backward_rows<decltype(storage), decltype(kind)>(params, begin, end);
    });
  });
}

}  // namespace caref::cpu::CAREF_ISA
