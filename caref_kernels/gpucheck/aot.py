"""Every Triton kernel compiled ahead of time, for GPUs that need not be here, and held to its budgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..backends.triton import COMPILER_OPTIONS, tiling
from . import machine_code

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4), "float64": ("fp64", 8)}
# Every one-pass path, two that take a second pass (one with a logarithm, one without), and no SCED at all.
EXPONENTS = (*tiling.ONE_PASS_EXPONENTS, (1, 1), (1.5, 0.5), None)
DEFAULT = (2, 1)
# The reference machine of performance figures; only the choice of tiles depends on it.
DEVICE = tiling.Device(multiprocessors=132, warp_size=32)
_ROWS, _FEW_ROWS, _COLUMNS = 4096, 8, 128_256


class Variant(NamedTuple):
    """One kernel as it is compiled for one kind of call."""

    kernel: str  # row, partial, second, combine, topk or gradient
    dtype: str
    exponents: tuple[float, float] | None  # None: without SCED
    architecture: int
    wide: bool = True
    targets: str = "labels"
    masked: bool = False  # the gradient of a masked row; "topk" always is

    def __str__(self) -> str:
        exponents = "no SCED" if self.exponents is None else "{:g},{:g}".format(*self.exponents)
        rows = "wide" if self.wide else "narrow"
        masked = " masked" if self.masked else ""
        return f"{self.kernel}{masked} {self.dtype} ({exponents}) {rows} {self.targets} sm_{self.architecture}"


class Result(NamedTuple):
    """What became of a variant; ``failures`` says which budgets it exceeds."""

    variant: Variant
    code: machine_code.MachineCode
    per_column: float | None  # instructions of all main loops, for one column
    budget: float | None
    failures: tuple[str, ...]


def variants(architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Variant]:
    """Every kernel x dtype x path of each architecture, and other layouts and targets for the default path."""
    for architecture in architectures:
        for dtype in DTYPES:
            for exponents in EXPONENTS:
                for kernel in ("row", "gradient"):
                    yield Variant(kernel, dtype, exponents, architecture)
            for kernel in ("row", "gradient"):
                yield Variant(kernel, dtype, DEFAULT, architecture, wide=False)
                yield Variant(kernel, dtype, DEFAULT, architecture, targets="valid_mask")
                yield Variant(kernel, dtype, DEFAULT, architecture, targets="none")
            for exponents in (DEFAULT, (1.5, 0.5)):
                yield Variant("partial", dtype, exponents, architecture)
                yield Variant("combine", dtype, exponents, architecture)
            yield Variant("second", dtype, (1.5, 0.5), architecture)
            for exponents in (DEFAULT, (1.5, 0.5)):
                yield Variant("topk", dtype, exponents, architecture, masked=True)
                yield Variant("gradient", dtype, exponents, architecture, masked=True)
            yield Variant("topk", dtype, DEFAULT, architecture, wide=False, masked=True)


def compile_variant(variant: Variant) -> bytes:
    """The cubin of ``variant``, made without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, tile = _source(variant)
    aligned = [["tt.divisibility", 16]]
    attributes = {(index,): aligned for index, kind in enumerate(signature.values()) if str(kind).startswith("*")}
    target = GPUTarget("cuda", variant.architecture, 32)
    options = {**COMPILER_OPTIONS, "num_warps": 1 if variant.kernel == "combine" else tile.warps}
    if variant.kernel == "topk":
        options["maxnreg"] = plan(variant).registers
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options).asm[
        "cubin"
    ]


