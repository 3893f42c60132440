"""The gradient of rows: one read, one write.  p is computed again from the logits; the three term gradients are scaled
by the row's incoming gradient and added in float32 (float64), and rounded once.

A program reads a tile before it writes it and looks at no other element of the row, so the gradient may overwrite the
logits.  The arg-max and label columns have a form of their own, applied in the two tiles that hold them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import row_math, rows

# Every one an argument of its own: Triton specializes the members of a tuple, whatever it is told.
STRIDES = ["logits_outer", "logits_inner", "out_outer", "out_inner", "grad_row", "grad_term"]
INTEGERS = ["columns", "inner_rows", *STRIDES, "vocab_size", "ignore_index", "splits"]
# Columns of the statistics, twins of objective.STATISTICS, and of the terms.
MAXIMUM = tl.constexpr(0)
ARGMAX = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
MEAN_SHIFT = tl.constexpr(3)
SLOPE_SUM = tl.constexpr(4)
# Further ones of rows with a mask, twins of objective.MASK_STATISTICS.
SUPPORT = tl.constexpr(5)
THRESHOLD = tl.constexpr(6)
TIE_WEIGHT = tl.constexpr(7)
CE = tl.constexpr(0)
SCED = tl.constexpr(1)
KL = tl.constexpr(2)


@triton.jit
def statistic(stats, row, INDEX: tl.constexpr, PATH: tl.constexpr):
    return tl.load(stats + row * PATH.statistics + INDEX).to(tl.float64)


@triton.jit
def incoming(grad_terms, row, row_stride, term_stride, PATH: tl.constexpr):
    """The row's gradients of (CE, SCED, KL) in float64; without labels there is no CE."""
    place = grad_terms + row * row_stride.to(tl.int64)
    term_stride = term_stride.to(tl.int64)
    grad_kl = tl.load(place + KL * term_stride).to(tl.float64)
    grad_ce = grad_kl * 0
    if PATH.targets == "labels":
        grad_ce = tl.load(place + CE * term_stride).to(tl.float64)
    return grad_ce, tl.load(place + SCED * term_stride).to(tl.float64), grad_kl


@triton.jit
def row_slopes(stats, grads, row, vocab_size, PATH: tl.constexpr):
    """What a row's elements need, once per row.

    (maximum, residual, c, constant, grad_ce, grad_sced, grad_kl, top_slope, gradient of the arg-max column without
    CE) as float64 scalars, where p (constant + grad_kl y + grad_sced f') is the gradient of every other column and
    top_slope is w_a q_a p_a f'_a.
    """
    grad_ce, grad_sced, grad_kl = grads
    dtype: tl.constexpr = stats.dtype.element_ty
    stored = tl.load(stats + row * PATH.statistics + RESIDUAL)
    residual = stored.to(tl.float64)
    mean_shift = statistic(stats, row, MEAN_SHIFT, PATH)
    d = 1.0 + residual
    c = row_math.log_ratio_offset(residual, vocab_size).to(dtype).to(tl.float64)
    p_top = 1.0 / d
    constant = grad_ce - grad_kl * mean_shift
    top_slope = c * 0
    top = -grad_kl * mean_shift * p_top
    if PATH.with_sced:
        one_hot = row_math.is_one_hot(stored)
        grad_sced = tl.where(one_hot, 0.0, grad_sced)
        q_top = tl.where(one_hot, 0.5, residual / d)  # the unused branch stays finite
        slope_sum = tl.where(one_hot, 0.0, statistic(stats, row, SLOPE_SUM, PATH))
        top_slope = p_top * row_math.sced_slope(p_top, -c, q_top, PATH.alpha, PATH.beta)
        if PATH.masked:
            highest = statistic(stats, row, MAXIMUM, PATH)
            tie_weight = statistic(stats, row, TIE_WEIGHT, PATH)
            top_slope *= row_math.mask_weight(highest, statistic(stats, row, THRESHOLD, PATH), tie_weight)
        top += grad_sced * (top_slope - p_top * slope_sum)
        if PATH.even:
            constant -= grad_sced * (slope_sum + top_slope / q_top)  # beta is an integer: p_a f'_a is finite
        else:
            constant -= grad_sced * slope_sum
    else:
        grad_sced = c * 0
    return statistic(stats, row, MAXIMUM, PATH), residual, c, constant, grad_ce, grad_sced, grad_kl, top_slope, top


@triton.jit
def element_constants(slopes, dtype: tl.constexpr):
    """Those of ``row_slopes`` that elements use, in ``dtype``.

    The exponent of float32 elements takes log2 d off, so that p costs one multiply-add and no product; its rounding,
    4e-7 of every p alike, is far below the budget of a gradient.
    """
    maximum, residual, c, constant, _, grad_sced, grad_kl, top_slope, _ = slopes
    d = 1.0 + residual
    if dtype == tl.float64:
        scale = 1.0 / d
    else:
        scale = tl.log(d) * row_math.LOG2E
    share = 1.0 / tl.where(grad_sced == 0, 1.0, residual)
    factor = grad_sced * top_slope
    return (
        maximum.to(dtype),
        scale.to(dtype),
        c.to(dtype),
        constant.to(dtype),
        grad_sced.to(dtype),
        grad_kl.to(dtype),
        share.to(dtype),
        factor.to(dtype),
    )


