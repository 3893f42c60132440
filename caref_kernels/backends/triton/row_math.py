"""The row formulas, counterparts by name of those in caref_kernels/objective.py, which has the derivation.

csrc/row_math.h has the same formulas in C++.  Elements are float32 (float64 for float64 logits); what is computed once
per row is float64.  Exponents are compile-time constants.  No formula relies on a maximum to propagate NaN, because the
compiled maximum drops it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Counterpart of objective.SHIFT_FLOOR.
SHIFT_FLOOR = tl.constexpr(-1.0e4)
BINOMIAL = tl.constexpr(((1,), (1, 1), (1, 2, 1), (1, 3, 3, 1), (1, 4, 6, 4, 1)))


@triton.jit
def clamp_shift(y):
    """y, at least SHIFT_FLOOR; NaN stays NaN."""
    return tl.maximum(y, SHIFT_FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponential(y):
    """e^y; in float32 these are two instructions, a product and ex2."""
    if y.dtype == tl.float64:
        return tl.exp(y)
    else:
        return tl.exp2(y * LOG2E)


@triton.jit
def whole_power(x, N: tl.constexpr):
    """x^N by repeated squaring; 1 for N = 0."""
    if N == 0:
        return x * 0 + 1
    elif N == 1:
        return x
    else:
        half = whole_power(x, N // 2)
        if N % 2 == 0:
            return half * half
        else:
            return half * half * x


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT for x >= 0.

    The whole part of the exponent is a product, accurate to a few roundings.  Only the fraction takes a logarithm, and
    a factor below 1 does not magnify the logarithm's error.
    """
    WHOLE: tl.constexpr = EXPONENT // 1
    FRACTION: tl.constexpr = EXPONENT - WHOLE
    result = whole_power(x, WHOLE)
    if FRACTION != 0:
        if x.dtype == tl.float64:
            result *= tl.exp(FRACTION * tl.log(x))
        else:
            result *= tl.exp2(FRACTION * tl.log2(x))
    return result


@triton.jit
def log1p(x):
    """log(1 + x) of a float64 x >= 0, accurate to a few roundings."""
    d = 1.0 + x
    added = d - 1.0
    exact = added == 0.0
    return tl.where(exact, x, tl.log(d) * (x / tl.where(exact, 1.0, added)))


@triton.jit
def log_ratio_offset(residual, vocab_size):
    """c = log((1 + r) / V), float64, so that log(p/U) = y - c."""
    return tl.log((1.0 + residual) / vocab_size)


@triton.jit
def is_one_hot(residual):
    """Counterpart of objective.one_hot_rows; ``residual`` has the dtype of the stored statistics."""
    if residual.dtype == tl.float64:
        return residual < 1e-290
    else:
        return residual < 1e-37


@triton.jit
def sced_density(p, log_ratio, q, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """f = (p |L|)^alpha q^beta with q = 1 - p."""
    density = power(p * tl.abs(log_ratio), ALPHA)
    if BETA != 0:
        density *= power(q, BETA)
    return density


@triton.jit
def sced_slope(p, log_ratio, q, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """q f' = (p|L|)^(alpha-1) q^beta [alpha sgn(L) (L+1) q - beta p |L|]."""
    t = p * tl.abs(log_ratio)
    sign = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio < 0, -1.0, 0.0)).to(p.dtype)
    slope = ALPHA * sign * (log_ratio + 1) * q - BETA * t
    if ALPHA != 1:
        slope *= power(t, ALPHA - 1)
    if BETA != 0:
        slope *= power(q, BETA)
    return slope


@triton.jit
def even_slope(p, log_ratio, scale, A: tl.constexpr, B: tl.constexpr):
    """scale * f' for even alpha = A and integer beta = B, for which (p|L|)^(A-1) sgn(L) = (pL)^(A-1).

    f' = (pL)^(A-1) q^(B-1) [L (A - (A+B) p) + A q].  ``scale`` is a factor of the bracket, which then takes three
    multiply-adds.
    """
    leading = scale * A
    if B == 0:
        return (log_ratio * leading + leading) * whole_power(p * log_ratio, A - 1)
    else:
        bracket = log_ratio * (leading - p * (scale * (A + B))) + (leading - p * leading)
        if B > 1:
            bracket *= whole_power(1 - p, B - 1)
        return bracket * whole_power(p * log_ratio, A - 1)


@triton.jit
def topk_weight(z, threshold, tie_weight):
    """The weight of a column in the top-k mask: 1 above the threshold, ``tie_weight`` at it, 0 below."""
    return tl.where(z > threshold, 1.0, tl.where(z == threshold, tie_weight, 0.0)).to(z.dtype)


@triton.jit
def row_num_kept(entropy, k_scale, k_min, k_max):
    """The k of a row as int32, from its entropy in float64; counterpart of sparsity.row_num_kept.  NaN gives k_min."""
    wanted = tl.ceil(k_scale * tl.exp(entropy))
    wanted = tl.where(wanted >= k_min, tl.where(wanted <= k_max, wanted, k_max.to(tl.float64)), k_min.to(tl.float64))
    return wanted.to(tl.int32)


@triton.jit
def monomial(e, u, D: tl.constexpr, J: tl.constexpr):
    """e^(D-J) u^J as a product of two halves, so that the compiler shares halves among different D and J."""
    if D == 1:
        if J == 0:
            return e
        else:
            return u
    else:
        LOW: tl.constexpr = D // 2
        LOW_J: tl.constexpr = LOW if J > LOW else J
        return monomial(e, u, LOW, LOW_J) * monomial(e, u, D - LOW, J - LOW_J)