def check(variant: Variant) -> Result:
    """Compile ``variant`` and compare it with the budgets of tiling.py."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    code = machine_code.read(compile_variant(variant), tools)
    failures = []
    most_stack = tiling.stack_limit(variant.kernel, path(variant), variant.wide, variant.dtype)
    most_spills = tiling.spill_limit(path(variant))
    if code.looped_spills > most_spills or code.stack > most_stack:
        failures.append(
            f"{code.looped_spills} spills in loops, {code.stack} bytes of stack, budget {most_spills} and {most_stack}"
        )
    most = tiling.register_limit(variant.dtype, path(variant))
    if code.registers > most:
        failures.append(f"{code.registers} registers, budget {most}")
    if variant.kernel == "combine":  # no loop over columns
        return Result(variant, code, None, None, tuple(failures))
    if variant.kernel == "topk":
        return _checked_selection(variant, code, failures)
    tile, asked = plan(variant).tile, path(variant)
    loops = code.main_loops()
    expected = 2 if variant.kernel == "row" and asked.second_pass else 1
    if len(loops) != expected:
        failures.append(f"{len(loops)} main loops, expected {expected}")
    per_column = sum(len(loop.turn) for loop in loops) / (tile.vector * tile.loads)
    budget = tiling.instruction_limit(variant.kernel, variant.dtype, asked, variant.wide)
    if per_column > budget:
        failures.append(f"{per_column:.1f} instructions per column, budget {budget:g}")
    narrow = sum(loop.count("LDG") - loop.count("LDG.E.128", "LDG.E.ENL2.128") for loop in loops)
    if variant.wide and narrow:
        failures.append(f"{narrow} loads of a turn are narrower than 16 bytes")
    return Result(variant, code, per_column, budget, tuple(failures))


def _checked_selection(variant: Variant, code: machine_code.MachineCode, failures: list[str]) -> Result:
    """The loops that read a whole row: the one that lists columns, and those that count them."""
    tile, even = plan(variant).tile, path(variant).one_pass
    sweeps = [loop for loop in code.sweeps() if not loop.count("MUFU", "DFMA")]
    listing = [loop for loop in sweeps if loop.count("STG")]
    if len(listing) != 1 or len(sweeps) < 2:
        failures.append(f"{len(listing)} loops that list and {len(sweeps)} that read, expected 1 and at least 2")
    costs = []
    for loop in sweeps:
        kind = "list" if loop in listing else "count"
        costs.append(len(loop.turn) / (tile.vector * tile.loads))
        budget = tiling.selection_limit(kind, variant.dtype, even, variant.wide)
        if costs[-1] > budget:
            failures.append(f"{costs[-1]:.1f} instructions per column to {kind}, budget {budget:g}")
    budget = tiling.selection_limit("list", variant.dtype, even, variant.wide)
    return Result(variant, code, max(costs, default=None), budget, tuple(failures))


def plan(variant: Variant) -> tiling.LaunchConfig | tiling.SelectionConfig:
    """The tile of ``variant``, at the size of a language model's batch."""
    storage = _storage(variant)
    if variant.kernel == "topk":
        return tiling.selection_config(_ROWS, path(variant).one_pass, storage, DEVICE)
    if variant.kernel == "gradient":
        return tiling.backward_config(_ROWS, _COLUMNS, storage, DEVICE)
    rows = _ROWS if variant.kernel == "row" else _FEW_ROWS
    return tiling.forward_config(rows, _COLUMNS, storage, DEVICE)


def _storage(variant: Variant) -> tiling.Storage:
    return tiling.Storage(DTYPES[variant.dtype][1], variant.wide, variant.dtype == "bfloat16")


def path(variant: Variant) -> tiling.Variant:
    """What the kernel of ``variant`` is asked for."""
    alpha, beta = variant.exponents or (1, 0)
    return tiling.variant(alpha, beta, variant.exponents is not None, variant.targets, variant.masked)


def _source(variant: Variant):
    """(kernel, signature, constants, tile); the signature by the names of the kernel's parameters."""
    from triton import language

    from ..backends.triton import backward, forward, select

    storage = DTYPES[variant.dtype][0]
    element = "fp64" if variant.dtype == "float64" else "fp32"
    pointers = {
        "logits": f"*{storage}", "out": f"*{storage}", "targets": "*u8" if variant.targets == "valid_mask" else "*i64",
        "terms": f"*{element}", "stats": f"*{element}", "grad_terms": f"*{element}", "partials": "*fp64",
        "sced_partials": "*fp64", "lists": f"*{storage}",
    }  # fmt: skip
    tile = plan(variant).tile
    selection = tiling.selection_config(_ROWS, path(variant).one_pass, _storage(variant), DEVICE).selection
    constants = {
        "VARIANT": path(variant), "TILE": tile, "SELECT": selection, "MAX_SPLITS": tiling.MAX_SPLITS,
        "dtype": language.float64 if element == "fp64" else language.float32,
    }  # fmt: skip
    wide_integers = dict.fromkeys(("outer_stride", "inner_stride", *backward.STRIDES, "scale_bits"), "i64")
    kernel = {
        "row": forward.row_kernel, "partial": forward.partial_kernel, "second": forward.second_kernel,
        "combine": forward.combine_kernel, "gradient": backward.gradient_kernel,
        "topk": select.topk_kernel,
    }[variant.kernel]  # fmt: skip
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name) or wide_integers.get(name, "i32")
    return kernel, signature, {name: constants[name] for name in kernel.arg_names if name in constants}, tile
