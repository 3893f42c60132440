"""Sizes of tiles and launches.

The sizes say which columns a thread takes, how many threads share a row, and how many programs share a row.  They are
not autotuned: a kernel that writes in place must not be run twice on the same tensors, and one choice per shape keeps
results bitwise identical from run to run.  Each number has its reason beside it.
"""

from __future__ import annotations

from typing import NamedTuple

from ...config import ONE_PASS_EXPONENTS

# The widest load instruction of a thread.
VECTOR_BYTES = 16
# Load instructions of a thread per tile.  In the forward they share one search for a new maximum (ten shuffles), and
# 64 bytes in flight per thread hide the latency of memory if a scheduler has at least four warps.  In the backward they
# share the checks for the end of the row and for the arg-max and label columns.
FORWARD_LOADS = 4
BACKWARD_LOADS = 4
# Unaligned rows are loaded column by column and need an address per column, so they take half as many columns.
UNALIGNED_BACKWARD_LOADS = 2
# Columns that a thread sums side by side.  Two independent chains hide the four cycles of an addition, and every
# further chain would cost one register per sum (8 sums for alpha = 2, beta = 1).
LANES = 2
# Tiles after which a thread flushes its lanes to float64, so that at most 256 float32 additions follow one another, as
# in csrc/cpu.  A row of 262,144 columns in one warp would otherwise be wrong by 2e-4.  A flush costs 0.1 instructions
# per column.
FLUSH_TILES = 16
# Warps per multiprocessor that keep its four schedulers busy while one warp in four waits for memory.
BUSY_WARPS = 16
# The most warps of one program that share a row.  With a single warp the maximum of a tile needs no barrier, so a row
# gets several warps only if there are too few rows.
MAX_WARPS = 8
SPLIT_WARPS = 4
# The backward has no reduction, so its warps never wait for one another.  4 warps are the smallest program that can
# fill a multiprocessor within the hardware's limit of 32 programs.
BACKWARD_WARPS = 4
# With fewer tiles per program, its set-up (two logarithms, three divisions in float64) would cost more than a tenth.
MIN_TILES = 4
# The most partial results of one row that combine_kernel combines.
MAX_SPLITS = 64
# Every step of the selection's searches ends in a sum over all threads, which is fast for few warps only.
SELECTION_WARPS = 4
# Exponents with two passes need registers for their powers; with more than one load the sums of a row would spill.
SELECTION_LOADS = 2
# Programs per multiprocessor: 16 warps with at most 128 registers per thread, which the launch requests.  Without the
# request the compiler of triton 3.6 takes 230 registers, and two programs are resident.  float64 has no limit.
SELECTION_PROGRAMS, SELECTION_REGISTERS = 4, 128
# The sample of a row consists of 32-byte sectors of bfloat16, 2,048 columns in total.
SAMPLE_CHUNKS, SAMPLE_CHUNK = 128, 16
# Every thread lists up to 64 of the columns that it finds.  Of 4,096 expected columns, each of 128 threads has 32 on
# average, and more than 64 in one row of ten thousand.
LIST_DEPTH = 64
MAX_LISTED = 4096
# Entries of each list that are summed at a time: two chains, for the same reason as LANES.
SUMMED_PLACES = 2


class Tile(NamedTuple):
    """The columns that one program takes at a time; a compile-time constant of every kernel.

    Thread t holds columns ``t * vector .. t * vector + vector - 1`` of each of ``loads`` consecutive blocks.
    """

    warps: int
    threads: int  # a power of two
    vector: int  # columns per load instruction of a thread
    loads: int
    lanes: int
    aligned16: bool  # every row starts at a multiple of VECTOR_BYTES; otherwise columns are loaded one by one
    bf16x2: bool  # aligned bfloat16 rows, read as 32-bit words: widening takes one instruction per column, not two
    block: int  # columns per load instruction of all threads
    columns: int  # columns of the tile
    parts: int  # number of arrays that hold the tile: one per load, or two (even and odd columns) for bf16x2
    width: int  # columns per thread in each of these arrays
    flush_every: int  # tiles after which the lanes' sums are flushed to float64
    interpreted: bool


