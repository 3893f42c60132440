// The arithmetic that is done once per row, in double, for the CPU and the GPU alike: from the sums
// of a row to the stored terms and statistics, and from the stored statistics to the constants of
// the gradient.
#pragma once

#include "row_kinds.h"

namespace caref {

constexpr double kInfinity = __builtin_huge_val();
constexpr double kNan = __builtin_nan("");

// The result of the first pass over a row: its maximum, the first column that holds it, and the
// sums relative to that maximum.
struct RowSums {
  double maximum;
  int64_t argmax;
  double residual;
  double first_moment;
  double mean_of_shifts = 0.0;  // if the terms have it
};

// Terms and statistics of one row.  The constructor fills them in; if needs_sced() is true the
// caller must call add_sced() as well.
template <typename T>
class RowResult {
 public:
  // Fills every term and statistic with one value: 0 for a row that is not valid, NaN for a row
  // whose label is out of range.
  CAREF_HD explicit RowResult(double value) : sums_{}, constants_(T(0), 1.0) {
    for (double& term : terms_) term = value;
    for (double& statistic : stats_) statistic = value;
  }

  CAREF_HD RowResult(const RowParams& params, const Target& target, const Exponents& exponents,
                     const RowSums& sums, double label_logit)
      : sums_(sums), constants_(static_cast<T>(sums.residual), vocabulary(params)) {
    terms_[kMeanOfShifts] = sums.mean_of_shifts;
    stats_[kMaximum] = sums.maximum;
    stats_[kArgmax] = static_cast<double>(sums.argmax);
    const bool has_maximum = sums.maximum > -kInfinity && sums.maximum < kInfinity;
    if (!has_maximum || sums.residual != sums.residual) {
      stats_[kResidual] = stats_[kMeanShift] = stats_[kSlopeSum] = kNan;
      terms_[kCe] = target.has_label ? kNan : 0.0;
      terms_[kSced] = params.with_sced ? kNan : 0.0;
      terms_[kKl] = kNan;
      return;
    }
    c_ = log_ratio_offset(sums.residual, vocabulary(params));
    stats_[kResidual] = sums.residual;
    stats_[kMeanShift] = sums.first_moment / d();
    terms_[kKl] = stats_[kMeanShift] - c_;
    if (target.has_label) terms_[kCe] = log1p(sums.residual) - (label_logit - sums.maximum);
    if (!params.with_sced) return;
    needs_sced_ = !is_one_hot(static_cast<T>(sums.residual));
    if (!needs_sced_ && exponents.beta_value == 0.0) {
      terms_[kSced] = power(Ops<double>::absolute(c_), exponents.alpha);
    }
  }

  CAREF_HD bool needs_sced() const { return needs_sced_; }
  // Whether the row has no softmax (NaN, +inf, or only -inf).
  CAREF_HD bool is_nan() const { return stats_[kResidual] != stats_[kResidual]; }
  CAREF_HD double entropy() const { return caref::entropy(sums_.residual, stats_[kMeanShift]); }
  // The constants of the elements, from the residual as it is stored.  The second pass and the
  // backward use the same ones.
  CAREF_HD const RowConstants<T>& constants() const { return constants_; }

  // `density` is sum f and `slope` is sum p f', both without the arg-max column.  `top_weight` is
  // the weight of that column in the top-k mask.
  CAREF_HD void add_sced(double density, double slope, const Exponents& exponents,
                         double top_weight = 1.0) {
    const double top = sced_density(1.0 / d(), -c_, sums_.residual / d(), exponents);
    terms_[kSced] = density + top_weight * top;
    stats_[kSlopeSum] = slope;
  }
  template <int A, int B>
  CAREF_HD void add_sced(const Moments<A, B>& moments, const Exponents& exponents) {
    add_sced(moments.sced(c_, d()), moments.slope_sum(constants_.c, constants_.d), exponents);
  }