# The sums of a row are a tuple: sum e^y, sum e^y y and, for even alpha = A and integer beta = B, the moments
# A_{k,j} = sum e^{ky} y^j for k = A .. A+B and j = 0 .. A, j fastest.  They do not depend on c, and sums relative to
# different maxima can be combined.


@triton.jit
def zero_sums(zero, VARIANT: tl.constexpr):
    """Empty sums of the shape and dtype of ``zero``."""
    MOMENTS: tl.constexpr = VARIANT.moments
    sums = (zero, zero)
    for _ in tl.static_range(MOMENTS):
        sums = sums + (zero,)
    return sums


@triton.jit
def add_columns(sums, y, VARIANT: tl.constexpr):
    """Add one column with shift y to the sums of every thread and lane."""
    e = exponential(y)
    u = e * y
    added = (sums[0] + e, sums[1] + u)
    if VARIANT.one_pass:
        for b in tl.static_range(VARIANT.beta + 1):
            for j in tl.static_range(VARIANT.alpha + 1):
                moment = monomial(e, u, VARIANT.alpha + b, j)
                added = added + (sums[2 + b * (VARIANT.alpha + 1) + j] + moment,)
    return added


@triton.jit
def add_top(sums, one, VARIANT: tl.constexpr):
    """Add a column with y = 0 to the sums, ``one`` times (0 or 1)."""
    added = (sums[0] + one, sums[1])
    if VARIANT.one_pass:
        for b in tl.static_range(VARIANT.beta + 1):
            for j in tl.static_range(VARIANT.alpha + 1):
                if j == 0:
                    added = added + (sums[2 + b * (VARIANT.alpha + 1)] + one,)
                else:
                    added = added + (sums[2 + b * (VARIANT.alpha + 1) + j],)
    return added


@triton.jit
def moment_about(sums, FIRST: tl.constexpr, J: tl.constexpr, offset):
    """sum_i C(J,i) offset^(J-i) A_i: the J-th moment of y + offset, from those of y at sums[FIRST...]."""
    value = sums[FIRST]
    for i in tl.static_range(1, J + 1):
        value = value * offset + BINOMIAL[J][i] * sums[FIRST + i]
    return value


@triton.jit
def shift_sums(sums, delta, VARIANT: tl.constexpr):
    """Move the sums to a larger maximum: y becomes y + delta, with delta <= 0 in float64."""
    dtype = sums[0].dtype
    step = delta.to(dtype)
    # In float64, because a row whose maxima rise is shifted once per tile, and the rounding errors would accumulate.
    scale = tl.exp(delta)
    power_of_scale = scale
    once = scale.to(dtype)
    shifted = (sums[0] * once, (sums[1] + sums[0] * step) * once)
    if VARIANT.one_pass:
        for _ in tl.static_range(VARIANT.alpha - 1):
            power_of_scale = power_of_scale * scale
        for b in tl.static_range(VARIANT.beta + 1):
            factor = power_of_scale.to(dtype)
            for j in tl.static_range(VARIANT.alpha + 1):
                shifted = shifted + (moment_about(sums, 2 + b * (VARIANT.alpha + 1), j, step) * factor,)
            power_of_scale = power_of_scale * scale
    return shifted


@triton.jit
def rise(old, new):
    """old - new for maxima old <= new, in float64, at least SHIFT_FLOOR; 0 if there was no maximum (-inf)."""
    delta = tl.where(old > float("-inf"), old.to(tl.float64) - new.to(tl.float64), 0.0)
    return tl.where(delta < SHIFT_FLOOR, SHIFT_FLOOR, delta)


@triton.jit
def sced_from_moments(sums, c, d, VARIANT: tl.constexpr):
    """sum f over the columns other than the arg-max: sum_b (-1)^b C(B,b) M_{A+b,A}."""
    total = c * 0
    for b in tl.static_range(VARIANT.beta + 1):
        moment = moment_about(sums, 2 + b * (VARIANT.alpha + 1), VARIANT.alpha, -c) / whole_power(d, VARIANT.alpha + b)
        total += (1 - 2 * (b % 2)) * BINOMIAL[VARIANT.beta][b] * moment
    return total


@triton.jit
def slope_sum_from_moments(sums, c, d, VARIANT: tl.constexpr):
    """G, the sum of p f' over the same columns: sum_b (-1)^b C(B,b) [(A+b) M_{A+b,A} + A M_{A+b,A-1}]."""
    total = c * 0
    for b in tl.static_range(VARIANT.beta + 1):
        high = (VARIANT.alpha + b) * moment_about(sums, 2 + b * (VARIANT.alpha + 1), VARIANT.alpha, -c)
        low = VARIANT.alpha * moment_about(sums, 2 + b * (VARIANT.alpha + 1), VARIANT.alpha - 1, -c)
        total += (1 - 2 * (b % 2)) * BINOMIAL[VARIANT.beta][b] * ((high + low) / whole_power(d, VARIANT.alpha + b))
    return total


@triton.jit
def rounded(values, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """``values`` rounded to ``dtype``, to nearest even.

    Triton's interpreter truncates to bfloat16, so under it (``EMULATED``) the rounding is done on the bits.
    """
    if EMULATED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(values != values, 0x7FC0, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)
