"""The Triton kernels for GPUs: when they run, and how they are launched.

A launch allocates with torch, runs on the current stream of the logits' device, and waits for nothing, so CUDA graphs
can capture it.  Triton itself is imported at the first launch.  With TRITON_INTERPRET=1 set before the import, Triton's
interpreter runs the same kernels on CPU tensors, thousands of times slower: that is for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import struct

import torch
from torch import Tensor

from ...config import RowSpec
from ...objective import NUM_TERMS, accumulation_dtype, statistics_of
from .. import devices
from . import tiling

# Looked for, not imported.
INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads this variable when a kernel is defined; so does this module, once.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# The CPU plays a small device: large enough for rows to be split, and for the rows of a small batch to share one plan.
INTERPRETER = tiling.Device(multiprocessors=16, warp_size=32, interpreted=True)
# Contraction to multiply-adds is what the instruction budgets count on; tiles are not pipelined through shared memory,
# because other warps hide the latency.
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
# Of a float32 atomic-free kernel with 64-bit floats and 16-byte loads: compute capability 8.0 on.
LEAST_CAPABILITY = (8, 0)


class TritonBackend:
    """See :class:`caref_kernels.backends.Backend`."""

    name = "triton"

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """Needs triton, and logits on a GPU that it compiles for, or on the CPU under its interpreter."""
        if not INSTALLED:
            return "triton is not installed (pip install triton, on Linux)"
        if INTERPRETED:
            if logits.device.type == "cpu":
                return None
            return f"logits are on {logits.device}, and TRITON_INTERPRET=1 runs on CPU tensors"
        if logits.device.type != "cuda":
            return (
                f"logits are on {logits.device}, this backend takes GPU tensors (CPU tensors with TRITON_INTERPRET=1)"
            )
        return _capability_reason(logits.device)

    def describe(self) -> str:
        return "Triton's interpreter, very slow, for tests" if INTERPRETED else "compiled for the GPU at the first call"

    def forward(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(logits.dtype)
        rows = logits.numel() // logits.size(-1)
        terms = torch.empty((rows, NUM_TERMS), dtype=dtype, device=logits.device)
        stats = torch.empty((rows, len(statistics_of(spec))), dtype=dtype, device=logits.device)
        if rows:
            plan = tiling.forward_plan(rows, logits.size(-1), _storage(logits), _device(logits.device))
            with _guard(logits):
                _launch_forward(_Rows(logits, targets, spec), terms, stats, plan)
                if spec.is_masked:
                    _launch_selection(_Rows(logits, targets, spec), terms, stats, spec)
        return terms, stats

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        from . import backward

        rows = logits.numel() // logits.size(-1)
        if not rows:
            return
        plan = tiling.backward_plan(rows, logits.size(-1), _storage(logits, out), _device(logits.device))
        row = _Rows(logits, targets, spec)
        strides = (*row.strides, *_row_strides(out), *grad_terms.stride())
        with _guard(logits):
            backward.gradient_kernel[(rows * plan.splits,)](
                logits, out, row.targets, stats, grad_terms, row.columns, row.inner_rows, *strides, spec.vocab_size,
                spec.ignore_index, plan.splits, row.path, plan.tile, **_options(plan.tile),
            )  # fmt: skip


class _Rows:
    """The arguments that every kernel takes."""

    def __init__(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> None:
        self.logits = logits
        self.columns = logits.size(-1)
        self.inner_rows = logits.size(-2)
        self.strides = _row_strides(logits)
        self.vocab_size = spec.vocab_size
        self.ignore_index = spec.ignore_index
        kind = "none" if targets is None else "mask" if targets.dtype == torch.bool else "labels"
        # Never read if there are none; a mask is read as bytes.
        self.targets = logits if targets is None else targets.view(torch.uint8) if kind == "mask" else targets
        self.path = tiling.path(spec.alpha, spec.beta, spec.with_sced, kind, spec.is_masked)


def _launch_forward(row: _Rows, terms: Tensor, stats: Tensor, plan: tiling.Plan) -> None:
    from . import forward

    tile, splits = plan
    path = row.path.before_selection if row.path.masked else row.path
    options = _options(tile)
    layout = (row.columns, row.inner_rows, *row.strides)
    count = terms.size(0)
    if splits == 1:
        forward.row_kernel[(count,)](
            row.logits, row.targets, terms, stats, *layout, row.vocab_size, row.ignore_index, path, tile, **options
        )
        return
    dtype = forward.ELEMENT[terms.dtype]
    width = forward.PARTIAL_HEAD.value + 2 + path.moments
    partials = torch.empty((count, splits, width), dtype=torch.float64, device=terms.device)
    sced_partials = torch.empty((count, splits, 2), dtype=torch.float64, device=terms.device)
    forward.partial_kernel[(count * splits,)](
        row.logits, row.targets, partials, *layout, row.ignore_index, splits, dtype, path, tile, **options
    )
    if path.second_pass:
        forward.second_kernel[(count * splits,)](
            row.logits, row.targets, partials, sced_partials, *layout, row.vocab_size, row.ignore_index, splits, dtype,
            path, tile, tiling.MOST_SPLITS, **options,
        )  # fmt: skip
    forward.finish_kernel[(count,)](
        row.logits, row.targets, partials, sced_partials, terms, stats, *layout, row.vocab_size, row.ignore_index,
        splits, path, tile, tiling.MOST_SPLITS, **options | {"num_warps": 1},
    )  # fmt: skip


def _launch_selection(row: _Rows, terms: Tensor, stats: Tensor, spec: RowSpec) -> None:
    from . import select

    count = terms.size(0)
    plan = tiling.selection_plan(count, row.path.even, _storage(row.logits), _device(row.logits.device))
    tile, sizes, programs, registers = plan
    options = _options(tile)
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    lists = torch.empty((programs, sizes.slots * sizes.room), dtype=row.logits.dtype, device=row.logits.device)
    select.mask_kernel[(programs,)](
        row.logits, row.targets, terms, stats, lists, count, row.columns, row.inner_rows, *row.strides, row.vocab_size,
        row.ignore_index, _bits(spec.k_scale), spec.k_min, spec.k_max, row.path, tile, sizes, **options,
    )  # fmt: skip


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _row_strides(rows: Tensor) -> tuple[int, int]:
    return (rows.stride(0), rows.stride(1)) if rows.dim() == 3 else (0, rows.stride(0))


def _storage(*matrices: Tensor) -> tiling.Storage:
    """Rows are wide if in every matrix each of them starts at a multiple of 16 bytes."""
    first = matrices[0]
    wide = all(
        (start * first.itemsize) % tiling.VECTOR_BYTES == 0
        for rows in matrices
        for start in (rows.data_ptr() // first.itemsize, *_row_strides(rows))
    )
    return tiling.Storage(first.itemsize, wide, first.dtype == torch.bfloat16)


def _options(tile: tiling.Tile) -> dict[str, object]:
    return {**COMPILER_OPTIONS, "num_warps": tile.warps}


def _guard(logits: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device_of(logits) if logits.is_cuda else contextlib.nullcontext()


def _device(device: torch.device) -> tiling.Device:
    return (
        _gpu(device.index if device.index is not None else torch.cuda.current_device())
        if device.type == "cuda"
        else INTERPRETER
    )


@functools.cache
def _gpu(index: int) -> tiling.Device:
    properties = torch.cuda.get_device_properties(index)
    return tiling.Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))


def _capability_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = devices.capability(device)
    if capability < LEAST_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; triton's code needs 8.0 or later"
    return None
