"""Terms and statistics of rows.  One read of the row for even exponents: a tile is looked at for a new maximum, which
is rare and then moves every sum, and summed without the arg-max column.  Other exponents read the row a second time.

A row belongs to one program, or to several where there are few rows: each sums its own tiles, and the finishing kernel
merges their results.  All threads of a program sum relative to one maximum, so they are added up once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import row_math, rows

# Sizes and strides vary from call to call; a kernel for each multiple of 16 among them would gain nothing.
INTEGERS = ["columns", "inner_rows", "outer_stride", "inner_stride", "vocab_size", "ignore_index", "splits"]
# The dtype of the arithmetic, as Triton calls it.
ELEMENT = {torch.float32: tl.float32, torch.float64: tl.float64}
# A partial result: maximum, arg-max column, and the sums.
PARTIAL_HEAD = tl.constexpr(2)
NUM_TERMS = tl.constexpr(3)


@triton.jit
def load_tile(base, start, columns, dtype: tl.constexpr, TILE: tl.constexpr):
    """The tile at ``start``: without a mask unless it is the last one."""
    if start + TILE.columns <= columns:
        parts = rows.load_whole(base, start, dtype, TILE)
    else:
        parts = rows.load_masked(base, start, columns, dtype, TILE)
    return parts


@triton.jit
def sum_tiles(base, columns, first, last, dtype: tl.constexpr, PATH: tl.constexpr, TILE: tl.constexpr):
    """(maximum, its first column, sums) of tiles [first, last): the sums leave that column out."""
    LOWEST: tl.constexpr = -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    thread = tl.arange(0, THREADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    one_lane = tl.where((thread == 0) & (lane == 0), 1.0, 0.0).to(dtype)
    empty = tl.zeros([THREADS, LANES], dtype)
    wide = row_math.zero_sums(tl.zeros([THREADS], tl.float64), PATH)
    maximum = tl.full([], float("-inf"), dtype)
    reference = tl.full([], LOWEST, dtype)  # finite while there is no maximum: -inf - -inf would be NaN
    argmax = tl.full([], 0, tl.int32)
    for group in range(first, last, TILE.fold):
        sums = row_math.zero_sums(empty, PATH)
        for tile in range(group, tl.minimum(group + TILE.fold, last)):
            start = tile * TILE.columns
            parts = load_tile(base, start, columns, dtype, TILE)
            top = rows.tile_maximum(parts)
            if top > maximum:
                argmax = rows.find_first(parts, top, start, TILE)
                parts = rows.without(parts, argmax, start, TILE)
                joins = tl.where(maximum > float("-inf"), one_lane, 0.0)
                delta = row_math.rise(maximum, top)
                sums = row_math.shift_sums(row_math.add_top(sums, joins, PATH), delta, PATH)
                wide = row_math.shift_sums(wide, delta, PATH)
                maximum = top
                reference = top
            for part in tl.static_range(len(parts)):
                slices = rows.slices(parts[part], TILE.width, TILE)
                for index in tl.static_range(TILE.width // TILE.lanes):
                    sums = row_math.add_columns(sums, row_math.clamp_shift(slices[index] - reference), PATH)
        wide = fold(wide, sums)
    return maximum, argmax, wide


@triton.jit
def fold(wide, sums):
    """The float64 sums of every thread with those of its lanes: a float32 sum of a whole row would lose four digits."""
    folded = ()
    for index in tl.static_range(len(sums)):
        folded = folded + (wide[index] + tl.sum(sums[index].to(tl.float64), axis=1),)
    return folded


@triton.jit
def add_threads(sums):
    """Scalars in float64."""
    totals = ()
    for index in tl.static_range(len(sums)):
        totals = totals + (tl.sum(sums[index].to(tl.float64)),)
    return totals


@triton.jit
def sum_sced(base, bounds, argmax, constants, dtype: tl.constexpr, PATH: tl.constexpr, TILE: tl.constexpr):
    """The second pass: sum f and sum p f' over the columns other than the arg-max, float64.

    ``bounds`` are (columns, first tile, last tile), ``constants`` (maximum, 1/d, c) in ``dtype``.
    """
    columns, first, last = bounds
    maximum, inverse_d, c = constants
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    empty = tl.zeros([THREADS, LANES], dtype)
    wide = (tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64))
    for group in range(first, last, TILE.fold):
        density = empty
        slope = empty
        for tile in range(group, tl.minimum(group + TILE.fold, last)):
            start = tile * TILE.columns
            parts = load_tile(base, start, columns, dtype, TILE)
            if (argmax >= start) & (argmax < start + TILE.columns):
                parts = rows.without(parts, argmax, start, TILE)
            for part in tl.static_range(len(parts)):
                slices = rows.slices(parts[part], TILE.width, TILE)
                for index in tl.static_range(TILE.width // TILE.lanes):
                    y = row_math.clamp_shift(slices[index] - maximum)
                    p = row_math.exponential(y) * inverse_d
                    q = 1 - p
                    density += row_math.sced_density(p, y - c, q, PATH.alpha, PATH.beta)
                    slope += p * row_math.sced_slope(p, y - c, q, PATH.alpha, PATH.beta) / q
        wide = fold(wide, (density, slope))
    return tl.sum(wide[0]), tl.sum(wide[1])


@triton.jit
def row_constants(residual, vocab_size, dtype: tl.constexpr):
    """(d, c) in float64 of the residual as it is stored, c rounded to ``dtype``.

    Forward and backward make them alike: G must belong to the c that the elements use, or near-uniform rows lose three
    digits of their gradient.
    """
    stored = residual.to(dtype).to(tl.float64)
    return 1.0 + stored, row_math.log_ratio_offset(stored, vocab_size).to(dtype).to(tl.float64)


@triton.jit
def write_row(terms, stats, row, term_values, stat_values, PATH: tl.constexpr):
    """A mask's statistics come from select.py."""
    for index in tl.static_range(NUM_TERMS):
        tl.store(terms + row * NUM_TERMS + index, term_values[index].to(terms.dtype.element_ty))
    for index in tl.static_range(len(stat_values)):
        tl.store(stats + row * PATH.statistics + index, stat_values[index].to(stats.dtype.element_ty))


