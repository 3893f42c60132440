"""The Triton kernels for GPUs: the conditions under which they run, and their launches.

A launch allocates its memory with torch, runs on the current stream of the logits' device and is asynchronous, so CUDA
graphs can capture it.  Triton is imported at the first launch.  If TRITON_INTERPRET=1 is set before the import,
Triton's interpreter runs the same kernels on CPU tensors, thousands of times slower, which is useful for tests.
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
from ...objective import TERMS, accumulation_dtype, statistics_of
from .. import devices
from ..compiled import row_strides
from . import tiling

# Triton is imported at the first launch; here it is only located.
INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads this variable when a kernel is defined, so changing it later has no effect; this module reads it once.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# The device that the interpreter simulates.  It has enough multiprocessors that wide rows are split among programs, and
# few enough that small batches of different sizes have one configuration.
INTERPRETER = tiling.Device(multiprocessors=16, warp_size=32, interpreted=True)
# The instruction limits assume that products and sums are contracted to multiply-adds.  Tiles are not pipelined through
# shared memory, because other warps hide the latency of memory.
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
# Minimum compute capability: the first architecture with bfloat16 arithmetic, and the first whose code is checked.
MIN_CAPABILITY = (8, 0)


class TritonBackend:
    """See :class:`caref_kernels.backends.Backend`."""

    name = "triton"

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """Requires triton, and logits on a GPU that it compiles for, or on the CPU under its interpreter."""
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
        terms = torch.empty((rows, len(TERMS) + bool(spec.smoothed)), dtype=dtype, device=logits.device)
        stats = torch.empty((rows, len(statistics_of(spec))), dtype=dtype, device=logits.device)
        if rows:
            config = tiling.forward_config(rows, logits.size(-1), _storage(logits), _device(logits.device))
            call = _Call(logits, targets, spec)
            call.variant = call.variant._replace(terms=terms.size(1))
            with _guard(logits):
                _launch_forward(call, terms, stats, config)
                if spec.is_masked:
                    _launch_selection(call, terms, stats, spec)
        return terms, stats

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        from . import backward

        rows = logits.numel() // logits.size(-1)
        if not rows:
            return
        config = tiling.backward_config(rows, logits.size(-1), _storage(logits, out), _device(logits.device))
        call = _Call(logits, targets, spec)
        variant = call.variant._replace(column_grads=True) if spec.is_extended else call.variant
        strides = (*call.strides, *row_strides(out), *grad_terms.stride())
        with _guard(logits):
            backward.gradient_kernel[(rows * config.splits,)](
                logits, out, call.targets, stats, grad_terms, call.columns, call.inner_rows, *strides, spec.vocab_size,
                spec.ignore_index, config.splits, variant, config.tile, **_options(config.tile),
            )  # fmt: skip


class _Call:
    """The arguments that all kernels of a call have in common."""

    def __init__(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> None:
        self.logits = logits
        self.columns = logits.size(-1)
        self.inner_rows = logits.size(-2)
        self.strides = row_strides(logits)
        self.vocab_size = spec.vocab_size
        self.ignore_index = spec.ignore_index
        kind = "none" if targets is None else "valid_mask" if targets.dtype == torch.bool else "labels"
        # Without targets a kernel still needs some pointer, which it never reads; a valid mask is read as bytes.
        self.targets = logits if targets is None else targets.view(torch.uint8) if kind == "valid_mask" else targets
        self.variant = tiling.variant(spec.alpha, spec.beta, spec.with_sced, kind, spec.is_masked)


def _launch_forward(call: _Call, terms: Tensor, stats: Tensor, config: tiling.LaunchConfig) -> None:
    from . import forward

    tile, splits = config
    variant = call.variant.before_selection if call.variant.topk else call.variant
    options = _options(tile)
    layout = (call.columns, call.inner_rows, *call.strides)
    count = terms.size(0)
    if splits == 1:
        forward.row_kernel[(count,)](
            call.logits, call.targets, terms, stats, *layout, call.vocab_size, call.ignore_index, variant, tile,
            **options,
        )  # fmt: skip
        return
    dtype = forward.ELEMENT[terms.dtype]
    width = forward.PARTIAL_HEAD.value + 2 + variant.moments + (variant.terms - len(TERMS))
    partials = torch.empty((count, splits, width), dtype=torch.float64, device=terms.device)
    sced_partials = torch.empty((count, splits, 2), dtype=torch.float64, device=terms.device)
    forward.partial_kernel[(count * splits,)](
        call.logits, call.targets, partials, *layout, call.ignore_index, splits, dtype, variant, tile, **options
    )
    if variant.second_pass:
        forward.second_kernel[(count * splits,)](
            call.logits, call.targets, partials, sced_partials, *layout, call.vocab_size, call.ignore_index, splits,
            dtype, variant, tile, tiling.MAX_SPLITS, **options,
        )  # fmt: skip
    forward.combine_kernel[(count,)](
        call.logits, call.targets, partials, sced_partials, terms, stats, *layout, call.vocab_size, call.ignore_index,
        splits, variant, tile, tiling.MAX_SPLITS, **options | {"num_warps": 1},
    )  # fmt: skip


def _launch_selection(call: _Call, terms: Tensor, stats: Tensor, spec: RowSpec) -> None:
    from . import select

    count = terms.size(0)
    config = tiling.selection_config(count, call.variant.one_pass, _storage(call.logits), _device(call.logits.device))
    tile, sizes, programs, registers = config
    options = _options(tile)
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    lists = torch.empty((programs, sizes.slots * sizes.room), dtype=call.logits.dtype, device=call.logits.device)
    select.topk_kernel[(programs,)](
        call.logits, call.targets, terms, stats, lists, count, call.columns, call.inner_rows, *call.strides,
        call.vocab_size, call.ignore_index, _bits(spec.k_scale), spec.k_min, spec.k_max, call.variant, tile, sizes,
        **options,
    )  # fmt: skip


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _storage(*matrices: Tensor) -> tiling.Storage:
    """The layout of ``matrices``: aligned16 if in every one of them each row starts at a multiple of 16 bytes."""
    first = matrices[0]
    aligned16 = all(
        (start * first.itemsize) % tiling.VECTOR_BYTES == 0
        for rows in matrices
        for start in (rows.data_ptr() // first.itemsize, *row_strides(rows))
    )
    return tiling.Storage(first.itemsize, aligned16, first.dtype == torch.bfloat16)


def _options(tile: tiling.Tile) -> dict[str, object]:
    return {**COMPILER_OPTIONS, "num_warps": tile.warps}


def _guard(logits: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of the logits current, because Triton launches on the current device."""
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
    if capability < MIN_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; triton's code needs 8.0 or later"
    return None