@triton.jit
def column_gradient(z, constants, mask, PATH: tl.constexpr):
    """The gradient of columns other than the arg-max and the label; ``mask`` is (threshold, tie weight), if any."""
    maximum, scale, c, constant, grad_sced, grad_kl, share, top_slope = constants
    y = row_math.clamp_shift(z - maximum)
    if z.dtype == tl.float64:
        e = tl.exp(y)
        p = e * scale
    else:
        p = tl.exp2(y * row_math.LOG2E - scale)
    inner = y * grad_kl + constant
    if PATH.even:
        slope = row_math.even_slope(p, y - c, grad_sced, PATH.alpha, PATH.beta)
        if PATH.masked:
            slope *= row_math.mask_weight(z, mask[0], mask[1])
        return p * (inner + slope)
    elif PATH.with_sced:
        q = 1 - p
        slope = grad_sced * (row_math.sced_slope(p, y - c, q, PATH.alpha, PATH.beta) / q)
        if PATH.masked:
            slope *= row_math.mask_weight(z, mask[0], mask[1])
        inner += slope
        # Two factors that stay in range where their product with 1/r does not (beta < 1 on a confident row).
        return p * inner - row_math.exponential(y) * share * top_slope
    else:
        return p * inner


@triton.jit
def store_tile(out, parts, start, columns, TILE: tl.constexpr):
    """Write a tile, rounded to the dtype of ``out``."""
    THREADS: tl.constexpr = TILE.threads
    VECTOR: tl.constexpr = TILE.vector
    LOADS: tl.constexpr = TILE.loads
    thread = tl.arange(0, THREADS)[:, None] * VECTOR
    within = thread + tl.arange(0, VECTOR)[None, :]
    for load in tl.static_range(LOADS):
        if TILE.pairs:
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
    """Write one value into a tile."""
    COLUMNS: tl.constexpr = TILE.columns
    column = start + tl.arange(0, COLUMNS)
    filled = tl.zeros([COLUMNS], out.dtype.element_ty) + value.to(out.dtype.element_ty)
    tl.store(out + column, filled, mask=column < columns)


@triton.jit
def special_columns(parts, start, specials, TILE: tl.constexpr):
    """The tile with the gradients of the arg-max and the label columns, which take the place of the general form."""
    argmax, label, top, grad_ce = specials
    changed = ()
    for part in tl.static_range(len(parts)):
        # p - 1 where the label is not the arg-max: p is at most 1/2 there.
        value = tl.where(rows.is_at(label, start, part, TILE), parts[part] - grad_ce, parts[part])
        changed = changed + (tl.where(rows.is_at(argmax, start, part, TILE), top, value),)
    return changed


@triton.jit
def write_gradient(
    base, out, bounds, slopes, special, mask, PATH: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """The gradient in tiles [first, last) of a row with statistics."""
    columns, first, last = bounds
    argmax, label = special
    _, residual, _, _, grad_ce, _, _, _, top = slopes
    # The slope of CE is p_a, or p_a - 1 = -r / d, which as a difference would be lost.
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
            gradients = gradients + (column_gradient(parts[part], constants, mask, PATH),)
        stop = start + TILE.columns
        if ((argmax >= start) & (argmax < stop)) | ((label >= start) & (label < stop)):
            gradients = special_columns(gradients, start, specials, TILE)
        store_tile(out, gradients, start, columns, TILE)


@triton.jit(do_not_specialize=INTEGERS)
def gradient_kernel(
    logits, out, targets, stats, grad_terms, columns, inner_rows, logits_outer, logits_inner, out_outer, out_inner,
    grad_row, grad_term, vocab_size, ignore_index, splits, PATH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program for each split of each row."""
    dtype: tl.constexpr = stats.dtype.element_ty
    row, split = rows.row_of_program(splits)
    counts, inside, label = rows.target_of(targets, row, columns, ignore_index, PATH)
    base = logits + rows.row_start(row, inner_rows, logits_outer, logits_inner, TILE)
    written = out + rows.row_start(row, inner_rows, out_outer, out_inner, TILE)
    tiles = tl.cdiv(columns, TILE.columns)
    share = tl.cdiv(tiles, splits)
    first = tl.minimum(split * share, tiles)
    last = tl.minimum(first + share, tiles)
    argmax = statistic(stats, row, ARGMAX, PATH)
    # Statistics are data: an arg-max that is no column, or a NaN, makes the row NaN.
    usable = (argmax >= 0) & (argmax < columns) & (statistic(stats, row, RESIDUAL, PATH) >= 0)
    if counts & inside & usable:
        grads = incoming(grad_terms, row, grad_row, grad_term, PATH)
        slopes = row_slopes(stats, grads, row, vocab_size.to(tl.float64), PATH)
        special = (argmax.to(tl.int32), label)
        mask = (argmax, argmax)
        if PATH.masked:
            mask = (
                statistic(stats, row, THRESHOLD, PATH).to(dtype),
                statistic(stats, row, TIE_WEIGHT, PATH).to(dtype),
            )
        write_gradient(base, written, (columns, first, last), slopes, special, mask, PATH, TILE, dtype)
    else:
        # A row that does not count, or whose label is no column, has no gradient.
        value = tl.where(counts & inside, float("nan"), 0.0)
        for tile in range(first, last):
            fill_tile(written, value, tile * TILE.columns, columns, TILE)
