"""``make aot``: compile every Triton kernel for three GPUs, without one, and hold its machine code to its limits.

Prints one line for each kernel; exit code 1 if one of them exceeds a limit of limits.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from caref_kernels.backends.triton import COMPILER_OPTIONS, INTERPRETED, tiling
from caref_kernels.config import ONE_PASS_EXPONENTS

from . import limits, sass
from .sass import InstructionLimit, MachineCode

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4), "float64": ("fp64", 8)}
# Every pair with a one-pass expansion, two that take a second pass (with and without a logarithm), and no SCED at all.
EXPONENTS = (*ONE_PASS_EXPONENTS, (1, 1), (1.5, 0.5), None)
DEFAULT = (2, 1)
# The reference machine of performance figures; only the choice of tiles depends on it.
DEVICE = tiling.Device(multiprocessors=132, warp_size=32)
_ROWS, _FEW_ROWS, _COLUMNS = 4096, 8, 128_256
_HEADER = f"{'kernel':<56} {'per column':>10} {'limit':>7} {'registers':>9} {'stack':>6} {'spills':>6}"


class Kernel(NamedTuple):
    """One kernel as it is compiled for one kind of call."""

    name: str  # row, partial, second, combine, topk or gradient
    dtype: str
    exponents: tuple[float, float] | None  # None: without SCED
    architecture: int
    aligned: bool = True  # to 16 bytes
    targets: str = "labels"
    masked: bool = False  # the gradient under a top-k mask; "topk" always is
    smoothed: bool = False  # with label smoothing and a z-loss

    def __str__(self) -> str:
        exponents = "no SCED" if self.exponents is None else "{:g},{:g}".format(*self.exponents)
        masked, smoothed = " masked" if self.masked else "", " smoothed" if self.smoothed else ""
        layout = "aligned16" if self.aligned else "unaligned"
        return (
            f"{self.name}{masked}{smoothed} {self.dtype} ({exponents}) {layout} {self.targets} sm_{self.architecture}"
        )


class Result(NamedTuple):
    """The outcome of one kernel; ``failures`` names the limits that it exceeds."""

    kernel: Kernel
    code: MachineCode
    per_column: float | None  # instructions of all main loops, for one column
    limit: float | None
    failures: tuple[str, ...]


def kernels(architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Kernel]:
    """Every kernel x dtype x exponents of each architecture; other layouts and targets for the default exponents."""
    for architecture in architectures:
        for dtype in DTYPES:
            for exponents in EXPONENTS:
                for name in ("row", "gradient"):
                    yield Kernel(name, dtype, exponents, architecture)
            for name in ("row", "gradient"):
                yield Kernel(name, dtype, DEFAULT, architecture, aligned=False)
                yield Kernel(name, dtype, DEFAULT, architecture, targets="valid_mask")
                yield Kernel(name, dtype, DEFAULT, architecture, targets="none")
                yield Kernel(name, dtype, DEFAULT, architecture, smoothed=True)
            for exponents in (DEFAULT, (1.5, 0.5)):
                yield Kernel("partial", dtype, exponents, architecture)
                yield Kernel("combine", dtype, exponents, architecture)
                yield Kernel("topk", dtype, exponents, architecture, masked=True)
                yield Kernel("gradient", dtype, exponents, architecture, masked=True)
            yield Kernel("second", dtype, (1.5, 0.5), architecture)
            yield Kernel("topk", dtype, DEFAULT, architecture, aligned=False, masked=True)


def compile_kernel(kernel: Kernel) -> bytes:
    """The cubin of ``kernel``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants, tile = _source(kernel)
    aligned = [["tt.divisibility", 16]]
    attributes = {(index,): aligned for index, kind in enumerate(signature.values()) if kind.startswith("*")}
    target = GPUTarget("cuda", kernel.architecture, 32)
    options = {**COMPILER_OPTIONS, "num_warps": 1 if kernel.name == "combine" else tile.warps}
    if kernel.name == "topk":
        options["maxnreg"] = _config(kernel).registers
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=options).asm["cubin"]


def limit(kernel: Kernel) -> InstructionLimit:
    """The limits of ``kernel``, from limits.py; of the selection, instructions are limited by :func:`_sweep_limit`."""
    asked = variant(kernel)
    has_loop = kernel.name not in ("combine", "topk")
    return InstructionLimit(
        limits.register_limit(kernel.dtype, asked),
        limits.stack_limit(kernel.name, asked, kernel.aligned, kernel.dtype),
        limits.spill_limit(asked),
        limits.instruction_limit(kernel.name, kernel.dtype, asked, kernel.aligned) if has_loop else None,
    )


def _sweep_limit(kernel: Kernel, sweep: str) -> float:
    return limits.selection_limit(sweep, kernel.dtype, variant(kernel).one_pass, kernel.aligned)


