"""SCED over the top k of a row: its budget from the entropy, its threshold exactly and without a sort, its masked sums.

The threshold is searched by bisection over integer keys, in the order of the values, so a search ends after as many
steps as a key has bits.  A sample of the row says which columns may be above it; one pass lists those, every thread in
a list of its own, and the search takes place there, in registers.  Where the lists cannot hold them (thousands of
tokens in the mask) or the sample misled, the search counts in the row instead: slower, and as exact.  No step depends
on the timing of another program or thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import forward, row_math, rows
from .backward import MAXIMUM, MEAN_SHIFT, RESIDUAL, SCED, SLOPE_SUM, SUPPORT, THRESHOLD, TIE_WEIGHT, statistic

INTEGERS = [
    *("count", "columns", "inner_rows", "outer_stride", "inner_stride", "vocab_size", "ignore_index"),
    *("scale_bits", "k_min", "k_max"),
]
# The ranks between which the sample puts the threshold are this many standard deviations, and as many places, off the
# expected rank.
MARGIN = tl.constexpr(4.0)


@triton.jit
def key_of(value, SELECT: tl.constexpr):
    """The integer of a scalar, int64: the bits of its magnitude with its sign, so that -0.0 and 0.0 are one."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = ((bits & 0x7FFFFFFF) >> SELECT.shift).to(tl.int64)
    return tl.where(bits < 0, -magnitude, magnitude)


@triton.jit
def value_of(key, dtype: tl.constexpr, SELECT: tl.constexpr):
    """The scalar of an int64 key in ``dtype``."""
    magnitude = tl.where(key < 0, -key, key)
    if dtype == tl.float64:
        value = magnitude.to(tl.float64, bitcast=True)
    else:
        value = (magnitude.to(tl.int32) << SELECT.shift).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -value, value)


