"""How kernels see a row: where it starts, its tiles, its target.

A program looks at a row from the last multiple of ``vector`` elements at or before its start.  Columns are counted from
there ("places"): the row is [head, end), so whole tiles are read 16 bytes at a time whatever the row's alignment, and
only the first and the last one are masked.  Offsets of rows are 64-bit, places within a row 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_PLACE = tl.constexpr(2**31 - 1)


@triton.jit
def row_start(row, inner_rows, outer_stride, inner_stride):
    """The offset of a row's first element, int64 before any product."""
    row = row.to(tl.int64)
    return (row // inner_rows) * outer_stride.to(tl.int64) + (row % inner_rows) * inner_stride.to(tl.int64)


@triton.jit
def target_of(targets, row, columns, ignore_index, PATH: tl.constexpr):
    """(counts, inside, label) of a row: whether it counts, whether its label is a column (0 where it is not)."""
    if PATH.targets == "labels":
        label = tl.load(targets + row).to(tl.int64)
        counts = label != ignore_index
        inside = (label >= 0) & (label < columns)
        return counts, inside, tl.where(inside, label, 0).to(tl.int32)
    elif PATH.targets == "mask":
        return tl.load(targets + row) != 0, True, 0
    else:
        return True, True, 0


@triton.jit
def places(start, PART: tl.constexpr, TILE: tl.constexpr):
    """The places of one of the arrays that hold the tile at ``start``: (threads, width) int32."""
    thread = tl.arange(0, TILE.threads)[:, None] * TILE.vector
    column = tl.arange(0, TILE.width)[None, :]
    if TILE.pairs:
        return start + (PART // 2) * TILE.block + thread + 2 * column + PART % 2
    else:
        return start + PART * TILE.block + thread + column


@triton.jit
def is_at(place, start, PART: tl.constexpr, TILE: tl.constexpr):
    """Where ``place`` is in one of the arrays of the tile at ``start``: one difference per thread, not one per column."""
    thread = tl.arange(0, TILE.threads)[:, None] * TILE.vector
    column = tl.arange(0, TILE.width)[None, :]
    if TILE.pairs:
        return (place - start - (PART // 2) * TILE.block - PART % 2 - thread) == 2 * column
    else:
        return (place - start - PART * TILE.block - thread) == column


@triton.jit
def load_whole(base, start, dtype: tl.constexpr, TILE: tl.constexpr):
    """A tile that lies inside the row, as a tuple of ``parts`` arrays of ``dtype``."""
    parts = ()
    if TILE.pairs:
        words = base.to(tl.pointer_type(tl.int32), bitcast=True) + start // 2
        thread = tl.arange(0, TILE.threads)[:, None] * TILE.width
        offsets = thread + tl.arange(0, TILE.width)[None, :]
        for load in tl.static_range(TILE.loads):
            word = tl.load(words + (offsets + load * (TILE.block // 2)))
            even = (word << 16).to(tl.float32, bitcast=True)
            odd = (word & -65536).to(tl.float32, bitcast=True)
            parts = parts + (even, odd)
    else:
        for part in tl.static_range(TILE.loads):
            parts = parts + (tl.load(base + places(start, part, TILE)).to(dtype),)
    return parts


@triton.jit
def load_masked(base, start, head, end, dtype: tl.constexpr, TILE: tl.constexpr):
    """A tile of which only [head, end) is the row's: -inf elsewhere, which no sum notices."""
    parts = ()
    for part in tl.static_range(TILE.parts):
        place = places(start, part, TILE)
        inside = (place >= head) & (place < end)
        parts = parts + (tl.load(base + place, mask=inside, other=float("-inf")).to(dtype),)
    return parts


@triton.jit
def is_whole(start, head, end, TILE: tl.constexpr):
    """Whether the tile at ``start`` lies inside the row."""
    return (start >= head) & (start + TILE.columns <= end)


@triton.jit
def tile_maximum(parts):
    """The largest element of a tile; NaN may or may not pass."""
    top = parts[0]
    for part in tl.static_range(1, len(parts)):
        top = tl.maximum(top, parts[part])
    return tl.max(top)


@triton.jit
def find_first(parts, value, start, TILE: tl.constexpr):
    """The first place of the tile at ``start`` that holds ``value``."""
    first = NO_PLACE + start * 0
    for part in tl.static_range(TILE.parts):
        first = tl.minimum(first, tl.min(tl.where(parts[part] == value, places(start, part, TILE), NO_PLACE)))
    return first


@triton.jit
def without(parts, place, start, TILE: tl.constexpr):
    """The tile at ``start`` with -inf at ``place``: how the arg-max stays out of every sum."""
    changed = ()
    for part in tl.static_range(TILE.parts):
        changed = changed + (tl.where(is_at(place, start, part, TILE), float("-inf"), parts[part]),)
    return changed


@triton.jit
def slices(array, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The columns of an array in tuples of ``lanes``, in no particular order; no data moves."""
    if WIDTH <= TILE.lanes:
        return (array,)
    else:
        low, high = tl.split(tl.reshape(array, [TILE.threads, WIDTH // 2, 2]))
        return slices(low, WIDTH // 2, TILE) + slices(high, WIDTH // 2, TILE)