@triton.jit
def write_empty(terms, stats, row, counts, PATH: tl.constexpr):
    """A row that does not count is 0; one whose label is no column is NaN, without a look at its logits."""
    value = tl.where(counts, float("nan"), 0.0)
    write_row(terms, stats, row, (value, value, value), (value, value, value, value, value), PATH)


@triton.jit
def finish_row(terms, stats, row, seen, label_logit, sced_sums, vocab_size, PATH: tl.constexpr):
    """Write one row; ``seen`` is (maximum, arg-max column, sums), ``sced_sums`` those of a second pass."""
    dtype: tl.constexpr = terms.dtype.element_ty
    maximum, argmax, sums = seen
    residual = sums[0]
    highest = maximum.to(tl.float64)
    poisoned = (residual != residual) | (tl.abs(highest) == float("inf"))
    d = 1.0 + residual
    c = row_math.log_ratio_offset(residual, vocab_size)
    mean_shift = sums[1] / d
    ce = c * 0
    if PATH.targets == "labels":
        ce = row_math.log1p(residual) - (label_logit.to(tl.float64) - highest)
    sced = c * 0
    slope_sum = c * 0
    if PATH.with_sced:
        if PATH.even:
            stored_d, stored_c = row_constants(residual, vocab_size, dtype)
            rest = row_math.sced_from_moments(sums, c, d, PATH)
            slope_sum = row_math.slope_sum_from_moments(sums, stored_c, stored_d, PATH)
        else:
            rest, slope_sum = sced_sums
        one_hot = row_math.is_one_hot(residual.to(dtype))
        # The unused branch of each select stays finite.
        q_top = tl.where(one_hot, 0.5, residual / d)
        sced = rest + row_math.sced_density(1.0 / d, -c, q_top, PATH.alpha, PATH.beta)
        if PATH.beta == 0:
            sced = tl.where(one_hot, row_math.power(tl.abs(c), PATH.alpha), sced)
        else:
            sced = tl.where(one_hot, 0.0, sced)
        slope_sum = tl.where(one_hot, 0.0, slope_sum)
    nan = float("nan")
    if PATH.targets == "labels":
        ce = tl.where(poisoned, nan, ce)
    if PATH.with_sced:
        sced = tl.where(poisoned, nan, sced)
    kl = tl.where(poisoned, nan, mean_shift - c)
    column = argmax.to(tl.float64)
    residual = tl.where(poisoned, nan, residual)
    mean_shift = tl.where(poisoned, nan, mean_shift)
    slope_sum = tl.where(poisoned, nan, slope_sum)
    write_row(terms, stats, row, (ce, sced, kl), (highest, column, residual, mean_shift, slope_sum), PATH)


