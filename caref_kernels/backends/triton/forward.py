"""Terms and statistics of rows.

Each tile is searched for a new maximum and summed without the arg-max column.  A new maximum is rare, and all sums are
then moved to it.  For the one-pass exponents the row is read once; other exponents read it a second time.

A row belongs to one program, or to several if there are few rows: each then sums its own tiles, and ``combine_kernel``
combines their results.  All threads of a program sum relative to one maximum, so their sums are added only once, at the
end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import row_math, rows

# Sizes and strides are not specialized: a kernel compiled for multiples of 16 would be no faster, and they vary from
# call to call.
INTEGERS = ["columns", "inner_rows", "outer_stride", "inner_stride", "vocab_size", "ignore_index", "splits"]
# The dtype of the arithmetic, as Triton calls it.
ELEMENT = {torch.float32: tl.float32, torch.float64: tl.float64}
# A partial result consists of the maximum, the arg-max column, the sums, and the sum of the logits if it is wanted.
PARTIAL_HEAD = tl.constexpr(2)
NUM_TERMS = tl.constexpr(3)


@triton.jit
def load_tile(base, start, columns, dtype: tl.constexpr, TILE: tl.constexpr):
    """Load the tile at ``start``; only the last tile of a row needs a predicate."""
    if start + TILE.columns <= columns:
        parts = rows.load_whole(base, start, dtype, TILE)
    else:
        parts = rows.load_masked(base, start, columns, dtype, TILE)
    return parts


@triton.jit
def sum_tiles(base, columns, first, last, dtype: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr):
    """(maximum, the first column that holds it, sums without that column, sum of the logits) of tiles [first, last).

    The last is a float64, 0 without label smoothing.
    """
    LOWEST: tl.constexpr = -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    thread = tl.arange(0, THREADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    one_lane = tl.where((thread == 0) & (lane == 0), 1.0, 0.0).to(dtype)
    empty = tl.zeros([THREADS, LANES], dtype)
    sums64 = row_math.zero_sums(tl.zeros([THREADS], tl.float64), VARIANT)
    maximum = tl.full([], float("-inf"), dtype)
    reference = tl.full([], LOWEST, dtype)  # finite even without a maximum, because -inf - -inf would be NaN
    argmax = tl.full([], 0, tl.int32)
    total64 = tl.zeros([THREADS], tl.float64)
    if VARIANT.terms > NUM_TERMS:  # relative to a number of the row, which keeps its digits far from 0
        pivot = tl.load(base).to(dtype)
        pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    for group in range(first, last, TILE.flush_every):
        sums = row_math.zero_sums(empty, VARIANT)
        total = empty
        for tile in range(group, tl.minimum(group + TILE.flush_every, last)):
            start = tile * TILE.columns
            parts = load_tile(base, start, columns, dtype, TILE)
            if VARIANT.terms > NUM_TERMS:
                total += sum_shifts(parts, start, columns, pivot, TILE)
            top = rows.tile_maximum(parts)
            if top > maximum:
                argmax = rows.find_first(parts, top, start, TILE)
                parts = rows.without_column(parts, argmax, start, TILE)
                readmitted = tl.where(maximum > float("-inf"), one_lane, 0.0)
                delta = row_math.rise(maximum, top)
                sums = row_math.shift_sums(row_math.add_top(sums, readmitted, VARIANT), delta, VARIANT)
                sums64 = row_math.shift_sums(sums64, delta, VARIANT)
                maximum = top
                reference = top
            for part in tl.static_range(len(parts)):
                groups = rows.lane_groups(parts[part], TILE.width, TILE)
                for index in tl.static_range(TILE.width // TILE.lanes):
                    sums = row_math.add_columns(sums, row_math.clamp_shift(groups[index] - reference), VARIANT)
        sums64 = flush_to_float64(sums64, sums)
        if VARIANT.terms > NUM_TERMS:
            total64 += tl.sum(total.to(tl.float64), axis=1)
    total = tl.sum(total64)
    if VARIANT.terms > NUM_TERMS:
        count = tl.minimum(last * TILE.columns, columns) - tl.minimum(first * TILE.columns, columns)
        total += count.to(tl.float64) * pivot.to(tl.float64)
    return maximum, argmax, sums64, total


@triton.jit
def sum_shifts(parts, start, columns, pivot, TILE: tl.constexpr):
    """The sum of z - pivot over the columns of a tile, (threads, lanes); what is past the end of the row adds 0.

    Two arrays of a whole tile are added before the pivot is taken away, in three operations for two columns.
    """
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    PAIR: tl.constexpr = 2 - len(parts) % 2
    total = tl.zeros([THREADS, LANES], pivot.dtype)
    for part in tl.static_range(0, len(parts), PAIR):
        if start + TILE.columns <= columns:
            shifts = parts[part] - PAIR * pivot
            if PAIR == 2:
                shifts += parts[part + 1]
        else:
            shifts = tl.zeros(parts[part].shape, pivot.dtype)
            for one in tl.static_range(part, part + PAIR):
                shifts += tl.where(rows.columns_of(start, one, TILE) < columns, parts[one] - pivot, 0.0)
        groups = rows.lane_groups(shifts, TILE.width, TILE)
        for index in tl.static_range(TILE.width // TILE.lanes):
            total += groups[index]
    return total


@triton.jit
def flush_to_float64(sums64, sums):
    """Add the lanes' sums to the float64 sums of each thread; a float32 sum of a whole row would lose four digits."""
    flushed = ()
    for index in tl.static_range(len(sums)):
        flushed = flushed + (sums64[index] + tl.sum(sums[index].to(tl.float64), axis=1),)
    return flushed


