// Row formulas, twins by name of caref_kernels/objective.py: see there for the derivation.  Written
// once for scalars, SIMD vectors (csrc/cpu/lanes.h) and CUDA threads.
#pragma once

#include <cmath>

#include "row_layout.h"

namespace caref {

// r below this counts as one-hot: SCED is its limit and has no gradient.  Twin of ONE_HOT_RESIDUAL.
CAREF_HD bool is_one_hot(float residual) { return residual < 1e-37f; }
CAREF_HD bool is_one_hot(double residual) { return residual < 1e-290; }

// An exponent split into whole + fraction: x^whole is exact to a few roundings however large it is,
// and x^fraction, through log and exp, cannot magnify the error of the logarithm.
struct Exponent {
  int whole;
  double fraction;

  CAREF_HD explicit Exponent(double value)
      : whole(static_cast<int>(value)), fraction(value - static_cast<int>(value)) {}
};

// |x|, sgn(x) and x^fraction of a number type; csrc/cpu/lanes.h specialises it for vectors.
template <typename X>
struct Ops;

template <>
struct Ops<double> {
  static CAREF_HD double absolute(double x) { return fabs(x); }
  static CAREF_HD double sign(double x) { return (x > 0.0) - (x < 0.0); }
  static CAREF_HD double fractional_power(double x, double fraction) { return pow(x, fraction); }
};

// x^exponent for x >= 0.
template <typename X>
CAREF_HD X power(X x, Exponent exponent) {
  X result = x * 0 + 1;
  X square = x;
  for (int n = exponent.whole; n > 0; n >>= 1) {
    if (n & 1) result *= square;
    square *= square;
  }
  if (exponent.fraction != 0.0) result *= Ops<X>::fractional_power(x, exponent.fraction);
  return result;
}

// alpha, alpha - 1 and beta, split once per call.
struct Exponents {
  double alpha_value;
  double beta_value;
  Exponent alpha;
  Exponent alpha_minus_one;
  Exponent beta;

  CAREF_HD Exponents(double a, double b)
      : alpha_value(a), beta_value(b), alpha(a), alpha_minus_one(a - 1.0), beta(b) {}
};

// c = log((1 + r) / V): log(p/U) = y - c.
CAREF_HD double log_ratio_offset(double residual, double vocab_size) {
  return log((1.0 + residual) / vocab_size);
}

// H = log1p(r) - ybar.
CAREF_HD double entropy(double residual, double mean_shift) { return log1p(residual) - mean_shift; }

// k of a row: its budget; twin of sparsity.row_support.  NaN gives k_min.
CAREF_HD int64_t row_support(double entropy, double k_scale, int64_t k_min, int64_t k_max) {
  const double wanted = ceil(k_scale * exp(entropy));
  if (!(wanted > static_cast<double>(k_min))) return k_min;
  return wanted < static_cast<double>(k_max) ? static_cast<int64_t>(wanted) : k_max;
}

// f = (p |L|)^alpha q^beta with q = 1 - p.
template <typename X>
CAREF_HD X sced_density(X p, X log_ratio, X q, const Exponents& exponents) {
  const X density = power(p * Ops<X>::absolute(log_ratio), exponents.alpha);
  return exponents.beta_value == 0.0 ? density : density * power(q, exponents.beta);
}

// q f' = (p|L|)^(alpha-1) q^beta [alpha sgn(L) (L+1) q - beta p |L|]
template <typename T, typename X>
CAREF_HD X sced_slope(X p, X log_ratio, X q, const Exponents& exponents) {
  const X t = p * Ops<X>::absolute(log_ratio);
  X slope = static_cast<T>(exponents.alpha_value) * Ops<X>::sign(log_ratio) * (log_ratio + 1) * q -
            static_cast<T>(exponents.beta_value) * t;
  slope *= power(t, exponents.alpha_minus_one);
  return exponents.beta_value == 0.0 ? slope : slope * power(q, exponents.beta);
}

CAREF_HD constexpr int binomial(int n, int k) {
  int value = 1;
  for (int i = 0; i < k; ++i) value = value * (n - i) / (i + 1);
  return value;
}

// One pass over the row for even alpha = A and integer beta = B.  With A_{k,j} the sum over v != a
// of e^{k y} y^j, and M_{k,j} that of p^k L^j, the binomial theorem gives
//   SCED  = sum_b (-1)^b C(B,b)   M_{A+b,A}                               (without the arg-max
//   column) G     = sum_b (-1)^b C(B,b) [(A+b) M_{A+b,A} + A M_{A+b,A-1}]
// The sums do not depend on c, so one pass suffices, and they merge under a change of the maximum.
template <int A, int B>
struct Moments {
  static constexpr int kAlpha = A;
  static constexpr int kBeta = B;
  static constexpr int kPowers = A + 1;             // j = 0 .. A
  static constexpr int kCount = (B + 1) * kPowers;  // k = A .. A + B
  double sum[kCount];

  CAREF_HD void clear() {
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0;
  }

  // The maximum rises: y becomes y + delta, delta <= 0.
  CAREF_HD void shift(double delta) {
    for (int b = 0; b <= B; ++b) {
      double* row = sum + b * kPowers;
      const double scale = exp((A + b) * delta);
      for (int j = A; j > 0; --j) {
        double value = 0.0, delta_power = 1.0;
        for (int i = j; i >= 0; --i) {
          value += binomial(j, i) * delta_power * row[i];
          delta_power *= delta;
        }
        row[j] = value * scale;
      }
      row[0] *= scale;
    }
  }

  // One more element with this y.
  CAREF_HD void add(double y) {
    for (int b = 0; b <= B; ++b) {
      double value = exp((A + b) * y);
      for (int j = 0; j <= A; ++j, value *= y) sum[b * kPowers + j] += value;
    }
  }

  // M_{A+b, j} for p = e / d and L = y - c.
  CAREF_HD double centred(int b, int j, double c, double d) const {
    double value = 0.0, c_power = 1.0;
    for (int i = j; i >= 0; --i) {
      value += binomial(j, i) * c_power * sum[b * kPowers + i];
      c_power *= -c;
    }
    double scale = 1.0;
    for (int k = 0; k < A + b; ++k) scale /= d;
    return value * scale;
  }

  CAREF_HD double sced(double c, double d) const {
    double value = 0.0;
    for (int b = 0; b <= B; ++b) {
      value += (b % 2 ? -1.0 : 1.0) * binomial(B, b) * centred(b, A, c, d);
    }
    return value;
  }

  CAREF_HD double slope_sum(double c, double d) const {
    double value = 0.0;
    for (int b = 0; b <= B; ++b) {
      const double slope = (A + b) * centred(b, A, c, d) + A * centred(b, A - 1, c, d);
      value += (b % 2 ? -1.0 : 1.0) * binomial(B, b) * slope;
    }
    return value;
  }
};

// What one row's backward needs in registers, made once per row from its statistics.  c is rounded
// to T here, in the forward and in the backward alike: G must belong to the c that the elements
// use, or near-uniform rows lose three digits of their gradient.
template <typename T>
struct RowConstants {
  double residual;
  double d;
  double c;
  double p_top;
  double q_top;

  CAREF_HD RowConstants(T stored_residual, double vocab_size)
      : residual(stored_residual),
        d(1.0 + residual),
        c(static_cast<T>(log_ratio_offset(residual, vocab_size))),
        p_top(1.0 / d),
        q_top(residual / d) {}
};

}  // namespace caref
