"""SCED over the top k of a row: k from the entropy, the k-th largest logit without a sort, and the sums above it.

The threshold is found by bisection over integer keys that have the order of the values, so a search takes at most as
many steps as a key has bits.  A sample of the row gives a lower bound of the threshold; one pass lists the columns
above the bound, with one list per thread, and the search runs on the lists, in registers.  If the lists cannot hold
these columns (thousands of kept tokens), or if the bound turns out to be wrong, the search counts columns of the row
instead, which is slower and gives the same result.  No result depends on the timing of programs or threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import forward, row_math, rows
from .backward import MAXIMUM, MEAN_SHIFT, NUM_KEPT, RESIDUAL, SCED, SLOPE_SUM, THRESHOLD, TIE_WEIGHT, statistic

INTEGERS = [
    *("count", "columns", "inner_rows", "outer_stride", "inner_stride", "vocab_size", "ignore_index"),
    *("scale_bits", "k_min", "k_max"),
]
# The ranks that bound the threshold in the sample differ from the expected rank by this many standard deviations plus
# this many ranks.
MARGIN = tl.constexpr(4.0)


@triton.jit
def key_of(value, SELECT: tl.constexpr):
    """The int64 key of a scalar: the bits of its magnitude, with its sign, so that -0.0 and 0.0 have the same key."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = ((bits & 0x7FFFFFFF) >> SELECT.shift).to(tl.int64)
    return tl.where(bits < 0, -magnitude, magnitude)