@triton.jit
def add_threads(sums):
    """Add the sums of all threads; returns float64 scalars."""
    totals = ()
    for index in tl.static_range(len(sums)):
        totals = totals + (tl.sum(sums[index].to(tl.float64)),)
    return totals


@triton.jit
def sum_sced(base, bounds, argmax, constants, dtype: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr):
    """The second pass: the sums of f and of p f' over the columns other than the arg-max, in float64.

    ``bounds`` are (columns, first tile, last tile), ``constants`` (maximum, 1/d, c) in ``dtype``.
    """
    columns, first, last = bounds
    maximum, inverse_d, c = constants
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    empty = tl.zeros([THREADS, LANES], dtype)
    sums64 = (tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64))
    for group in range(first, last, TILE.flush_every):
        density = empty
        slope = empty
        for tile in range(group, tl.minimum(group + TILE.flush_every, last)):
            start = tile * TILE.columns
            parts = load_tile(base, start, columns, dtype, TILE)
            if (argmax >= start) & (argmax < start + TILE.columns):
                parts = rows.without_column(parts, argmax, start, TILE)
            for part in tl.static_range(len(parts)):
                groups = rows.lane_groups(parts[part], TILE.width, TILE)
                for index in tl.static_range(TILE.width // TILE.lanes):
                    y = row_math.clamp_shift(groups[index] - maximum)
                    p = row_math.exponential(y) * inverse_d
                    q = 1 - p
                    density += row_math.sced_density(p, y - c, q, VARIANT.alpha, VARIANT.beta)
                    slope += p * row_math.sced_slope(p, y - c, q, VARIANT.alpha, VARIANT.beta) / q
        sums64 = flush_to_float64(sums64, (density, slope))
    return tl.sum(sums64[0]), tl.sum(sums64[1])


@triton.jit
def row_constants(residual, vocab_size, dtype: tl.constexpr):
    """(d, c) in float64, from the residual as it is stored; c is rounded to ``dtype``.

    The forward and the backward compute them in the same way: G must be formed with the c that the elements use, or the
    gradient of near-uniform rows loses three digits.
    """
    stored = residual.to(dtype).to(tl.float64)
    return 1.0 + stored, row_math.log_ratio_offset(stored, vocab_size).to(dtype).to(tl.float64)


@triton.jit
def write_row(terms, stats, row, term_values, stat_values, VARIANT: tl.constexpr):
    """Write the terms and statistics of a row; select.py writes the additional statistics of a top-k mask."""
    TERMS: tl.constexpr = VARIANT.terms
    for index in tl.static_range(TERMS):
        tl.store(terms + row * TERMS + index, term_values[index].to(terms.dtype.element_ty))
    for index in tl.static_range(len(stat_values)):
        tl.store(stats + row * VARIANT.statistics + index, stat_values[index].to(stats.dtype.element_ty))


@triton.jit
def write_empty(terms, stats, row, is_valid, VARIANT: tl.constexpr):
    """Write 0 for a row that is not valid, or NaN for one whose label is out of range, without reading its logits."""
    value = tl.where(is_valid, float("nan"), 0.0)
    write_row(terms, stats, row, (value, value, value, value), (value, value, value, value, value), VARIANT)


@triton.jit
def write_result(terms, stats, row, seen, label_logit, sced_sums, vocab_size, columns, VARIANT: tl.constexpr):
    """Write the results of a row from ``seen``, which is that of sum_tiles, and the sums of a second pass."""
    dtype: tl.constexpr = terms.dtype.element_ty
    maximum, argmax, sums, total = seen
    residual = sums[0]
    highest = maximum.to(tl.float64)
    poisoned = (residual != residual) | (tl.abs(highest) == float("inf"))
    d = 1.0 + residual
    c = row_math.log_ratio_offset(residual, vocab_size)
    mean_shift = sums[1] / d
    zero = tl.zeros([], tl.float64)  # not a product with 0, which a NaN would pass: this term may not be asked for
    ce = zero
    if VARIANT.targets == "labels":
        ce = row_math.log1p(residual) - (label_logit.to(tl.float64) - highest)
    sced = zero
    slope_sum = zero
    if VARIANT.with_sced:
        if VARIANT.one_pass:
            stored_d, stored_c = row_constants(residual, vocab_size, dtype)
            rest = row_math.sced_from_moments(sums, c, d, VARIANT)
            slope_sum = row_math.slope_sum_from_moments(sums, stored_c, stored_d, VARIANT)
        else:
            rest, slope_sum = sced_sums
        one_hot = row_math.is_one_hot(residual.to(dtype))
        # The branch of a select that is not taken must be finite too.
        q_top = tl.where(one_hot, 0.5, residual / d)
        sced = rest + row_math.sced_density(1.0 / d, -c, q_top, VARIANT.alpha, VARIANT.beta)
        if VARIANT.beta == 0:
            sced = tl.where(one_hot, row_math.power(tl.abs(c), VARIANT.alpha), sced)
        else:
            sced = tl.where(one_hot, 0.0, sced)
        slope_sum = tl.where(one_hot, 0.0, slope_sum)
    nan = float("nan")
    if VARIANT.targets == "labels":
        ce = tl.where(poisoned, nan, ce)
    if VARIANT.with_sced:
        sced = tl.where(poisoned, nan, sced)
    kl = tl.where(poisoned, nan, mean_shift - c)
    mean_of_shifts = tl.where(poisoned, nan, total / columns.to(tl.float64) - highest)
    column = argmax.to(tl.float64)
    residual = tl.where(poisoned, nan, residual)
    mean_shift = tl.where(poisoned, nan, mean_shift)
    slope_sum = tl.where(poisoned, nan, slope_sum)
    write_row(
        terms, stats, row, (ce, sced, kl, mean_of_shifts), (highest, column, residual, mean_shift, slope_sum), VARIANT
    )


@triton.jit(do_not_specialize=INTEGERS)
def row_kernel(
    logits, targets, terms, stats, columns, inner_rows, outer_stride, inner_stride, vocab_size, ignore_index,
    VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute terms and statistics with one program per row."""
    dtype: tl.constexpr = terms.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    is_valid, in_range, label = rows.target_of(targets, row, columns, ignore_index, VARIANT)
    if is_valid & in_range:
        base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
        last = tl.cdiv(columns, TILE.columns)
        maximum, argmax, sums, total = sum_tiles(base, columns, 0, last, dtype, VARIANT, TILE)
        totals = add_threads(sums)
        vocabulary = vocab_size.to(tl.float64)
        sced_sums = (totals[0], totals[0])
        if VARIANT.second_pass:
            d, c = row_constants(totals[0], vocabulary, dtype)
            constants = (maximum, (1.0 / d).to(dtype), c.to(dtype))
            sced_sums = sum_sced(base, (columns, 0, last), argmax, constants, dtype, VARIANT, TILE)
        label_logit = maximum
        if VARIANT.targets == "labels":
            label_logit = tl.load(base + label).to(dtype)
        seen = (maximum, argmax, totals, total)
        write_result(terms, stats, row, seen, label_logit, sced_sums, vocabulary, columns, VARIANT)
    else:
        write_empty(terms, stats, row, is_valid, VARIANT)


@triton.jit
def tiles_of_split(split, splits, last):
    """The tiles [first, end) of one split of a row that has ``last`` tiles; a split may have none."""
    tiles_per_split = tl.cdiv(last, splits)
    first = tl.minimum(split * tiles_per_split, last)
    return first, tl.minimum(first + tiles_per_split, last)


@triton.jit
def combine_partials(partials, row, splits, VARIANT: tl.constexpr, MAX_SPLITS: tl.constexpr, dtype: tl.constexpr):
    """The results of sum_tiles of a row from those of its splits, added in a fixed order."""
    WIDTH: tl.constexpr = PARTIAL_HEAD + 2 + VARIANT.moments + VARIANT.terms - NUM_TERMS
    split = tl.arange(0, MAX_SPLITS)
    valid = split < splits
    base = partials + row * splits * WIDTH + split * WIDTH
    maxima = tl.load(base, mask=valid, other=float("-inf"))
    columns = tl.load(base + 1, mask=valid, other=0.0)
    sums = ()
    for index in tl.static_range(2 + VARIANT.moments):
        sums = sums + (tl.load(base + PARTIAL_HEAD + index, mask=valid, other=0.0),)
    maximum = tl.max(maxima)
    # The arg-max of the row is the one of the first split with the maximum, and stays excluded.  Every other split has
    # excluded a column that must be readmitted.
    winner = tl.min(tl.where(maxima == maximum, split, MAX_SPLITS))
    argmax = tl.sum(tl.where(split == winner, columns, 0.0))
    readmitted = tl.where((maxima > float("-inf")) & (split != winner), 1.0, 0.0).to(tl.float64)
    shifted = row_math.shift_sums(row_math.add_top(sums, readmitted, VARIANT), row_math.rise(maxima, maximum), VARIANT)
    total = tl.sum(maxima * 0)
    if VARIANT.terms > NUM_TERMS:
        total = tl.sum(tl.load(base + WIDTH - 1, mask=valid, other=0.0))
    return maximum.to(dtype), argmax.to(tl.int32), add_threads(shifted), total


@triton.jit(do_not_specialize=INTEGERS)
def partial_kernel(
    logits, targets, partials, columns, inner_rows, outer_stride, inner_stride, ignore_index, splits,
    dtype: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first pass over the columns of a split, with one program per split of each row."""
    WIDTH: tl.constexpr = PARTIAL_HEAD + 2 + VARIANT.moments + VARIANT.terms - NUM_TERMS
    row, split = rows.row_of_program(splits)
    is_valid, in_range, label = rows.target_of(targets, row, columns, ignore_index, VARIANT)
    if is_valid & in_range:
        base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
        first, last = tiles_of_split(split, splits, tl.cdiv(columns, TILE.columns))
        maximum, argmax, sums, total = sum_tiles(base, columns, first, last, dtype, VARIANT, TILE)
        totals = add_threads(sums)
        out = partials + (row * splits + split) * WIDTH
        tl.store(out, maximum.to(tl.float64))
        tl.store(out + 1, argmax.to(tl.float64))
        for index in tl.static_range(2 + VARIANT.moments):
            tl.store(out + PARTIAL_HEAD + index, totals[index])
        if VARIANT.terms > NUM_TERMS:
            tl.store(out + WIDTH - 1, total)


@triton.jit(do_not_specialize=INTEGERS)
def second_kernel(
    logits, targets, partials, sced_partials, columns, inner_rows, outer_stride, inner_stride, vocab_size, ignore_index,
    splits, dtype: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """The second pass over the columns of a split, with one program per split of each row."""
    row, split = rows.row_of_program(splits)
    is_valid, in_range, label = rows.target_of(targets, row, columns, ignore_index, VARIANT)
    if is_valid & in_range:
        base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
        first, last = tiles_of_split(split, splits, tl.cdiv(columns, TILE.columns))
        maximum, argmax, sums, _ = combine_partials(partials, row, splits, VARIANT, MAX_SPLITS, dtype)
        d, c = row_constants(sums[0], vocab_size.to(tl.float64), dtype)
        constants = (maximum, (1.0 / d).to(dtype), c.to(dtype))
        density, slope = sum_sced(base, (columns, first, last), argmax, constants, dtype, VARIANT, TILE)
        out = sced_partials + (row * splits + split) * 2
        tl.store(out, density)
        tl.store(out + 1, slope)


@triton.jit(do_not_specialize=INTEGERS)
def combine_kernel(
    logits, targets, partials, sced_partials, terms, stats, columns, inner_rows, outer_stride, inner_stride, vocab_size,
    ignore_index, splits, VARIANT: tl.constexpr, TILE: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine the results of the splits of a row, with one program per row."""
    dtype: tl.constexpr = terms.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    is_valid, in_range, label = rows.target_of(targets, row, columns, ignore_index, VARIANT)
    if is_valid & in_range:
        seen = combine_partials(partials, row, splits, VARIANT, MAX_SPLITS, dtype)
        maximum, argmax, sums, total = seen
        sced_sums = (sums[0], sums[0])
        if VARIANT.second_pass:
            split = tl.arange(0, MAX_SPLITS)
            base = sced_partials + (row * splits + split) * 2
            density = tl.load(base, mask=split < splits, other=0.0)
            slope = tl.load(base + 1, mask=split < splits, other=0.0)
            sced_sums = (tl.sum(density), tl.sum(slope))
        label_logit = maximum
        if VARIANT.targets == "labels":
            start = rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
            label_logit = tl.load(logits + (start + label)).to(dtype)
        vocabulary = vocab_size.to(tl.float64)
        write_result(terms, stats, row, seen, label_logit, sced_sums, vocabulary, columns, VARIANT)
    else:
        write_empty(terms, stats, row, is_valid, VARIANT)