@triton.jit(do_not_specialize=INTEGERS)
def row_kernel(
    logits, targets, terms, stats, columns, inner_rows, outer_stride, inner_stride, vocab_size, ignore_index,
    PATH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program for each row."""
    dtype: tl.constexpr = terms.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    counts, inside, label = rows.target_of(targets, row, columns, ignore_index, PATH)
    if counts & inside:
        base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
        last = tl.cdiv(columns, TILE.columns)
        maximum, argmax, sums = sum_tiles(base, columns, 0, last, dtype, PATH, TILE)
        totals = add_threads(sums)
        vocabulary = vocab_size.to(tl.float64)
        sced_sums = (totals[0], totals[0])
        if PATH.second_pass:
            d, c = row_constants(totals[0], vocabulary, dtype)
            constants = (maximum, (1.0 / d).to(dtype), c.to(dtype))
            sced_sums = sum_sced(base, (columns, 0, last), argmax, constants, dtype, PATH, TILE)
        label_logit = maximum
        if PATH.targets == "labels":
            label_logit = tl.load(base + label).to(dtype)
        finish_row(terms, stats, row, (maximum, argmax, totals), label_logit, sced_sums, vocabulary, PATH)
    else:
        write_empty(terms, stats, row, counts, PATH)


@triton.jit
def tiles_of_split(split, splits, last):
    """Tiles [first, end) of one of the programs that share a row of ``last`` tiles; some may have none."""
    share = tl.cdiv(last, splits)
    first = tl.minimum(split * share, last)
    return first, tl.minimum(first + share, last)


@triton.jit
def merge_partials(partials, row, splits, PATH: tl.constexpr, MOST_SPLITS: tl.constexpr, dtype: tl.constexpr):
    """(maximum, arg-max column, sums) of a row from those of its splits, in one order whatever the timing."""
    WIDTH: tl.constexpr = PARTIAL_HEAD + 2 + PATH.moments
    split = tl.arange(0, MOST_SPLITS)
    valid = split < splits
    base = partials + row * splits * WIDTH + split * WIDTH
    maxima = tl.load(base, mask=valid, other=float("-inf"))
    columns = tl.load(base + 1, mask=valid, other=0.0)
    sums = ()
    for index in tl.static_range(2 + PATH.moments):
        sums = sums + (tl.load(base + PARTIAL_HEAD + index, mask=valid, other=0.0),)
    maximum = tl.max(maxima)
    # The first split with the maximum keeps its column out; every other one has left out a column that belongs in.
    winner = tl.min(tl.where(maxima == maximum, split, MOST_SPLITS))
    argmax = tl.sum(tl.where(split == winner, columns, 0.0))
    joins = tl.where((maxima > float("-inf")) & (split != winner), 1.0, 0.0).to(tl.float64)
    shifted = row_math.shift_sums(row_math.add_top(sums, joins, PATH), row_math.rise(maxima, maximum), PATH)
    return maximum.to(dtype), argmax.to(tl.int32), add_threads(shifted)


@triton.jit(do_not_specialize=INTEGERS)
def partial_kernel(
    logits, targets, partials, columns, inner_rows, outer_stride, inner_stride, ignore_index, splits,
    dtype: tl.constexpr, PATH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program for each split of each row: its share of the first pass."""
    WIDTH: tl.constexpr = PARTIAL_HEAD + 2 + PATH.moments
    row, split = rows.row_of_program(splits)
    counts, inside, label = rows.target_of(targets, row, columns, ignore_index, PATH)
    if counts & inside:
        base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
        first, last = tiles_of_split(split, splits, tl.cdiv(columns, TILE.columns))
        maximum, argmax, sums = sum_tiles(base, columns, first, last, dtype, PATH, TILE)
        totals = add_threads(sums)
        out = partials + (row * splits + split) * WIDTH
        tl.store(out, maximum.to(tl.float64))
        tl.store(out + 1, argmax.to(tl.float64))
        for index in tl.static_range(2 + PATH.moments):
            tl.store(out + PARTIAL_HEAD + index, totals[index])


@triton.jit(do_not_specialize=INTEGERS)
def second_kernel(
    logits, targets, partials, sced_partials, columns, inner_rows, outer_stride, inner_stride, vocab_size, ignore_index,
    splits, dtype: tl.constexpr, PATH: tl.constexpr, TILE: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program for each split of each row: its share of the second pass."""
    row, split = rows.row_of_program(splits)
    counts, inside, label = rows.target_of(targets, row, columns, ignore_index, PATH)
    if counts & inside:
        base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
        first, last = tiles_of_split(split, splits, tl.cdiv(columns, TILE.columns))
        maximum, argmax, sums = merge_partials(partials, row, splits, PATH, MOST_SPLITS, dtype)
        d, c = row_constants(sums[0], vocab_size.to(tl.float64), dtype)
        constants = (maximum, (1.0 / d).to(dtype), c.to(dtype))
        density, slope = sum_sced(base, (columns, first, last), argmax, constants, dtype, PATH, TILE)
        out = sced_partials + (row * splits + split) * 2
        tl.store(out, density)
        tl.store(out + 1, slope)


@triton.jit(do_not_specialize=INTEGERS)
def finish_kernel(
    logits, targets, partials, sced_partials, terms, stats, columns, inner_rows, outer_stride, inner_stride, vocab_size,
    ignore_index, splits, PATH: tl.constexpr, TILE: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program for each row: merge what its splits found."""
    dtype: tl.constexpr = terms.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    counts, inside, label = rows.target_of(targets, row, columns, ignore_index, PATH)
    if counts & inside:
        maximum, argmax, sums = merge_partials(partials, row, splits, PATH, MOST_SPLITS, dtype)
        sced_sums = (sums[0], sums[0])
        if PATH.second_pass:
            split = tl.arange(0, MOST_SPLITS)
            base = sced_partials + (row * splits + split) * 2
            density = tl.load(base, mask=split < splits, other=0.0)
            slope = tl.load(base + 1, mask=split < splits, other=0.0)
            sced_sums = (tl.sum(density), tl.sum(slope))
        label_logit = maximum
        if PATH.targets == "labels":
            start = rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
            label_logit = tl.load(logits + (start + label)).to(dtype)
        vocabulary = vocab_size.to(tl.float64)
        finish_row(terms, stats, row, (maximum, argmax, sums), label_logit, sced_sums, vocabulary, PATH)
    else:
        write_empty(terms, stats, row, counts, PATH)
