"""The limits that ``make aot`` holds the machine code of the Triton kernels to, and the reason of each."""

from __future__ import annotations

from caref_kernels.backends.triton.tiling import Variant

# At N = 4096, V = 128,256 an H200 issues one instruction for every column in 16.4 us and reads all of them (bfloat16)
# in 14.9 times that: each instruction above 14.9 in the forward, or 29.9 in the backward, costs time.  The limits are
# the largest counts of sm_80, sm_90 and sm_100 (triton 3.6 and 3.9), rounded up by at most one.
_INSTRUCTIONS = {
    "row": {(2, 0): 14.5, (2, 1): 20.0, (2, 2): 23.5, (4, 0): 19.5, (4, 1): 30.0, (4, 2): 40.0, "none": 10.5},
    "gradient": {(2, 0): 15.5, (2, 1): 17.5, (2, 2): 19.5, (4, 0): 17.5, (4, 1): 19.5, (4, 2): 21.5, "none": 11.5},
}
# If several warps share a row, every tile needs two barriers.
_PARTIAL_MORE = 2.0
# Exponents with two passes: fractional ones take two logarithms per column and pass, whole ones only products.
_WHOLE_INSTRUCTIONS = {"row": 42.0, "partial": 12.0, "second": 34.0, "gradient": 38.0}
_FRACTIONAL_INSTRUCTIONS = {"row": 110.0, "partial": 12.0, "second": 100.0, "gradient": 118.0}
# Unaligned rows: each column takes its own load, and an instruction to give it the order of aligned loads; in the
# backward it also takes its own address.
_UNALIGNED_MORE = {"row": 6.5, "partial": 5.0, "second": 5.0, "gradient": 11.0}
# Listing takes a store and its address for every column.
_SELECTION_INSTRUCTIONS = {"list": 10.0, "count": 6.0}
_SELECTION_UNALIGNED_MORE = 8.0
# With one load per tile, the overhead of an iteration is divided by half as many columns.
_ONE_LOAD_MORE = 3.5
# float16 is converted to float32 and back.
_FLOAT16_LIST_MORE = 4.5
# The gradient with a top-k mask: two comparisons, two selects and a product, and moves of some columns.
_TOPK_MORE = 6.5
# A z-loss and label smoothing: the gradient adds a constant, the forward a difference to a sum.
_SMOOTHED_MORE = 2.0
# float64: about 40 instructions per loop for the exponential, and moves of register pairs elsewhere.
_FLOAT64_FACTOR, _FLOAT64_MORE = 1.5, 42.0
# With 168 registers a multiprocessor holds 12 warps, the fewest that hide the latency of memory.  float64 is exempt.
_REGISTERS = 168
_FLOAT64_REGISTERS = 216
# 11 warps: kernels with fractional powers are bound by arithmetic more than by memory.
_FRACTIONAL_REGISTERS = 184
# The assembler stores a few constants on the stack before the loops and reloads them afterwards, if their registers
# allow one more program per multiprocessor.  This is accepted outside of loops, and not for the default variant.
_STACK_BYTES = 24
# The selection has several phases, and stores on the stack what one of them does not use.
_SELECTION_STACK_BYTES = 128


def instruction_limit(kernel: str, dtype: str, variant: Variant, aligned16: bool) -> float:
    """The most machine instructions per column, over all main loops of ``kernel``."""
    loops = 2 if kernel == "row" and variant.second_pass else 1
    if variant.second_pass:
        limit = (_FRACTIONAL_INSTRUCTIONS if _has_fractional_powers(variant) else _WHOLE_INSTRUCTIONS)[kernel]
    else:
        exponents = (variant.alpha, variant.beta) if variant.one_pass else "none"
        limit = _INSTRUCTIONS["row" if kernel == "partial" else kernel][exponents]
        limit += _PARTIAL_MORE if kernel == "partial" else 0.0
    if not aligned16:
        limit += _UNALIGNED_MORE[kernel]
    if variant.topk:
        limit += _TOPK_MORE
    if variant.column_grads or variant.terms > 3:
        limit += _SMOOTHED_MORE
    return limit * _FLOAT64_FACTOR + loops * _FLOAT64_MORE if dtype == "float64" else limit


def selection_limit(sweep: str, dtype: str, one_pass: bool, aligned16: bool) -> float:
    """The most machine instructions per column of one pass of the selection, which "list"s or "count"s columns."""
    limit = _SELECTION_INSTRUCTIONS[sweep] + (0.0 if aligned16 else _SELECTION_UNALIGNED_MORE)
    if not one_pass:
        limit += _ONE_LOAD_MORE
    if sweep == "list" and dtype == "float16":
        limit += _FLOAT16_LIST_MORE
    return limit * _FLOAT64_FACTOR if dtype == "float64" else limit


def spill_limit(variant: Variant) -> int:
    """The most instructions in loops that access the stack: one for fractional powers, whose loops have thousands."""
    return int(_has_fractional_powers(variant))


def stack_limit(kernel: str, variant: Variant, aligned16: bool, dtype: str) -> int:
    """The most bytes of stack per thread, none of them accessed in a loop."""
    if kernel == "topk":
        return _SELECTION_STACK_BYTES
    default = (variant.alpha, variant.beta) == (2, 1) and variant.with_sced and aligned16
    return 0 if default and kernel in ("row", "gradient") and dtype != "float64" else _STACK_BYTES


def register_limit(dtype: str, variant: Variant) -> int:
    """The most registers per thread."""
    if dtype == "float64":
        return _FLOAT64_REGISTERS
    return _FRACTIONAL_REGISTERS if _has_fractional_powers(variant) else _REGISTERS


def _has_fractional_powers(variant: Variant) -> bool:
    return variant.second_pass and (variant.alpha != int(variant.alpha) or variant.beta != int(variant.beta))
