"""Sizes: which columns a thread takes, how many threads share a row, how many programs share a row, and the budgets.

Nothing is autotuned: a kernel that writes in place must not be tried twice, and one choice per shape keeps the bits the
same from run to run.  Each number below has its reason beside it.
"""

from __future__ import annotations

from typing import NamedTuple

# One load instruction of a thread: the widest there is.
VECTOR_BYTES = 16
# Load instructions of a thread per tile.  In the forward they share one look for a new maximum (ten shuffles), and
# 64 bytes in flight per thread hide the latency of memory from four warps per scheduler on.  In the backward they share
# the checks for the end of the row and for the two columns with a form of their own.
FORWARD_LOADS = 4
BACKWARD_LOADS = 4
# Rows that are loaded column by column hold an address per column, so they take half of it.
NARROW_BACKWARD_LOADS = 2
# Columns that a thread sums side by side: two independent chains hide the four cycles of an addition, and every further
# one costs a register per sum (8 sums for alpha = 2, beta = 1).
LANES = 2
# Tiles after which a thread folds its lanes into float64: at most 256 float32 additions in a row, as in csrc/cpu.  A
# row of 262,144 in one warp and float32 alone is off by 2e-4; the fold costs 0.1 instructions per column.
FOLD = 16
# Warps per multiprocessor that keep its four schedulers busy while one in four waits for memory.
BUSY_WARPS = 16
# A row is shared by at most this many warps of one program.  With a single warp the maximum of a tile needs no barrier,
# so rows are given several only when there are too few rows.
MOST_WARPS = 8
SPLIT_WARPS = 4
# The backward has no reduction, so its warps never wait for one another; 4 is the smallest program that fills a
# multiprocessor within its limit of 32 programs.
BACKWARD_WARPS = 4
# Tiles per program below which its set-up (two logarithms, three divisions in float64) would cost more than a tenth.
LEAST_TILES = 4
# Partial results of one row that the finishing kernel merges.
MOST_SPLITS = 64
# The selection of a mask: its searches end in a sum over all threads at every step, which few warps do quickly.
SELECTION_WARPS = 4
# Powers with a logarithm need registers of their own: one load then, or the sums of a row spill.
SELECTION_LOADS = 2
# Programs per multiprocessor: 16 warps, of 128 registers a thread, which the launch asks for.  Left alone, the compiler
# of triton 3.6 takes 230, and two programs run at a time.  float64 is left alone.
SELECTION_PROGRAMS, SELECTION_REGISTERS = 4, 128
# A row's sample: 32-byte sectors of bfloat16, 2,048 columns in all.
SAMPLE_CHUNKS, SAMPLE_CHUNK = 128, 16
# Every thread lists the columns that it finds, up to 64: of 4,096 expected columns each of 128 threads has 32 on
# average, and more than 64 in one row of ten thousand.
LIST_DEPTH = 64
MOST_LISTED = 4096
# Places of each list that are summed at a time: two chains, as LANES.
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
    wide: bool  # every row starts at a multiple of VECTOR_BYTES; otherwise columns are loaded one by one
    pairs: bool  # wide rows of bfloat16, read as 32-bit words: one instruction per column to widen it instead of two
    block: int  # columns per load instruction of all threads
    columns: int  # columns of the tile
    parts: int  # arrays that hold it: one per load, or the even and the odd columns of each
    width: int  # columns per thread of one of them
    fold: int  # tiles between two folds of the lanes' sums into float64
    interpreted: bool


