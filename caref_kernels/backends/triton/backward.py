"""The gradient of rows, with one read and one write of each element.

p is recomputed from the logits; the gradients of the three terms are scaled by the row's incoming gradient, added in
float32 (float64 for float64 logits), and rounded once.  A program reads a tile before it writes it and reads no other
element of the row, so the gradient may overwrite the logits.  The arg-max and label columns have formulas of their own,
which are applied in the tiles that hold these columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import row_math, rows

# Each stride is an argument of its own, because Triton specializes members of a tuple in spite of do_not_specialize.
STRIDES = ["logits_outer", "logits_inner", "out_outer", "out_inner", "grad_row", "grad_term"]
INTEGERS = ["columns", "inner_rows", *STRIDES, "vocab_size", "ignore_index", "splits"]
# Columns of the statistics, counterparts of objective.STATISTICS, and of the terms.
MAXIMUM = tl.constexpr(0)
ARGMAX = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
MEAN_SHIFT = tl.constexpr(3)
SLOPE_SUM = tl.constexpr(4)
# Additional columns of the statistics if SCED has a top-k mask, as in objective.py.
NUM_KEPT = tl.constexpr(5)
THRESHOLD = tl.constexpr(6)
TIE_WEIGHT = tl.constexpr(7)
CE = tl.constexpr(0)
SCED = tl.constexpr(1)
KL = tl.constexpr(2)
# Additional columns of the incoming gradients, counterparts of the last two of objective.column_grads.
FACTOR = tl.constexpr(3)
CONSTANT = tl.constexpr(4)


@triton.jit
def statistic(stats, row, INDEX: tl.constexpr, VARIANT: tl.constexpr):
    return tl.load(stats + row * VARIANT.statistics + INDEX).to(tl.float64)


@triton.jit
def incoming(grad_terms, row, row_stride, term_stride, VARIANT: tl.constexpr):
    """The incoming gradients of the row's (CE, SCED, KL) in float64; that of CE is 0 if there are no labels.

    Then the factor of p_v and the constant of every column, which are 0 without ``VARIANT.column_grads``.
    """
    place = grad_terms + row * row_stride.to(tl.int64)
    term_stride = term_stride.to(tl.int64)
    grad_kl = tl.load(place + KL * term_stride).to(tl.float64)
    grad_ce = grad_kl * 0
    if VARIANT.targets == "labels":
        grad_ce = tl.load(place + CE * term_stride).to(tl.float64)
    factor, everywhere = grad_kl * 0, grad_kl * 0
    if VARIANT.column_grads:
        factor = tl.load(place + FACTOR * term_stride).to(tl.float64)
        everywhere = tl.load(place + CONSTANT * term_stride).to(tl.float64)
    return grad_ce, tl.load(place + SCED * term_stride).to(tl.float64), grad_kl, factor, everywhere


@triton.jit
def row_slopes(stats, grads, row, vocab_size, VARIANT: tl.constexpr):
    """The constants of a row that its elements need, as float64 scalars.

    They are (maximum, residual, c, constant, grad_ce, grad_sced, grad_kl, top_slope, gradient of the arg-max column
    without CE, everywhere), where p (constant + grad_kl y + grad_sced f') + everywhere is the gradient of every other
    column and top_slope is w_a q_a p_a f'_a.
    """
    grad_ce, grad_sced, grad_kl, factor, everywhere = grads
    dtype: tl.constexpr = stats.dtype.element_ty
    stored = tl.load(stats + row * VARIANT.statistics + RESIDUAL)
    residual = stored.to(tl.float64)
    mean_shift = statistic(stats, row, MEAN_SHIFT, VARIANT)
    d = 1.0 + residual
    c = row_math.log_ratio_offset(residual, vocab_size).to(dtype).to(tl.float64)
    p_top = 1.0 / d
    constant = grad_ce - grad_kl * mean_shift
    top_slope = c * 0
    top = -grad_kl * mean_shift * p_top
    if VARIANT.with_sced:
        one_hot = row_math.is_one_hot(stored)
        grad_sced = tl.where(one_hot, 0.0, grad_sced)
        q_top = tl.where(one_hot, 0.5, residual / d)  # the unused branch stays finite
        slope_sum = tl.where(one_hot, 0.0, statistic(stats, row, SLOPE_SUM, VARIANT))
        top_slope = p_top * row_math.sced_slope(p_top, -c, q_top, VARIANT.alpha, VARIANT.beta)
        if VARIANT.topk:
            highest = statistic(stats, row, MAXIMUM, VARIANT)
            tie_weight = statistic(stats, row, TIE_WEIGHT, VARIANT)
            top_slope *= row_math.topk_weight(highest, statistic(stats, row, THRESHOLD, VARIANT), tie_weight)
        top += grad_sced * (top_slope - p_top * slope_sum)
        if VARIANT.one_pass:
            constant -= grad_sced * (slope_sum + top_slope / q_top)  # beta is an integer: p_a f'_a is finite
        else:
            constant -= grad_sced * slope_sum
    else:
        grad_sced = c * 0
    if VARIANT.column_grads:
        constant += factor
        top += factor * p_top + everywhere
    maximum = statistic(stats, row, MAXIMUM, VARIANT)
    return maximum, residual, c, constant, grad_ce, grad_sced, grad_kl, top_slope, top, everywhere


@triton.jit
def element_constants(slopes, dtype: tl.constexpr):
    """The values of ``row_slopes`` that elements use, in ``dtype``.

    For float32 elements log2 d is subtracted in the exponent, so that p costs one multiply-add instead of a product.
    Its rounding changes every p of the row by the same factor, at most 4e-7, far below the tolerance of a gradient.
    """
    maximum, residual, c, constant, _, grad_sced, grad_kl, top_slope, _, everywhere = slopes
    d = 1.0 + residual
    if dtype == tl.float64:
        scale = 1.0 / d
    else:
        scale = tl.log(d) * row_math.LOG2E
    inverse_residual = 1.0 / tl.where(grad_sced == 0, 1.0, residual)
    factor = grad_sced * top_slope
    return (
        maximum.to(dtype),
        scale.to(dtype),
        c.to(dtype),
        constant.to(dtype),
        grad_sced.to(dtype),
        grad_kl.to(dtype),
        inverse_residual.to(dtype),
        factor.to(dtype),
        everywhere.to(dtype),
    )


@triton.jit
def column_gradient(z, constants, topk_mask, VARIANT: tl.constexpr):
    """The gradient of columns other than arg-max and label; ``topk_mask`` is (threshold, tie weight), if any."""
    maximum, scale, c, constant, grad_sced, grad_kl, inverse_residual, top_slope, everywhere = constants
    y = row_math.clamp_shift(z - maximum)
    if z.dtype == tl.float64:
        e = tl.exp(y)
        p = e * scale
    else:
        p = tl.exp2(y * row_math.LOG2E - scale)
    inner = y * grad_kl + constant
    if VARIANT.one_pass:
        slope = row_math.even_slope(p, y - c, grad_sced, VARIANT.alpha, VARIANT.beta)
        if VARIANT.topk:
            slope *= row_math.topk_weight(z, topk_mask[0], topk_mask[1])
        gradient = p * (inner + slope)
    elif VARIANT.with_sced:
        q = 1 - p
        slope = grad_sced * (row_math.sced_slope(p, y - c, q, VARIANT.alpha, VARIANT.beta) / q)
        if VARIANT.topk:
            slope *= row_math.topk_weight(z, topk_mask[0], topk_mask[1])
        inner += slope
        # The factors stay in range, but top_slope / r may overflow for beta < 1 on a confident row.
        gradient = p * inner - row_math.exponential(y) * inverse_residual * top_slope
    else:
        gradient = p * inner
    if VARIANT.column_grads:
        gradient += everywhere
    return gradient


@triton.jit
def store_tile(out, parts, start, columns, TILE: tl.constexpr):
    """Round a tile to the dtype of ``out`` and write it."""
    THREADS: tl.constexpr = TILE.threads
    VECTOR: tl.constexpr = TILE.vector
    LOADS: tl.constexpr = TILE.loads
    thread = tl.arange(0, THREADS)[:, None] * VECTOR
    within = thread + tl.arange(0, VECTOR)[None, :]
    for load in tl.static_range(LOADS):
        if TILE.bf16x2:
            both = tl.join(parts[2 * load], parts[2 * load + 1])
            values = tl.reshape(both, [THREADS, VECTOR])
        else:
            values = parts[load]
        column = start + load * TILE.block + within
        rounded = row_math.rounded(values, out.dtype.element_ty, TILE.interpreted)
        if start + TILE.columns <= columns:
            tl.store(out + column, rounded)
        else:
            tl.store(out + column, rounded, mask=column < columns)


@triton.jit
def fill_tile(out, value, start, columns, TILE: tl.constexpr):
    """Write one value to all columns of a tile."""
    COLUMNS: tl.constexpr = TILE.columns
    column = start + tl.arange(0, COLUMNS)
    filled = tl.zeros([COLUMNS], out.dtype.element_ty) + value.to(out.dtype.element_ty)
    tl.store(out + column, filled, mask=column < columns)


@triton.jit
def special_columns(parts, start, specials, TILE: tl.constexpr):
    """Replace the gradients of the arg-max and label columns in a tile, for which the general form does not hold."""
    argmax, label, top, grad_ce = specials
    changed = ()
    for part in tl.static_range(len(parts)):
        # p - 1 is accurate for a label that is not the arg-max, because p is at most 1/2 there.
        value = tl.where(rows.is_at(label, start, part, TILE), parts[part] - grad_ce, parts[part])
        changed = changed + (tl.where(rows.is_at(argmax, start, part, TILE), top, value),)
    return changed


@triton.jit
def write_gradient(
    base, out, bounds, slopes, special, topk_mask, VARIANT: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """Write the gradient of tiles [first, last) of a row that has a softmax."""
    columns, first, last = bounds
    argmax, label = special
    _, residual, _, _, grad_ce, _, _, _, top, _ = slopes
    # The slope of CE is p_a, or p_a - 1 if the arg-max is the label; -r / d avoids the cancellation of p_a - 1.
    top = (top + grad_ce * tl.where(label == argmax, -residual, 1.0) / (1.0 + residual)).to(dtype)
    constants = element_constants(slopes, dtype)
    specials = (argmax, label, top, grad_ce.to(dtype))
    for tile in range(first, last):
        start = tile * TILE.columns
        if start + TILE.columns <= columns:
            parts = rows.load_whole(base, start, dtype, TILE)
        else:
            parts = rows.load_masked(base, start, columns, dtype, TILE)
        gradients = ()
        for part in tl.static_range(len(parts)):
            gradients = gradients + (column_gradient(parts[part], constants, topk_mask, VARIANT),)
        stop = start + TILE.columns
        if ((argmax >= start) & (argmax < stop)) | ((label >= start) & (label < stop)):
            gradients = special_columns(gradients, start, specials, TILE)
        store_tile(out, gradients, start, columns, TILE)


@triton.jit(do_not_specialize=INTEGERS)
def gradient_kernel(
    logits, out, targets, stats, grad_terms, columns, inner_rows, logits_outer, logits_inner, out_outer, out_inner,
    grad_row, grad_term, vocab_size, ignore_index, splits, VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient with one program per split of each row."""
    dtype: tl.constexpr = stats.dtype.element_ty
    row, split = rows.row_of_program(splits)
    is_valid, in_range, label = rows.target_of(targets, row, columns, ignore_index, VARIANT)
    base = logits + rows.row_start(row, inner_rows, logits_outer, logits_inner, TILE)
    written = out + rows.row_start(row, inner_rows, out_outer, out_inner, TILE)
    tiles = tl.cdiv(columns, TILE.columns)
    tiles_per_split = tl.cdiv(tiles, splits)
    first = tl.minimum(split * tiles_per_split, tiles)
    last = tl.minimum(first + tiles_per_split, tiles)
    argmax = statistic(stats, row, ARGMAX, VARIANT)
    # The statistics come from the caller and are not trusted: an arg-max out of range or a NaN makes the row NaN.
    usable = (argmax >= 0) & (argmax < columns) & (statistic(stats, row, RESIDUAL, VARIANT) >= 0)
    if is_valid & in_range & usable:
        grads = incoming(grad_terms, row, grad_row, grad_term, VARIANT)
        slopes = row_slopes(stats, grads, row, vocab_size.to(tl.float64), VARIANT)
        special = (argmax.to(tl.int32), label)
        topk_mask = (argmax, argmax)
        if VARIANT.topk:
            topk_mask = (
                statistic(stats, row, THRESHOLD, VARIANT).to(dtype),
                statistic(stats, row, TIE_WEIGHT, VARIANT).to(dtype),
            )
        write_gradient(base, written, (columns, first, last), slopes, special, topk_mask, VARIANT, TILE, dtype)
    else:
        # The gradient of a row that is not valid, or whose label is out of range, is 0.
        value = tl.where(is_valid & in_range, float("nan"), 0.0)
        for tile in range(first, last):
            fill_tile(written, value, tile * TILE.columns, columns, TILE)