class Storage(NamedTuple):
    """The memory layout of the logits (and of their gradient)."""

    itemsize: int
    aligned16: bool  # as in Tile
    bfloat16: bool

    @property
    def words(self) -> int:
        """Registers per element in the arithmetic dtype."""
        return max(self.itemsize // 4, 1)


class Device(NamedTuple):
    """The properties of a device that the sizes depend on."""

    multiprocessors: int
    warp_size: int
    interpreted: bool = False


class LaunchConfig(NamedTuple):
    """A tile and the number of programs that share one row."""

    tile: Tile
    splits: int


def forward_config(rows: int, columns: int, storage: Storage, device: Device) -> LaunchConfig:
    """One warp per row if there are enough rows; otherwise more warps per row, then more programs per row."""
    wanted = BUSY_WARPS * device.multiprocessors
    warps = 1
    while (
        warps < MAX_WARPS and rows * warps < wanted and _tile(warps, FORWARD_LOADS, storage, device).columns < columns
    ):
        warps *= 2
    if 2 * rows * warps > wanted:
        return LaunchConfig(_tile(warps, FORWARD_LOADS, storage, device), 1)
    # Split rows need a second launch in any case; smaller tiles then give every multiprocessor some of the work.
    tile = _tile(min(warps, SPLIT_WARPS), FORWARD_LOADS, storage, device)
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * rows * tile.warps <= wanted and 2 * splits * tile.columns < columns:
        splits *= 2
    return LaunchConfig(tile, splits)


def backward_config(rows: int, columns: int, storage: Storage, device: Device) -> LaunchConfig:
    """As many programs per row as fill the device four times, each with enough tiles to amortise its set-up."""
    loads = BACKWARD_LOADS if storage.aligned16 else UNALIGNED_BACKWARD_LOADS
    tile = _tile(BACKWARD_WARPS, loads, storage, device)
    tiles = -(-columns // tile.columns)
    wanted = 4 * BUSY_WARPS * device.multiprocessors // BACKWARD_WARPS
    busy = -(-wanted // max(rows, 1))
    splits = min(busy, -(-tiles // MIN_TILES)) if rows * -(-tiles // MIN_TILES) >= wanted // 4 else min(busy, tiles)
    return LaunchConfig(tile, max(splits, 1))


class Selection(NamedTuple):
    """Sizes of the search for a row's k-th largest logit; a compile-time constant of its kernel."""

    slots: int  # lists of columns: one for each thread and lane
    depth: int  # columns that a list holds
    room: int  # memory of a list: its depth, and one tile's columns of a thread more
    width: int  # entries of every list that are summed at a time
    listed: int  # the most columns that are expected in all lists together
    chunks: int  # groups of neighbouring columns in the sample
    chunk: int  # columns in each of these groups
    shift: int  # low bits of the key that are 0 in every value of the logits' dtype
    infinity: int  # the key of infinity


class SelectionConfig(NamedTuple):
    """A tile, the sizes of the search, the number of programs, which take rows in turn, and their registers."""

    tile: Tile
    selection: Selection
    programs: int
    registers: int | None  # the most registers of a thread; None leaves the choice to the compiler


def selection_config(rows: int, one_pass: bool, storage: Storage, device: Device) -> SelectionConfig:
    """One program per row, but no more than can be resident, because each has lists of its own in memory."""
    tile = _tile(SELECTION_WARPS, SELECTION_LOADS if one_pass else 1, storage, device)
    tile = tile._replace(lanes=tile.width if device.interpreted else 1)
    shift = 0 if storage.itemsize > 2 else 16 if storage.bfloat16 else 13
    infinity = 0x7FF << 52 if storage.itemsize == 8 else (0xFF << 23) >> shift
    # Lists are searched in registers, and a float64 takes two.
    depth, listed = LIST_DEPTH // storage.words, MAX_LISTED // storage.words
    room = depth + tile.vector * tile.loads // tile.lanes
    sizes = Selection(
        tile.threads * tile.lanes, depth, room, SUMMED_PLACES, listed, SAMPLE_CHUNKS, SAMPLE_CHUNK, shift, infinity
    )
    registers = None if storage.itemsize == 8 else SELECTION_REGISTERS
    return SelectionConfig(tile, sizes, min(rows, SELECTION_PROGRAMS * device.multiprocessors), registers)


def _tile(warps: int, loads: int, storage: Storage, device: Device) -> Tile:
    threads, vector = warps * device.warp_size, VECTOR_BYTES // storage.itemsize
    lanes = LANES
    if device.interpreted:  # the interpreter's time is per operation, not per element: use fewer, wider operations
        lanes, loads = max(vector // 2, LANES), 2
    bf16x2 = storage.bfloat16 and storage.aligned16
    width, parts = (vector // 2, 2 * loads) if bf16x2 else (vector, loads)
    block = threads * vector
    return Tile(
        warps, threads, vector, loads, lanes, storage.aligned16, bf16x2, block, block * loads, parts, width,
        FLUSH_TILES, device.interpreted,
    )  # fmt: skip


class Variant(NamedTuple):
    """The properties of a call besides its shape; a compile-time constant of every kernel."""

    alpha: float
    beta: float
    with_sced: bool
    one_pass: bool  # SCED is a polynomial in a few sums of the row; alpha and beta are then ints
    moments: int  # the number of these sums, besides the two that every variant has
    second_pass: bool  # c must be known before SCED can be summed
    targets: str  # "labels", "valid_mask" or "none"
    topk: bool = False  # SCED has a top-k mask: the forward leaves SCED to the selection
    statistics: int = 5  # columns of the row statistics
    terms: int = 3  # columns of the terms; a fourth is the mean of all shifts, for label smoothing
    column_grads: bool = False  # of a gradient alone: it has the last two columns of objective.column_grads

    @property
    def before_selection(self) -> Variant:
        """The variant of the forward of a row with a top-k mask: everything but SCED."""
        return variant(1, 0, False, self.targets)._replace(statistics=self.statistics, terms=self.terms)


def variant(alpha: float, beta: float, with_sced: bool, targets: str, topk: bool = False) -> Variant:
    """The variant for these exponents, with SCED or without, for this kind of targets, with a top-k mask or without."""
    if topk:
        return variant(alpha, beta, with_sced, targets)._replace(topk=True, statistics=8)
    if not with_sced:
        return Variant(1, 0, False, False, 0, False, targets)
    if (alpha, beta) in ONE_PASS_EXPONENTS:
        moments = (int(alpha) + 1) * (int(beta) + 1)
        return Variant(int(alpha), int(beta), True, True, moments, False, targets)
    return Variant(float(alpha), float(beta), True, False, 0, True, targets)