def check(kernel: Kernel) -> Result:
    """Compile ``kernel`` and compare its machine code with its limits."""
    import triton

    code = sass.read(compile_kernel(kernel), Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    allowed = limit(kernel)
    failures = allowed.exceeded(code)
    if kernel.name == "combine":  # no loop over columns
        return Result(kernel, code, None, None, tuple(failures))
    if kernel.name == "topk":
        return _checked_selection(kernel, code, failures)
    loops = code.main_loops()
    expected = 2 if kernel.name == "row" and variant(kernel).second_pass else 1
    if len(loops) != expected:
        failures.append(f"{len(loops)} main loops, expected {expected}")
    per_column = sum(map(_cost(kernel), loops))
    if per_column > allowed.per_column:
        failures.append(f"{per_column:.1f} instructions per column, limit {allowed.per_column:g}")
    narrow = sum(loop.count("LDG") - loop.count("LDG.E.128", "LDG.E.ENL2.128") for loop in loops)
    if kernel.aligned and narrow:
        failures.append(f"{narrow} loads of an iteration are narrower than 16 bytes")
    return Result(kernel, code, per_column, allowed.per_column, tuple(failures))


def _checked_selection(kernel: Kernel, code: MachineCode, failures: list[str]) -> Result:
    """Check the loops that read a whole row: the one that lists columns, and those that count them."""
    sweeps = [loop for loop in code.sweeps() if not loop.count("MUFU", "DFMA")]
    listing = [loop for loop in sweeps if loop.count("STG")]
    if len(listing) != 1 or len(sweeps) < 2:
        failures.append(f"{len(listing)} loops that list and {len(sweeps)} that read, expected 1 and at least 2")
    for loop in sweeps:
        kind, cost = "list" if loop in listing else "count", _cost(kernel)(loop)
        if cost > _sweep_limit(kernel, kind):
            failures.append(f"{cost:.1f} instructions per column to {kind}, limit {_sweep_limit(kernel, kind):g}")
    most = max(map(_cost(kernel), sweeps), default=None)
    return Result(kernel, code, most, _sweep_limit(kernel, "list"), tuple(failures))


def _cost(kernel: Kernel):
    """The function that gives the instructions of one column in a loop of ``kernel``."""
    tile = _config(kernel).tile
    return lambda loop: len(loop.iteration) / (tile.vector * tile.loads)


def _config(kernel: Kernel) -> tiling.LaunchConfig | tiling.SelectionConfig:
    """The tile of ``kernel``, at the size of a language model's batch."""
    if kernel.name == "topk":
        return tiling.selection_config(_ROWS, variant(kernel).one_pass, _storage(kernel), DEVICE)
    if kernel.name == "gradient":
        return tiling.backward_config(_ROWS, _COLUMNS, _storage(kernel), DEVICE)
    rows = _ROWS if kernel.name == "row" else _FEW_ROWS
    return tiling.forward_config(rows, _COLUMNS, _storage(kernel), DEVICE)


def _storage(kernel: Kernel) -> tiling.Storage:
    return tiling.Storage(DTYPES[kernel.dtype][1], kernel.aligned, kernel.dtype == "bfloat16")


def variant(kernel: Kernel) -> tiling.Variant:
    """The compile-time choices of ``kernel``."""
    alpha, beta = kernel.exponents or (1, 0)
    made = tiling.variant(alpha, beta, kernel.exponents is not None, kernel.targets, kernel.masked)
    if not kernel.smoothed:
        return made
    return made._replace(column_grads=True) if kernel.name == "gradient" else made._replace(terms=4)


def _source(kernel: Kernel):
    """(function, signature, constants, tile); the signature by the names of the kernel's parameters."""
    from triton import language

    from caref_kernels.backends.triton import backward, forward, select

    storage = DTYPES[kernel.dtype][0]
    element = "fp64" if kernel.dtype == "float64" else "fp32"
    pointers = {
        "logits": f"*{storage}", "out": f"*{storage}", "targets": "*u8" if kernel.targets == "valid_mask" else "*i64",
        "terms": f"*{element}", "stats": f"*{element}", "grad_terms": f"*{element}", "partials": "*fp64",
        "sced_partials": "*fp64", "lists": f"*{storage}",
    }  # fmt: skip
    tile = _config(kernel).tile
    selection = tiling.selection_config(_ROWS, variant(kernel).one_pass, _storage(kernel), DEVICE).selection
    constants = {
        "VARIANT": variant(kernel), "TILE": tile, "SELECT": selection, "MAX_SPLITS": tiling.MAX_SPLITS,
        "dtype": language.float64 if element == "fp64" else language.float32,
    }  # fmt: skip
    int64 = dict.fromkeys(("outer_stride", "inner_stride", *backward.STRIDES, "scale_bits"), "i64")
    function = {
        "row": forward.row_kernel, "partial": forward.partial_kernel, "second": forward.second_kernel,
        "combine": forward.combine_kernel, "gradient": backward.gradient_kernel, "topk": select.topk_kernel,
    }[kernel.name]  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or int64.get(name, "i32")
        for name in function.arg_names
    }
    return function, signature, {name: constants[name] for name in function.arg_names if name in constants}, tile


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if every kernel keeps its limits."""
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="80 90 100")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose line contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at the same time (2)")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed (pip install triton, on Linux)")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    import triton

    chosen = [kernel for kernel in kernels(options.arch) if options.only in str(kernel)]
    print(
        f"triton {triton.__version__}, {len(chosen)} kernels; instructions per column on the shortest path\n{_HEADER}"
    )
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for result in pool.map(check, chosen):
            print(_line(result), flush=True)
            failed += bool(result.failures)
    print(f"{len(chosen) - failed} of {len(chosen)} within their limits")
    return 1 if failed or not chosen else 0


def _line(result: Result) -> str:
    code = result.code
    per_column = "" if result.per_column is None else f"{result.per_column:.1f}"
    most = "" if result.limit is None else f"{result.limit:g}"
    text = f"{result.kernel!s:<56} {per_column:>10} {most:>7} {code.registers:>9} {code.stack:>6} {code.spills:>6}"
    return f"{text}  FAILS: {'; '.join(result.failures)}" if result.failures else text


if __name__ == "__main__":
    sys.exit(main())
