"""Rows as the kernels read them: the start of a row, its tiles, its target.

Thread t always holds the same columns of a tile, whether or not the start of the row allows 16-byte loads, so the
results of a row are bitwise identical for every alignment.  Offsets of rows are 64-bit, columns within a row 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def row_of_program(splits):
    """(row int64, split int32) of this program, if ``splits`` programs share a row."""
    program = tl.program_id(0)
    return (program // splits).to(tl.int64), (program % splits).to(tl.int32)


@triton.jit
def row_start(row, inner_rows, outer_stride, inner_stride, TILE: tl.constexpr):
    """The offset of a row's first element; int64 before any product, so that it cannot overflow.

    The compiler is told about the alignment of aligned rows.  A grid has fewer than 2^31 programs, so row numbers are
    divided as 32-bit integers, because a 64-bit division is a function call.
    """
    row32 = row.to(tl.int32)
    outer = (row32 // inner_rows).to(tl.int64)
    start = outer * outer_stride.to(tl.int64) + (row32 % inner_rows).to(tl.int64) * inner_stride.to(tl.int64)
    VECTOR: tl.constexpr = TILE.vector
    if TILE.aligned16:
        start = tl.multiple_of(start, VECTOR)
    return start


@triton.jit
def target_of(targets, row, columns, ignore_index, VARIANT: tl.constexpr):
    """(is_valid, in_range, label): whether the row is valid, and whether its label is a column; if not, label is 0."""
    if VARIANT.targets == "labels":
        label = tl.load(targets + row).to(tl.int64)
        is_valid = label != ignore_index
        in_range = (label >= 0) & (label < columns)
        return is_valid, in_range, tl.where(in_range, label, 0).to(tl.int32)
    elif VARIANT.targets == "valid_mask":
        return tl.load(targets + row) != 0, True, 0
    else:
        return True, True, 0


@triton.jit
def columns_of(start, PART: tl.constexpr, TILE: tl.constexpr):
    """The columns of one of the arrays that hold the tile at ``start``: (threads, width) int32."""
    thread = tl.arange(0, TILE.threads)[:, None] * TILE.vector
    column = tl.arange(0, TILE.width)[None, :]
    if TILE.bf16x2:
        return start + (PART // 2) * TILE.block + thread + 2 * column + PART % 2
    else:
        return start + PART * TILE.block + thread + column


@triton.jit
def is_at(column, start, PART: tl.constexpr, TILE: tl.constexpr):
    """Mask of ``column`` in one of the arrays of the tile at ``start``; one subtraction per thread, not per column."""
    thread = tl.arange(0, TILE.threads)[:, None] * TILE.vector
    within = tl.arange(0, TILE.width)[None, :]
    if TILE.bf16x2:
        return (column - start - (PART // 2) * TILE.block - PART % 2 - thread) == 2 * within
    else:
        return (column - start - PART * TILE.block - thread) == within


@triton.jit
def load_whole(base, start, dtype: tl.constexpr, TILE: tl.constexpr):
    """Load a tile that does not reach the end of the row, as a tuple of ``parts`` arrays of ``dtype``."""
    LOADS: tl.constexpr = TILE.loads
    parts = ()
    if TILE.bf16x2:
        words = base.to(tl.pointer_type(tl.int32), bitcast=True) + start // 2
        thread = tl.arange(0, TILE.threads)[:, None] * TILE.width
        offsets = thread + tl.arange(0, TILE.width)[None, :]
        for load in tl.static_range(LOADS):
            word = tl.load(words + (offsets + load * (TILE.block // 2)))
            even = (word << 16).to(tl.float32, bitcast=True)
            odd = (word & -65536).to(tl.float32, bitcast=True)
            parts = parts + (even, odd)
    else:
        for part in tl.static_range(LOADS):
            parts = parts + (tl.load(base + columns_of(start, part, TILE)).to(dtype),)
    return parts


@triton.jit
def load_masked(base, start, columns, dtype: tl.constexpr, TILE: tl.constexpr):
    """Load the last tile of a row; columns past the end are -inf, which adds 0 to every sum."""
    PARTS: tl.constexpr = TILE.parts
    parts = ()
    for part in tl.static_range(PARTS):
        column = columns_of(start, part, TILE)
        parts = parts + (tl.load(base + column, mask=column < columns, other=float("-inf")).to(dtype),)
    return parts


@triton.jit
def tile_maximum(parts):
    """The largest element of a tile; NaN may or may not propagate."""
    top = parts[0]
    for part in tl.static_range(1, len(parts)):
        top = tl.maximum(top, parts[part])
    return tl.max(top)


@triton.jit
def find_first(parts, value, start, TILE: tl.constexpr):
    """The first column of the tile at ``start`` that holds ``value``."""
    first = NO_COLUMN + start * 0
    for part in tl.static_range(len(parts)):
        first = tl.minimum(first, tl.min(tl.where(parts[part] == value, columns_of(start, part, TILE), NO_COLUMN)))
    return first


@triton.jit
def without_column(parts, column, start, TILE: tl.constexpr):
    """The tile at ``start`` with -inf at ``column``, which excludes the arg-max from every sum."""
    changed = ()
    for part in tl.static_range(len(parts)):
        changed = changed + (tl.where(is_at(column, start, part, TILE), float("-inf"), parts[part]),)
    return changed


@triton.jit
def lane_groups(array, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The columns of an array as a tuple of (threads, lanes) arrays, in no particular order, without moving data."""
    if WIDTH <= TILE.lanes:
        return (array,)
    else:
        THREADS: tl.constexpr = TILE.threads
        low, high = tl.split(tl.reshape(array, [THREADS, WIDTH // 2, 2]))
        return lane_groups(low, WIDTH // 2, TILE) + lane_groups(high, WIDTH // 2, TILE)
