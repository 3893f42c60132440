// The gradient of rows: one read, one write.  p is computed again from the logits; the three term
// gradients are scaled by the row's incoming gradient and added in T, and rounded once.
#include "kernels.h"
#include "rows.h"
#include "select.h"

namespace caref::cpu::CAREF_ISA {
namespace {

// The incoming gradients of one row and the constants that follow from its statistics.
template <typename T>
struct RowBackward {
  T maximum;
  int64_t argmax;
  RowConstants<T> constants;
  double mean_shift;
  double slope_sum;
  double grad_ce, grad_sced, grad_kl;
  double top_slope = 0.0;  // q_a p_a w_a f'_a
  Key<T> threshold = -kInfinityKey<T>;
  double tie_weight = 1.0;

  RowBackward(const RowParams& params, int64_t row, const Target& target,
              const Exponents& exponents)
      : RowBackward(static_cast<const T*>(params.stats) + row * params.num_statistics(),
                    static_cast<const T*>(params.grad_terms) + row * params.grad_row_stride,
                    params.grad_term_stride, static_cast<double>(params.vocab_size)) {
    if (!target.has_label) grad_ce = 0.0;
    if (params.is_masked()) {
      const T* stats = static_cast<const T*>(params.stats) + row * params.num_statistics();
      threshold = key_at(stats + kThreshold);
      tie_weight = static_cast<double>(stats[kTieWeight]);
    }
    if (!params.with_sced || is_one_hot(static_cast<T>(constants.residual))) {
      grad_sced = 0.0;
    } else {
      top_slope = constants.p_top *
                  sced_slope<double>(constants.p_top, -constants.c, constants.q_top, exponents);
    }
  }

  // Statistics are data: a row whose arg-max is no column, or whose residual is NaN, becomes NaN.
  bool is_usable(int64_t columns) const {
    return !std::isnan(constants.residual) && argmax >= 0 && argmax < columns;
  }

  // w of the column with this key.
  double weight(Key<T> key) const {
    return key > threshold ? 1.0 : key == threshold ? tie_weight : 0.0;
  }

  // The gradient of column `column`, whose shift is `raw_shift` and whose place in the mask is
  // `weight`, in double.
  double one(int64_t column, double raw_shift, double weight, const Target& target,
             const Exponents& exponents) const {
    const bool is_top = column == argmax, is_label = target.has_label && column == target.label;
    const bool is_empty = raw_shift < -700.0;  // e^y is 0 there, and y may be -inf
    const double y = is_empty ? -700.0 : raw_shift;
    const double e = is_top ? 1.0 : is_empty ? 0.0 : exp(y);
    const double p = e / constants.d, q = is_top ? constants.q_top : 1.0 - p;
    double sced = 0.0;
    if (grad_sced != 0.0) {
      const double own =
          is_top ? top_slope
                 : weight * p * sced_slope<double>(p, y - constants.c, q, exponents) / q;
      sced = own - p * slope_sum - (is_top ? 0.0 : e / constants.residual * top_slope);
    }
    return grad_ce * (is_label ? -q : p) + grad_sced * sced + grad_kl * p * (y - mean_shift);
  }

 private:
  RowBackward(const T* stats, const T* grads, int64_t stride, double vocab_size)
      : maximum(stats[kMaximum]),
        argmax(stats[kArgmax] >= 0 && stats[kArgmax] < T(1 << 24)
                   ? static_cast<int64_t>(stats[kArgmax])
                   : -1),
        constants(stats[kResidual], vocab_size),
        mean_shift(stats[kMeanShift]),
        slope_sum(stats[kSlopeSum]),
        grad_ce(grads[kCe * stride]),
        grad_sced(grads[kSced * stride]),
        grad_kl(grads[kKl * stride]) {}
};

// The gradient of every column but the arg-max and the label, which the caller writes again.
// p (C + grad_kl y + grad_sced f') with the constants of the row in C.
template <typename S, typename T, typename Kind>
struct ColumnGradient {
  T maximum, inverse_d, c, constant, kl, sced;
  T share,
      top_slope;  // grad_sced * q_a p_a f'_a * e / r, kept apart where the product could overflow
  Key<T> threshold;
  T tied_sced;  // grad_sced times the weight of a column at the threshold
  const Exponents& exponents;

  ColumnGradient(const RowBackward<T>& row, const Exponents& all)
      : maximum(row.maximum),
        inverse_d(static_cast<T>(row.constants.p_top)),
        c(static_cast<T>(row.constants.c)),
        kl(static_cast<T>(row.grad_kl)),
        sced(static_cast<T>(row.grad_sced)),
        share(0),
        top_slope(0),
        threshold(row.threshold),
        tied_sced(static_cast<T>(row.grad_sced * row.tie_weight)),
        exponents(all) {
    double sum = row.grad_sced == 0.0 ? 0.0 : row.slope_sum;
    if (Kind::kSced && row.grad_sced != 0.0) {
      if (Kind::kOnePass) {
        sum += row.top_slope / row.constants.q_top;  // beta is an integer: p_a f'_a is finite
      } else {
        share = static_cast<T>(1.0 / row.constants.residual);
        top_slope = static_cast<T>(row.grad_sced * row.top_slope);
      }
    }
    constant = static_cast<T>(row.grad_ce - row.grad_sced * sum - row.grad_kl * row.mean_shift);
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
      return p * inner - e * share * top_slope;
    }
    return p * inner;
  }

  // grad_sced w.
  CAREF_HD auto weight(Vec<T> x) const {
    if constexpr (kIsMasked<Kind>) {
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

// Hardware prefetchers stop at the end of a page; a row is many.
template <typename S>
CAREF_HD void fetch_ahead(const S* place) {
  constexpr uintptr_t kBytesAhead = 2048;
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(place) + kBytesAhead));
}

template <typename S, typename Kind>
void backward_row(const S* logits, S* out, int64_t columns,
                  RowBackward<typename Storage<S>::Arithmetic>& row, const Target& target,
                  const Exponents& exponents) {
  using T = typename Storage<S>::Arithmetic;
  constexpr int kLanes = Lanes<T>::kCount;
  const double maximum = static_cast<double>(row.maximum);
  row.top_slope *= row.weight(key_at(logits + row.argmax));
  // The two columns that need their own form, before the row may be overwritten in place.
  const double top = row.one(row.argmax, 0.0, 1.0, target, exponents);
  const double label =
      target.has_label
          ? row.one(target.label, static_cast<double>(load_one(logits + target.label)) - maximum,
                    row.weight(key_at(logits + target.label)), target, exponents)
          : 0.0;
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
  if (target.has_label) store_one(out + target.label, label);
}

template <typename S, typename Kind>
void backward_rows(const RowParams& params, int64_t begin, int64_t end) {
  using T = typename Storage<S>::Arithmetic;
  const Exponents exponents(params.alpha, params.beta);
  for (int64_t i = begin; i < end; ++i) {
    const S* logits = static_cast<const S*>(params.logits) + params.logits_offset(i);
    S* out = static_cast<S*>(params.grad_logits) + params.out_offset(i);
    const Target target = target_of(params, i);
    if (!target.counts) {
      fill_row(out, params.columns, 0.0);
      continue;
    }
    RowBackward<T> row(params, i, target, exponents);
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