@triton.jit
def value_of(key, dtype: tl.constexpr, SELECT: tl.constexpr):
    """The scalar of ``dtype`` that has this int64 key."""
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
    """(low, high, listable): expected bounds of the threshold's key, and whether lists can hold the columns above."""
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
    """List the columns that are at least ``pivot``; returns their numbers, (threads, lanes).

    A list that is full keeps writing behind its end, where it has memory for the columns of one tile.
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
            groups = rows.lane_groups(parts[part], TILE.width, TILE)
            for index in tl.static_range(TILE.width // TILE.lanes):
                chosen = groups[index] >= pivot
                tl.store(lists + place, groups[index].to(lists.dtype.element_ty), mask=chosen)
                place += chosen.to(tl.int32)
        used += place - start
    return used


@triton.jit
def load_lists(lists, used, first, WIDTH: tl.constexpr, dtype: tl.constexpr, SELECT: tl.constexpr):
    """Load entries [first, first + WIDTH) of every list; entries past the end of a list are -inf."""
    SLOTS: tl.constexpr = SELECT.slots
    place = first + tl.arange(0, WIDTH)[None, :]
    filled = place < tl.reshape(used, [SLOTS, 1])
    address = lists + (tl.arange(0, SLOTS)[:, None] * SELECT.room + place)
    return tl.load(address, mask=filled, other=float("-inf")).to(dtype)


@triton.jit
def count_row(base, columns, pivot, dtype: tl.constexpr, TILE: tl.constexpr):
    """The number of columns that are at least ``pivot``, a finite value."""
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    counts = tl.zeros([THREADS, LANES], tl.int32)
    for tile in range(0, tl.cdiv(columns, TILE.columns)):
        parts = forward.load_tile(base, tile * TILE.columns, columns, dtype, TILE)
        for part in tl.static_range(len(parts)):
            groups = rows.lane_groups(parts[part], TILE.width, TILE)
            for index in tl.static_range(TILE.width // TILE.lanes):
                counts += (groups[index] >= pivot).to(tl.int32)
    return tl.sum(counts)


@triton.jit
def search_row(base, columns, k, guess, bounds, dtype: tl.constexpr, TILE: tl.constexpr, SELECT: tl.constexpr):
    """The key of the k-th largest column, within ``bounds``; the ends of the interval ``guess`` are tested first."""
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
def sced_of(z, chosen, constants, VARIANT: tl.constexpr):
    """(f, p f') of the ``chosen`` columns, and 0 of the others; the arg-max is never chosen."""
    maximum, inverse_d, c = constants
    y = row_math.clamp_shift(tl.where(chosen, z, float("-inf")) - maximum)
    p = row_math.exponential(y) * inverse_d
    q = 1 - p
    density = row_math.sced_density(p, y - c, q, VARIANT.alpha, VARIANT.beta)
    if VARIANT.one_pass:
        slope = p * row_math.even_slope(p, y - c, 1.0, VARIANT.alpha, VARIANT.beta)
    else:
        slope = p * row_math.sced_slope(p, y - c, q, VARIANT.alpha, VARIANT.beta) / q
    return density, slope


@triton.jit
def sum_lists(lists, used, threshold, constants, dtype: tl.constexpr, VARIANT: tl.constexpr, SELECT: tl.constexpr):
    """Count and sum the listed columns.

    Returns the numbers of columns above the threshold, equal to it, and equal to the maximum, and the sums of f and of
    p f' over the columns strictly between threshold and maximum.
    """
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
        density, slope = sced_of(values, (values > threshold) & (values < constants[0]), constants, VARIANT)
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
def sum_row(base, columns, threshold, constants, dtype: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr):
    """As ``sum_lists``, for all columns of the row."""
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    none = tl.zeros([THREADS, LANES], tl.int32)
    above = none
    equal = none
    at_maximum = none
    sums64 = (tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64))
    last = tl.cdiv(columns, TILE.columns)
    for group in range(0, last, TILE.flush_every):
        sums = (tl.zeros([THREADS, LANES], dtype), tl.zeros([THREADS, LANES], dtype))
        for tile in range(group, tl.minimum(group + TILE.flush_every, last)):
            parts = forward.load_tile(base, tile * TILE.columns, columns, dtype, TILE)
            for part in tl.static_range(len(parts)):
                groups = rows.lane_groups(parts[part], TILE.width, TILE)
                for index in tl.static_range(TILE.width // TILE.lanes):
                    z = groups[index]
                    between = (z > threshold) & (z < constants[0])
                    density, slope = sced_of(z, between, constants, VARIANT)
                    sums = (sums[0] + density, sums[1] + slope)
                    above += (z > threshold).to(tl.int32)
                    equal += (z == threshold).to(tl.int32)
                    at_maximum += (z == constants[0]).to(tl.int32)
        sums64 = forward.flush_to_float64(sums64, sums)
    return tl.sum(above), tl.sum(equal), tl.sum(at_maximum), tl.sum(sums64[0]), tl.sum(sums64[1])


@triton.jit
def write_topk_result(terms, stats, row, k, threshold, found, maximum, vocab_size, VARIANT: tl.constexpr):
    """Write SCED, its slope sum and the top-k mask; ``found`` is the result of ``sum_lists`` or ``sum_row``."""
    dtype: tl.constexpr = stats.dtype.element_ty
    above, equal, at_maximum, density, slope = found
    stored = tl.load(stats + row * VARIANT.statistics + RESIDUAL)
    residual = stored.to(tl.float64)
    d, c = forward.row_constants(residual, vocab_size, dtype)
    tie_weight = (k - above).to(tl.float64) / equal.to(tl.float64)
    # All columns at the threshold have the same value, and so have those that share the maximum with the arg-max.
    y = threshold.to(tl.float64) - maximum.to(tl.float64)
    top_weight = tl.where(threshold < maximum, 1.0, tie_weight)
    tied = tl.where(threshold < maximum, (k - above).to(tl.float64), 0.0)
    p = tl.exp(y) / d
    q = tl.where(tied > 0, 1.0 - p, 0.5)
    p_top = 1.0 / d
    others = top_weight * (at_maximum - 1).to(tl.float64)
    q_other = tl.where(others > 0, 1.0 - p_top, 0.5)
    density += tied * row_math.sced_density(p, y - c, q, VARIANT.alpha, VARIANT.beta)
    density += others * row_math.sced_density(p_top, -c, q_other, VARIANT.alpha, VARIANT.beta)
    slope += tied * (p * row_math.sced_slope(p, y - c, q, VARIANT.alpha, VARIANT.beta) / q)
    slope += others * (p_top * row_math.sced_slope(p_top, -c, q_other, VARIANT.alpha, VARIANT.beta) / q_other)
    one_hot = row_math.is_one_hot(stored)
    q_top = tl.where(one_hot, 0.5, residual / d)
    sced = density + top_weight * row_math.sced_density(p_top, -c, q_top, VARIANT.alpha, VARIANT.beta)
    if VARIANT.beta == 0:
        sced = tl.where(one_hot, row_math.power(tl.abs(c), VARIANT.alpha), sced)
    else:
        sced = tl.where(one_hot, 0.0, sced)
    write_topk(terms, stats, row, sced, (tl.where(one_hot, 0.0, slope), k.to(tl.float64), tie_weight), VARIANT)
    tl.store(stats + row * VARIANT.statistics + THRESHOLD, threshold)


@triton.jit
def write_topk(terms, stats, row, sced, values, VARIANT: tl.constexpr):
    """SCED and (slope sum, k, tie weight) of one row, in the dtype of the statistics."""
    place = stats + row * VARIANT.statistics
    dtype: tl.constexpr = stats.dtype.element_ty
    slope_sum, k, tie_weight = values
    tl.store(terms + row * VARIANT.terms + SCED, sced.to(dtype))
    tl.store(place + SLOPE_SUM, slope_sum.to(dtype))
    tl.store(place + NUM_KEPT, k.to(dtype))
    tl.store(place + TIE_WEIGHT, tie_weight.to(dtype))


@triton.jit
def topk_row(
    base, lists, terms, stats, row, columns, vocab_size, topk_spec, VARIANT: tl.constexpr, TILE: tl.constexpr,
    SELECT: tl.constexpr,
):  # fmt: skip
    """Select and sum one row that has a softmax."""
    dtype: tl.constexpr = stats.dtype.element_ty
    THREADS: tl.constexpr = TILE.threads
    LANES: tl.constexpr = TILE.lanes
    k_scale, k_min, k_max = topk_spec
    maximum = tl.load(stats + row * VARIANT.statistics + MAXIMUM)
    residual = statistic(stats, row, RESIDUAL, VARIANT)
    entropy = row_math.log1p(residual) - statistic(stats, row, MEAN_SHIFT, VARIANT)
    k = row_math.row_num_kept(entropy, k_scale, k_min, k_max)
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
        k = tl.where(low == lowest, tl.minimum(k, listed), k)  # all finite columns are listed, and no mask has more
        complete = (tl.max(used) <= SELECT.depth) & (listed >= k)
        # Threads read entries that other threads have written.
        tl.debug_barrier()
    if complete:
        DEPTH: tl.constexpr = SELECT.depth
        values = load_lists(lists, used, 0, DEPTH, dtype, SELECT)
        threshold = value_of(search(values, k, low, highest, SELECT), dtype, SELECT)
        found = sum_lists(lists, used, threshold, constants, dtype, VARIANT, SELECT)
    else:
        k = tl.minimum(k, count_row(base, columns, value_of(lowest, dtype, SELECT), dtype, TILE))
        key = search_row(base, columns, k, (low, high), (lowest, highest), dtype, TILE, SELECT)
        threshold = value_of(key, dtype, SELECT)
        found = sum_row(base, columns, threshold, constants, dtype, VARIANT, TILE)
    write_topk_result(terms, stats, row, k, threshold, found, maximum, vocab_size, VARIANT)


@triton.jit(do_not_specialize=INTEGERS)
def topk_kernel(
    logits, targets, terms, stats, lists, count, columns, inner_rows, outer_stride, inner_stride, vocab_size,
    ignore_index, scale_bits, k_min, k_max, VARIANT: tl.constexpr, TILE: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Compute the top-k mask and SCED from the statistics of the forward without SCED; programs take rows in turn.

    ``scale_bits`` are the bits of k_scale as a float64, because Triton passes a float argument as float32.
    """
    topk_spec = (scale_bits.to(tl.int64).to(tl.float64, bitcast=True), k_min, k_max)
    mine = lists + tl.program_id(0).to(tl.int64) * (SELECT.slots * SELECT.room)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.program_id(0).to(tl.int64) * 0 + index  # int64 before any product
        is_valid, in_range, _ = rows.target_of(targets, row, columns, ignore_index, VARIANT)
        residual = statistic(stats, row, RESIDUAL, VARIANT)
        if is_valid & in_range & (residual >= 0):
            base = logits + rows.row_start(row, inner_rows, outer_stride, inner_stride, TILE)
            vocabulary = vocab_size.to(tl.float64)
            topk_row(base, mine, terms, stats, row, columns, vocabulary, topk_spec, VARIANT, TILE, SELECT)
        else:  # like the residual: 0 if the row is not valid, NaN if it has no softmax or its label is out of range
            write_topk(terms, stats, row, residual, (residual, residual, residual), VARIANT)
            tl.store(stats + row * VARIANT.statistics + THRESHOLD, residual.to(stats.dtype.element_ty))
        tl.debug_barrier()  # all reads of the lists precede the next row's writes