class Storage(NamedTuple):
    """How the logits (and their gradient) lie in memory."""

    itemsize: int
    wide: bool  # as in Tile
    bfloat16: bool

    @property
    def words(self) -> int:
        """Registers of a number in the arithmetic."""
        return max(self.itemsize // 4, 1)


class Device(NamedTuple):
    """What the choice depends on besides the shape."""

    multiprocessors: int
    warp_size: int
    interpreted: bool = False


class Plan(NamedTuple):
    """A tile and the number of programs that share one row."""

    tile: Tile
    splits: int


def forward_plan(rows: int, columns: int, storage: Storage, device: Device) -> Plan:
    """One warp per row where there are rows enough, then more warps per row, then more programs per row."""
    wanted = BUSY_WARPS * device.multiprocessors
    warps = 1
    while (
        warps < MOST_WARPS and rows * warps < wanted and _tile(warps, FORWARD_LOADS, storage, device).columns < columns
    ):
        warps *= 2
    if 2 * rows * warps > wanted:
        return Plan(_tile(warps, FORWARD_LOADS, storage, device), 1)
    # Split rows are merged by a second launch anyway; smaller tiles then give every multiprocessor a share.
    tile = _tile(min(warps, SPLIT_WARPS), FORWARD_LOADS, storage, device)
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * rows * tile.warps <= wanted and 2 * splits * tile.columns < columns:
        splits *= 2
    return Plan(tile, splits)


def backward_plan(rows: int, columns: int, storage: Storage, device: Device) -> Plan:
    """As many programs per row as keep the device busy four times over, each with enough tiles to repay its set-up."""
    loads = BACKWARD_LOADS if storage.wide else NARROW_BACKWARD_LOADS
    tile = _tile(BACKWARD_WARPS, loads, storage, device)
    tiles = -(-columns // tile.columns)
    wanted = 4 * BUSY_WARPS * device.multiprocessors // BACKWARD_WARPS
    busy = -(-wanted // max(rows, 1))
    splits = min(busy, -(-tiles // LEAST_TILES)) if rows * -(-tiles // LEAST_TILES) >= wanted // 4 else min(busy, tiles)
    return Plan(tile, max(splits, 1))


class Selection(NamedTuple):
    """Sizes of the search for a row's k-th largest logit; a compile-time constant of its kernel."""

    slots: int  # lists of columns: one for each thread and lane
    depth: int  # columns that a list holds
    room: int  # places of a list: one more column for each that a thread takes at a time
    width: int  # places of every list that are summed at a time
    listed: int  # columns that are expected in all lists at most
    chunks: int  # groups of neighbouring columns in the sample
    chunk: int  # columns in each of them
    shift: int  # low bits of the key that are 0 in every value of the logits' dtype
    infinity: int  # the key of infinity


class SelectionPlan(NamedTuple):
    """A tile, the sizes of the search, the number of programs, which take rows in turn, and the registers they get."""

    tile: Tile
    selection: Selection
    programs: int
    registers: int | None  # of a thread at most; None leaves it to the compiler


def selection_plan(rows: int, even: bool, storage: Storage, device: Device) -> SelectionPlan:
    """A program for each row, up to as many as run at a time: each has lists of its own in memory."""
    tile = _tile(SELECTION_WARPS, SELECTION_LOADS if even else 1, storage, device)
    tile = tile._replace(lanes=tile.width if device.interpreted else 1)
    shift = 0 if storage.itemsize > 2 else 16 if storage.bfloat16 else 13
    infinity = 0x7FF << 52 if storage.itemsize == 8 else (0xFF << 23) >> shift
    # Lists are searched in registers, of which a float64 takes two.
    depth, listed = LIST_DEPTH // storage.words, MOST_LISTED // storage.words
    room = depth + tile.vector * tile.loads // tile.lanes
    sizes = Selection(
        tile.threads * tile.lanes, depth, room, SUMMED_PLACES, listed, SAMPLE_CHUNKS, SAMPLE_CHUNK, shift, infinity
    )
    registers = None if storage.itemsize == 8 else SELECTION_REGISTERS
    return SelectionPlan(tile, sizes, min(rows, SELECTION_PROGRAMS * device.multiprocessors), registers)


def _tile(warps: int, loads: int, storage: Storage, device: Device) -> Tile:
    threads, vector = warps * device.warp_size, VECTOR_BYTES // storage.itemsize
    lanes = LANES
    if device.interpreted:  # it pays per operation, not per element: fewer, wider ones
        lanes, loads = max(vector // 2, LANES), 2
    pairs = storage.bfloat16 and storage.wide
    width, parts = (vector // 2, 2 * loads) if pairs else (vector, loads)
    block = threads * vector
    return Tile(
        warps, threads, vector, loads, lanes, storage.wide, pairs, block, block * loads, parts, width, FOLD,
        device.interpreted,
    )  # fmt: skip


class Path(NamedTuple):
    """What a call asks for besides the shape; a compile-time constant of every kernel."""

    alpha: float
    beta: float
    with_sced: bool
    even: bool  # one pass: exponents for which SCED is a polynomial in few sums; they are ints then
    moments: int  # those sums, besides the two that every path has
    second_pass: bool  # SCED needs c before it can be summed
    targets: str  # "labels", "mask" or "none"
    masked: bool = False  # SCED is over the top k alone: the forward leaves it to the selection
    statistics: int = 5  # columns of the row statistics

    @property
    def before_selection(self) -> Path:
        """What the forward computes of a row with a mask: everything but SCED."""
        return path(1, 0, False, self.targets)._replace(statistics=self.statistics)


# As in csrc/cpu/rows.h: elsewhere the expansion of (1-p)^B and (y-c)^A cancels more digits than float32 carries.
EVEN_EXPONENTS = ((2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2))


def path(alpha: float, beta: float, with_sced: bool, targets: str, masked: bool = False) -> Path:
    """The path of these exponents."""
    if masked:
        return path(alpha, beta, with_sced, targets)._replace(masked=True, statistics=8)
    if not with_sced:
        return Path(1, 0, False, False, 0, False, targets)
    if (alpha, beta) in EVEN_EXPONENTS:
        moments = (int(alpha) + 1) * (int(beta) + 1)
        return Path(int(alpha), int(beta), True, True, moments, False, targets)
    return Path(float(alpha), float(beta), True, False, 0, True, targets)


# --- Budgets: what the compiled kernels may use.  A test compiles them, without a GPU, and counts. ---

# At N = 4096, V = 128,256 an H200 issues one instruction for every column in 16.4 us and reads all of them, bfloat16,
# in 14.9 times that: each instruction above 14.9 in the forward, or 29.9 in the backward, costs time.  The numbers are
# those of the worst of sm_80, sm_90 and sm_100 (triton 3.6 and 3.9), and up to one more.
_BUDGET = {
    "row": {(2, 0): 14.5, (2, 1): 20.0, (2, 2): 23.5, (4, 0): 19.5, (4, 1): 30.0, (4, 2): 40.0, "none": 10.5},
    "gradient": {(2, 0): 15.5, (2, 1): 17.5, (2, 2): 19.5, (4, 0): 17.5, (4, 1): 19.5, (4, 2): 21.5, "none": 11.5},
}
# A row that several warps share costs two barriers per tile.
_PARTIAL_MORE = 2.0
# Exponents without an expansion: real ones take two logarithms per column and pass, the others powers alone.
_WHOLE_BUDGET = {"row": 42.0, "partial": 12.0, "second": 34.0, "gradient": 38.0}
_REAL_BUDGET = {"row": 110.0, "partial": 12.0, "second": 100.0, "gradient": 118.0}
# Columns that are loaded one by one: an instruction each, and one to put them into the order of wide loads; in the
# backward an address each as well.
_NARROW = {"row": 6.5, "partial": 5.0, "second": 5.0, "gradient": 11.0}
# The list takes a store and its address for every column.
_SELECTION = {"list": 10.0, "count": 6.0}
_SELECTION_NARROW = 8.0
# Half the columns for every turn of a loop.
_ONE_LOAD = 3.5
# float16 is converted there and back.
_FLOAT16_LIST = 4.5
# The gradient of a masked row: two comparisons, two selects and a product, of whose columns some are moved.
_MASKED_MORE = 6.5
# float64: per loop about 40 instructions for the exponential, elsewhere moves of register pairs.
_FLOAT64_FACTOR, _FLOAT64_MORE = 1.5, 42.0
# At 168 a multiprocessor holds 12 warps, the fewest that hide the latency of memory; float64 is not held to that.
_REGISTERS = 168
_FLOAT64_REGISTERS = 216
# 11 warps: real powers are arithmetic more than memory.
_REAL_REGISTERS = 184
# The assembler keeps a few constants of a program on the stack, stored before its loops and loaded after them, where it
# prefers one more program per multiprocessor to their registers.  Not in a loop, and not on the default path.
_STACK_BYTES = 24
# The selection has several phases, and keeps there what one of them does not use.
_SELECTION_STACK_BYTES = 128


def instruction_budget(kernel: str, dtype: str, path: Path, wide: bool) -> float:
    """Machine instructions per column, over all main loops of ``kernel``."""
    loops = 2 if kernel == "row" and path.second_pass else 1
    if path.second_pass:
        budget = (_REAL_BUDGET if _has_real_powers(path) else _WHOLE_BUDGET)[kernel]
    else:
        exponents = (path.alpha, path.beta) if path.even else "none"
        budget = _BUDGET["row"][exponents] + _PARTIAL_MORE if kernel == "partial" else _BUDGET[kernel][exponents]
    if not wide:
        budget += _NARROW[kernel]
    if path.masked:
        budget += _MASKED_MORE
    return budget * _FLOAT64_FACTOR + loops * _FLOAT64_MORE if dtype == "float64" else budget


def selection_budget(sweep: str, dtype: str, even: bool, wide: bool) -> float:
    """Machine instructions per column of one look at a row of the selection, which "list"s columns or "count"s them."""
    budget = _SELECTION[sweep] + (0.0 if wide else _SELECTION_NARROW)
    if not even:
        budget += _ONE_LOAD
    if sweep == "list" and dtype == "float16":
        budget += _FLOAT16_LIST
    return budget * _FLOAT64_FACTOR if dtype == "float64" else budget


def spill_budget(path: Path) -> int:
    """Instructions in loops that read or write the stack: one, where real powers make a turn thousands of them long."""
    return int(_has_real_powers(path))


def stack_budget(kernel: str, path: Path, wide: bool, dtype: str) -> int:
    """Bytes of stack per thread, none of them used in a loop."""
    if kernel == "mask":
        return _SELECTION_STACK_BYTES
    default = kernel in ("row", "gradient") and (path.alpha, path.beta) == (2, 1) and path.with_sced and wide
    return 0 if default and dtype != "float64" else _STACK_BYTES


def register_budget(dtype: str, path: Path) -> int:
    """Registers per thread."""
    if dtype == "float64":
        return _FLOAT64_REGISTERS
    return _REAL_REGISTERS if _has_real_powers(path) else _REGISTERS


def _has_real_powers(path: Path) -> bool:
    return path.second_pass and (path.alpha != int(path.alpha) or path.beta != int(path.beta))
