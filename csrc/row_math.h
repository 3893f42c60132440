// The row formulas.  Each function is the counterpart of the function with the same name in
// caref_kernels/objective.py, whose docstring has the derivation.  The templates are written once
// for scalars, SIMD vectors (csrc/cpu/lanes.h) and CUDA threads.
#pragma once

#include <cmath>

#include "row_layout.h"

namespace caref {

// A row whose r is below this limit is treated as one-hot: SCED is its limit value and has no
// gradient.  Counterpart of objective.ONE_HOT_RESIDUAL.
CAREF_HD bool is_one_hot(float residual) { return residual < 1e-37f; }
CAREF_HD bool is_one_hot(double residual) { return residual < 1e-290; }

// An exponent split into a whole part and a fraction.  x^whole is a product, accurate to a few
// roundings for any size of the exponent.  Only x^fraction goes through log and exp, and a fraction
// below 1 does not magnify the error of the logarithm.
struct Exponent {
  int whole;
  double fraction;

  CAREF_HD constexpr explicit Exponent(double value)
      : whole(static_cast<int>(value)), fraction(value - static_cast<int>(value)) {}
};

// |x|, sgn(x) and x^fraction for one arithmetic type.  csrc/cpu/lanes.h specialises it for SIMD
// vectors and csrc/cuda/splits.cuh for float on the GPU.
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

// alpha, alpha - 1 and beta, each split into whole part and fraction once per call.
struct Exponents {
  double alpha_value;
  double beta_value;
  Exponent alpha;
  Exponent alpha_minus_one;
  Exponent beta;

  CAREF_HD constexpr Exponents(double a, double b)
      : alpha_value(a), beta_value(b), alpha(a), alpha_minus_one(a - 1.0), beta(b) {}
};

// c = log((1 + r) / V): log(p/U) = y - c.
CAREF_HD double log_ratio_offset(double residual, double vocab_size) {
  return log((1.0 + residual) / vocab_size);
}

// H = log1p(r) - ybar.
CAREF_HD double entropy(double residual, double mean_shift) { return log1p(residual) - mean_shift; }

// The number k of tokens that the top-k mask of a row asks for, from the row's entropy; counterpart
// of sparsity.row_num_kept.  A NaN entropy gives k_min.
CAREF_HD int64_t row_num_kept(double entropy, double k_scale, int64_t k_min, int64_t k_max) {
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

// f' for even alpha = A and integer beta = B.  Because A is even, (p|L|)^(A-1) sgn(L) = (pL)^(A-1),
// and no absolute value or sign is needed.
template <int A, int B, typename V>
CAREF_HD V even_slope(V p, V log_ratio) {
  const V t = p * log_ratio;
  const V q = 1 - p;
  V slope = A * (log_ratio + 1);
  if constexpr (B > 0) slope = slope * q - B * t;
  CAREF_UNROLL
  for (int i = 1; i < A; ++i) slope *= t;
  CAREF_UNROLL
  for (int i = 1; i < B; ++i) slope *= q;
  return slope;
}

CAREF_HD constexpr int binomial(int n, int k) {
  int value = 1;
  for (int i = 0; i < k; ++i) value = value * (n - i) / (i + 1);
  return value;
}

// The moments that make one pass over the row enough for even alpha = A and integer beta = B.  Let
// A_{k,j} be the sum over v != a of e^{k y} y^j, and M_{k,j} the sum of p^k L^j.  The binomial
// theorem gives, without the arg-max column,
//   SCED = sum_b (-1)^b C(B,b)  M_{A+b,A}
//   G    = sum_b (-1)^b C(B,b) [(A+b) M_{A+b,A} + A M_{A+b,A-1}]
// The A_{k,j} do not depend on c, which is known only at the end of the row, so one pass is enough;
// and the sums of two parts of a row can be combined although their maxima differ.
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

  // Moves the sums to a larger maximum: y becomes y + delta with delta <= 0; `e` is e^delta.
  CAREF_HD void shift(double delta, double e) {
    double scale = 1.0;
    for (int k = 1; k < A; ++k) scale *= e;
    for (int b = 0; b <= B; ++b) {
      double* row = sum + b * kPowers;
      scale *= e;
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

  // Adds one element with this y and e^y.
  CAREF_HD void add(double y, double e) {
    double power = 1.0;
    for (int k = 1; k < A; ++k) power *= e;
    for (int b = 0; b <= B; ++b) {
      power *= e;
      double value = power;
      for (int j = 0; j <= A; ++j, value *= y) sum[b * kPowers + j] += value;
    }
  }

  // M_{A+b, j} for p = e * inverse_d and L = y - c.
  CAREF_HD double centred(int b, int j, double c, double inverse_d) const {
    double value = 0.0, c_power = 1.0;
    for (int i = j; i >= 0; --i) {
      value += binomial(j, i) * c_power * sum[b * kPowers + i];
      c_power *= -c;
    }
    for (int k = 0; k < A + b; ++k) value *= inverse_d;
    return value;
  }

  CAREF_HD double sced(double c, double d) const {
    const double inverse_d = 1.0 / d;  // one division, because float64 divisions are slow on a GPU
    double value = 0.0;
    for (int b = 0; b <= B; ++b) {
      value += (b % 2 ? -1.0 : 1.0) * binomial(B, b) * centred(b, A, c, inverse_d);
    }
    return value;
  }

  CAREF_HD double slope_sum(double c, double d) const {
    const double inverse_d = 1.0 / d;
    double value = 0.0;
    for (int b = 0; b <= B; ++b) {
      const double slope =
          (A + b) * centred(b, A, c, inverse_d) + A * centred(b, A - 1, c, inverse_d);
      value += (b % 2 ? -1.0 : 1.0) * binomial(B, b) * slope;
    }
    return value;
  }
};

// The constants that the elements of one row need, computed once per row from its statistics.  Both
// the forward and the backward round c to T here: G must be formed with the same c that the
// elements use, or the gradient of near-uniform rows loses three digits.
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
