// The gradient of rows: one read, one write.  p is computed again from the logits; the three term
// gradients are scaled by the row's incoming gradient and added in T, and rounded once.
#include "kernels.h"
#include "rows.h"

namespace caref::cpu::CAREF_ISA {
namespace {

// The gradient of every column but the arg-max and the label, which the caller writes again.
// p (C + grad_kl y + grad_sced f') with the constants of the row in C.
template <typename S, typename T, typename Kind>
struct ColumnGradient {
  T maximum, inverse_d, c, constant, kl, sced;
  T share,
      top_slope;  // grad_sced * q_a p_a f'_a * e / r, kept apart where the product could overflow
  const Exponents& exponents;

  ColumnGradient(const RowBackward<T>& row, const Exponents& all)
      : maximum(row.maximum),
        inverse_d(static_cast<T>(row.constants.p_top)),
        c(static_cast<T>(row.constants.c)),
        kl(static_cast<T>(row.grad_kl)),
        sced(static_cast<T>(row.grad_sced)),
        share(0),
        top_slope(0),
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
      inner += sced * even_slope<Kind::Sums::kAlpha, Kind::Sums::kBeta>(p, y - c);
    } else if constexpr (Kind::kSced) {
      const Vec<T> q = 1 - p;
      inner += sced * (sced_slope<T>(p, y - c, q, exponents) / q);
      return p * inner - e * share * top_slope;
    }
    return p * inner;
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
                  const RowBackward<typename Storage<S>::Arithmetic>& row, const Target& target,
                  const Exponents& exponents) {
  using T = typename Storage<S>::Arithmetic;
  constexpr int kLanes = Lanes<T>::kCount;
  const double top = row.top(target);
  const bool is_apart = target.has_label && target.label != row.argmax;
  const double label = is_apart ? row.label(static_cast<double>(load_one(logits + target.label)) -
                                                static_cast<double>(row.maximum),
                                            exponents)
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
  if (is_apart) store_one(out + target.label, label);
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
    const RowBackward<T> row(params, i, target, exponents);
    if (!row.is_usable(params.columns)) {
      fill_row(out, params.columns, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    backward_row<S, Kind>(logits, out, params.columns, row, target, exponents);
  }
}

}  // namespace

void backward(const RowParams& params, int64_t begin, int64_t end) {
  visit_storage(params.logits_dtype, [&](auto storage) {
    visit_exponents(params, [&](auto kind) {
      backward_rows<decltype(storage), decltype(kind)>(params, begin, end);
    });
  });
}

}  // namespace caref::cpu::CAREF_ISA