@triton.jit
def upper_middle(low, high):
    """(low + high + 1) // 2 without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def search(values, rank, low, high, SELECT: tl.constexpr):
    """The key, within [low, high], of the ``rank``-th largest of the ``values`` that this program holds."""
    while low < high:
        middle = upper_middle(low, high)
        if tl.sum((values >= value_of(middle, values.dtype, SELECT)).to(tl.int32)) >= rank:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def bracket(base, columns, k, highest, dtype: tl.constexpr, SELECT: tl.constexpr):
    """(low, high, listable): keys between which the threshold is expected, and whether lists can hold what is above."""
    CHUNKS: tl.constexpr = SELECT.chunks
    CHUNK: tl.constexpr = SELECT.chunk
    SIZE: tl.constexpr = CHUNKS * CHUNK
    lowest = highest * 0 - (SELECT.infinity - 1)
    low = lowest
    high = highest
    listable = columns <= SELECT.listed
    if columns > SELECT.listed:
        place = tl.arange(0, CHUNKS)[:, None] * (columns // CHUNKS) + tl.arange(0, CHUNK)[None, :]
        sample = tl.load(base + place).to(dtype)
        rank = k.to(tl.float32) * SIZE / columns.to(tl.float32)
        margin = MARGIN * (tl.sqrt(rank) + 1.0)
        lower = (rank + margin).to(tl.int32) + 1
        listable = lower.to(tl.float32) * columns.to(tl.float32) <= SELECT.listed * SIZE
        if lower <= SIZE:
            low = search(sample, lower, lowest, highest, SELECT)
        if (rank > margin + 1.0) & (listable == 0):
            high = search(sample, (rank - margin).to(tl.int32), lowest, highest, SELECT)
    return low, high, listable


@triton.jit
def list_columns(base, columns, lists, pivot, dtype: tl.constexpr, TILE: tl.constexpr, SELECT: tl.constexpr):
    """(threads, lanes): how many columns from ``pivot`` on each of them has; ``lists`` holds the first of them.

    A list that is full goes on at its end, in the room of one tile.
    """
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    slot = (tl.arange(0, THREADS)[:, None] * LANES + tl.arange(0, LANES)[None, :]) * SELECT.room
    used = tl.zeros([THREADS, LANES], tl.int32)
    for tile in range(0, tl.cdiv(columns, TILE.columns)):
        parts = forward.load_tile(base, tile * TILE.columns, columns, dtype, TILE)
        start = slot + tl.minimum(used, SELECT.depth)
        place = start
        for part in tl.static_range(len(parts)):
            pieces = rows.slices(parts[part], TILE.width, TILE)
            for index in tl.static_range(TILE.width // TILE.lanes):
                chosen = pieces[index] >= pivot
                tl.store(lists + place, pieces[index].to(lists.dtype.element_ty), mask=chosen)
                place += chosen.to(tl.int32)
        used += place - start
    return used


@triton.jit
def load_lists(lists, used, first, WIDTH: tl.constexpr, dtype: tl.constexpr, SELECT: tl.constexpr):
    """Places [first, first + WIDTH) of every list, -inf in those that are empty."""
    SLOTS: tl.constexpr = SELECT.slots
    place = first + tl.arange(0, WIDTH)[None, :]
    filled = place < tl.reshape(used, [SLOTS, 1])
    address = lists + (tl.arange(0, SLOTS)[:, None] * SELECT.room + place)
    return tl.load(address, mask=filled, other=float("-inf")).to(dtype)


@triton.jit
def count_row(base, columns, pivot, dtype: tl.constexpr, TILE: tl.constexpr):
    """The number of columns from ``pivot``, a finite value, on."""
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    counts = tl.zeros([THREADS, LANES], tl.int32)
    for tile in range(0, tl.cdiv(columns, TILE.columns)):
        parts = forward.load_tile(base, tile * TILE.columns, columns, dtype, TILE)
        for part in tl.static_range(len(parts)):
            pieces = rows.slices(parts[part], TILE.width, TILE)
            for index in tl.static_range(TILE.width // TILE.lanes):
                counts += (pieces[index] >= pivot).to(tl.int32)
    return tl.sum(counts)


@triton.jit
def search_row(base, columns, k, guess, bounds, dtype: tl.constexpr, TILE: tl.constexpr, SELECT: tl.constexpr):
    """The key of the k-th largest column, within ``bounds``; the ends of the interval ``guess`` are tried first."""
    low, high = bounds
    step = 0
    while low < high:
        middle = upper_middle(low, high)
        pivot = tl.where(step == 0, guess[0], tl.where(step == 1, guess[1] + 1, middle))
        pivot = tl.where((pivot > low) & (pivot <= high), pivot, middle)
        if count_row(base, columns, value_of(pivot, dtype, SELECT), dtype, TILE) >= k:
            low = pivot
        else:
            high = pivot - 1
        step += 1
    return low


@triton.jit
def sced_of(z, inside, constants, PATH: tl.constexpr):
    """(f, p f') of the columns that are ``inside``, 0 of the others; none of them is the arg-max."""
    maximum, inverse_d, c = constants
    y = row_math.clamp_shift(tl.where(inside, z, float("-inf")) - maximum)
    p = row_math.exponential(y) * inverse_d
    q = 1 - p
    density = row_math.sced_density(p, y - c, q, PATH.alpha, PATH.beta)
    if PATH.even:
        slope = p * row_math.even_slope(p, y - c, 1.0, PATH.alpha, PATH.beta)
    else:
        slope = p * row_math.sced_slope(p, y - c, q, PATH.alpha, PATH.beta) / q
    return density, slope


@triton.jit
def sum_lists(lists, used, threshold, constants, dtype: tl.constexpr, PATH: tl.constexpr, SELECT: tl.constexpr):
    """Counts (above, at the threshold, at the maximum) and sums (f, p f') between the two, of what the lists hold."""
    SLOTS: tl.constexpr = SELECT.slots
    WIDTH: tl.constexpr = SELECT.width
    none = tl.zeros([SLOTS, WIDTH], tl.int32)
    above = none
    equal = none
    at_maximum = none
    densities = tl.zeros([SLOTS, WIDTH], dtype)
    slopes = tl.zeros([SLOTS, WIDTH], dtype)
    for first in range(0, tl.max(used), WIDTH):
        values = load_lists(lists, used, first, WIDTH, dtype, SELECT)
        density, slope = sced_of(values, (values > threshold) & (values < constants[0]), constants, PATH)
        densities += density
        slopes += slope
        above += (values > threshold).to(tl.int32)
        equal += (values == threshold).to(tl.int32)
        at_maximum += (values == constants[0]).to(tl.int32)
    return (
        tl.sum(above),
        tl.sum(equal),
        tl.sum(at_maximum),
        tl.sum(densities.to(tl.float64)),
        tl.sum(slopes.to(tl.float64)),
    )


@triton.jit
def sum_row(base, columns, threshold, constants, dtype: tl.constexpr, PATH: tl.constexpr, TILE: tl.constexpr):
    """As ``sum_lists``, of the whole row."""
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    none = tl.zeros([THREADS, LANES], tl.int32)
    above = none
    equal = none
    at_maximum = none
    wide = (tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64))
    last = tl.cdiv(columns, TILE.columns)
    for group in range(0, last, TILE.fold):
        sums = (tl.zeros([THREADS, LANES], dtype), tl.zeros([THREADS, LANES], dtype))
        for tile in range(group, tl.minimum(group + TILE.fold, last)):
            parts = forward.load_tile(base, tile * TILE.columns, columns, dtype, TILE)
            for part in tl.static_range(len(parts)):
                pieces = rows.slices(parts[part], TILE.width, TILE)
                for index in tl.static_range(TILE.width // TILE.lanes):
                    z = pieces[index]
                    inside = (z > threshold) & (z < constants[0])
                    density, slope = sced_of(z, inside, constants, PATH)
                    sums = (sums[0] + density, sums[1] + slope)
                    above += (z > threshold).to(tl.int32)
                    equal += (z == threshold).to(tl.int32)
                    at_maximum += (z == constants[0]).to(tl.int32)
        wide = forward.fold(wide, sums)
    return tl.sum(above), tl.sum(equal), tl.sum(at_maximum), tl.sum(wide[0]), tl.sum(wide[1])


@triton.jit
def finish_row(terms, stats, row, k, threshold, found, maximum, vocab_size, PATH: tl.constexpr):
    """Write SCED, its slope sum and the mask; ``found`` is what ``sum_lists`` or ``sum_row`` returned."""
    dtype: tl.constexpr = stats.dtype.element_ty
    above, equal, at_maximum, density, slope = found
    stored = tl.load(stats + row * PATH.statistics + RESIDUAL)
    residual = stored.to(tl.float64)
    d, c = forward.row_constants(residual, vocab_size, dtype)
    tie_weight = (k - above).to(tl.float64) / equal.to(tl.float64)
    # Columns at the threshold are alike, and so are those that share the maximum with the arg-max.
    y = threshold.to(tl.float64) - maximum.to(tl.float64)
    top_weight = tl.where(threshold < maximum, 1.0, tie_weight)
    tied = tl.where(threshold < maximum, (k - above).to(tl.float64), 0.0)
    p = tl.exp(y) / d
    q = tl.where(tied > 0, 1.0 - p, 0.5)
    p_top = 1.0 / d
    others = top_weight * (at_maximum - 1).to(tl.float64)
    q_other = tl.where(others > 0, 1.0 - p_top, 0.5)
    density += tied * row_math.sced_density(p, y - c, q, PATH.alpha, PATH.beta)
    density += others * row_math.sced_density(p_top, -c, q_other, PATH.alpha, PATH.beta)
    slope += tied * (p * row_math.sced_slope(p, y - c, q, PATH.alpha, PATH.beta) / q)
    slope += others * (p_top * row_math.sced_slope(p_top, -c, q_other, PATH.alpha, PATH.beta) / q_other)
    one_hot = row_math.is_one_hot(stored)
    q_top = tl.where(one_hot, 0.5, residual / d)
    sced = density + top_weight * row_math.sced_density(p_top, -c, q_top, PATH.alpha, PATH.beta)
    if PATH.beta == 0:
        sced = tl.where(one_hot, row_math.power(tl.abs(c), PATH.alpha), sced)
    else:
        sced = tl.where(one_hot, 0.0, sced)
    write_mask(terms, stats, row, sced, (tl.where(one_hot, 0.0, slope), k.to(tl.float64), tie_weight), PATH)
    tl.store(stats + row * PATH.statistics + THRESHOLD, threshold)


@triton.jit
def write_mask(terms, stats, row, sced, values, PATH: tl.constexpr):
    """SCED and (slope sum, k, tie weight) of one row, in the dtype of the statistics."""
    place = stats + row * PATH.statistics
    dtype: tl.constexpr = stats.dtype.element_ty
    slope_sum, k, tie_weight = values
    tl.store(terms + row * forward.NUM_TERMS + SCED, sced.to(dtype))
    tl.store(place + SLOPE_SUM, slope_sum.to(dtype))
    tl.store(place + SUPPORT, k.to(dtype))
    tl.store(place + TIE_WEIGHT, tie_weight.to(dtype))


@triton.jit
def mask_row(
    base, lists, terms, stats, row, columns, vocab_size, budget, PATH: tl.constexpr, TILE: tl.constexpr,
    SELECT: tl.constexpr,
):  # fmt: skip
    """Select and sum one row that has a softmax."""
    dtype: tl.constexpr = stats.dtype.element_ty
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    k_scale, k_min, k_max = budget
    maximum = tl.load(stats + row * PATH.statistics + MAXIMUM)
    residual = statistic(stats, row, RESIDUAL, PATH)
    entropy = row_math.log1p(residual) - statistic(stats, row, MEAN_SHIFT, PATH)
    k = row_math.row_support(entropy, k_scale, k_min, k_max)
    d, c = forward.row_constants(residual, vocab_size, dtype)
    constants = (maximum, (1.0 / d).to(dtype), c.to(dtype))
    highest = key_of(maximum, SELECT)
    lowest = highest * 0 - (SELECT.infinity - 1)
    low, high, listable = bracket(base, columns, k, highest, dtype, SELECT)
    used = tl.zeros([THREADS, LANES], tl.int32)
    complete = columns < 0
    if listable:
        used = list_columns(base, columns, lists, value_of(low, dtype, SELECT), dtype, TILE, SELECT)
        listed = tl.sum(used)
        k = tl.where(low == lowest, tl.minimum(k, listed), k)  # all finite columns are listed: no mask has more
        complete = (tl.max(used) <= SELECT.depth) & (listed >= k)
        # What one thread has listed another one reads.
        tl.debug_barrier()
    if complete:
        DEPTH: tl.constexpr = SELECT.depth
        values = load_lists(lists, used, 0, DEPTH, dtype, SELECT)
        threshold = value_of(search(values, k, low, highest, SELECT), dtype, SELECT)
        found = sum_lists(lists, used, threshold, constants, dtype, PATH, SELECT)
    else:
        k = tl.minimum(k, count_row(base, columns, value_of(lowest, dtype, SELECT), dtype, TILE))
        key = search_row(base, columns, k, (low, high), (lowest, highest), dtype, TILE, SELECT)
        threshold = value_of(key, dtype, SELECT)
        found = sum_row(base, columns, threshold, constants, dtype, PATH, TILE)
    finish_row(terms, stats, row, k, threshold, found, maximum, vocab_size, PATH)


@triton.jit(do_not_specialize=INTEGERS)
def mask_kernel(
    logits, targets, terms, stats, lists, count, columns, inner_rows, outer_stride, inner_stride, vocab_size,
    ignore_index, scale_bits, k_min, k_max, PATH: tl.constexpr, TILE: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Programs that take rows in turn, after the forward without SCED has left their statistics.

    ``scale_bits`` are those of k_scale as a float64, because a float would arrive as float32.
    """
    budget = (scale_bits.to(tl.int64).to(tl.float64, bitcast=True), k_min, k_max)
    mine = lists + tl.program_id(0).to(tl.int64) * (SELECT.slots * SELECT.room)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.program_id(0).to(tl.int64) * 0 + index  # int64 before any product
        counts, inside, _ = rows.target_of(targets, row, columns, ignore_index, PATH)
        residual = statistic(stats, row, RESIDUAL, PATH)
        if counts & inside & (residual >= 0):
            base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
            mask_row(base, mine, terms, stats, row, columns, vocab_size.to(tl.float64), budget, PATH, TILE, SELECT)
        else:  # 0 where the row does not count, NaN where it has no softmax or no label, as its residual
            write_mask(terms, stats, row, residual, (residual, residual, residual), PATH)
            tl.store(stats + row * PATH.statistics + THRESHOLD, residual.to(stats.dtype.element_ty))
        tl.debug_barrier()  # before the lists are written again