  CAREF_HD void write(const RowParams& params, int64_t row) const {
    T* terms_out = static_cast<T*>(params.terms) + row * params.num_terms();
    T* stats_out = static_cast<T*>(params.stats) + row * params.num_statistics();
    for (int i = 0; i < kNumTerms; ++i) terms_out[i] = static_cast<T>(terms_[i]);
    if (params.with_mean_of_shifts)
      terms_out[kMeanOfShifts] = static_cast<T>(terms_[kMeanOfShifts]);
    for (int i = 0; i < kNumStatistics; ++i) stats_out[i] = static_cast<T>(stats_[i]);
    // A row without a softmax, or one that is not valid, has no top-k mask: its additional
    // statistics are NaN or 0 like the residual.
    for (int i = kNumStatistics; i < params.num_statistics(); ++i)
      stats_out[i] = static_cast<T>(stats_[kResidual]);
  }

 private:
  static CAREF_HD double vocabulary(const RowParams& params) {
    return static_cast<double>(params.vocab_size);
  }
  CAREF_HD double d() const { return 1.0 + sums_.residual; }

  RowSums sums_;
  RowConstants<T> constants_;
  double c_ = 0.0;
  bool needs_sced_ = false;
  double terms_[kNumTerms + 1] = {};
  double stats_[kNumStatistics] = {};
};

// The incoming gradients of one row and the constants that follow from its statistics.
template <typename T>
struct RowBackward {
  T maximum;
  int64_t argmax;
  RowConstants<T> constants;
  double mean_shift;
  double slope_sum;
  double grad_ce, grad_sced, grad_kl;
  double factor = 0.0;     // of p_v, besides what follows from the three gradients
  double constant = 0.0;   // of every column
  double top_slope = 0.0;  // q_a p_a f'_a

  CAREF_HD RowBackward(const RowParams& params, int64_t row, const Target& target,
                       const Exponents& exponents)
      : RowBackward(static_cast<const T*>(params.stats) + row * params.num_statistics(),
                    static_cast<const T*>(params.grad_terms) + row * params.grad_row_stride,
                    params.grad_term_stride, static_cast<double>(params.vocab_size)) {
    if (!target.has_label) grad_ce = 0.0;
    if (params.has_column_grads) {
      const T* grads = static_cast<const T*>(params.grad_terms) + row * params.grad_row_stride;
      factor = grads[kFactor * params.grad_term_stride];
      constant = grads[kConstant * params.grad_term_stride];
    }
    if (!params.with_sced || is_one_hot(static_cast<T>(constants.residual))) {
      grad_sced = 0.0;
    } else {
      top_slope = constants.p_top *
                  sced_slope<double>(constants.p_top, -constants.c, constants.q_top, exponents);
    }
  }

  // The statistics come from the caller and are not trusted: if the arg-max is out of range or the
  // residual is NaN, the gradient of the row becomes NaN.
  CAREF_HD bool is_usable(int64_t columns) const {
    return constants.residual == constants.residual && argmax >= 0 && argmax < columns;
  }

  // The gradient of the arg-max column.  The slope of CE is p_a, or p_a - 1 = -q_a if the arg-max
  // is the label.
  CAREF_HD double top(const Target& target) const {
    const bool is_label = target.has_label && target.label == argmax;
    const double ce = is_label ? -constants.q_top : constants.p_top;
    const double sced = top_slope - constants.p_top * slope_sum;
    return grad_ce * ce + grad_sced * sced - grad_kl * constants.p_top * mean_shift +
           factor * constants.p_top + constant;
  }

  // The gradient of the label column when it is not the arg-max.  `raw_shift` is its y before the
  // clamp and `weight` its weight in the top-k mask.
  CAREF_HD double label(double raw_shift, double weight, const Exponents& exponents) const {
    const bool is_empty = raw_shift < -700.0;  // e^y is 0 there, and y may be -inf
    const double y = is_empty ? -700.0 : raw_shift;
    const double e = is_empty ? 0.0 : exp(y);
    const double p = e / constants.d, q = 1.0 - p;
    double sced = 0.0;
    if (grad_sced != 0.0) {
      const double own = weight * p * sced_slope<double>(p, y - constants.c, q, exponents) / q;
      sced = own - p * slope_sum - e / constants.residual * top_slope;
    }
    return -grad_ce * q + grad_sced * sced + grad_kl * p * (y - mean_shift) + factor * p + constant;
  }

 private:
  CAREF_HD RowBackward(const T* stats, const T* grads, int64_t stride, double vocab_size)
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

}  // namespace caref
