"""The backend of the compiled CPU kernels, which passes tensors as raw pointers.  The kernels are in csrc/cpu."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..config import RowSpec
from ..objective import TERMS, accumulation_dtype, statistics_of
from .compiled import MISSING, add_gradients, add_outputs, row_params
from .compiled import MODULE as _C

# GNU OpenMP's pool of threads does not survive a fork, and a parallel region in the child would wait for it for ever.
# A forked process therefore computes with one thread.
_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_after_fork)


class CpuBackend:
    """See :class:`caref_kernels.backends.Backend`."""

    name = "cpu"

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """Requires the compiled module and logits on the CPU."""
        if _C is None:
            return MISSING
        if logits.device.type != "cpu":
            return f"logits are on {logits.device}, this backend takes CPU tensors"
        return None

    def describe(self) -> str:
        return f"compiled, instruction set {_C.instruction_set()}, {torch.get_num_threads()} threads"

    def forward(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
        params = _params(logits, targets, spec)
        dtype = accumulation_dtype(logits.dtype)
        rows = params.outer_rows * params.inner_rows
        params.with_mean_of_shifts = spec.smoothed != 0
        terms = torch.empty((rows, len(TERMS) + params.with_mean_of_shifts), dtype=dtype)
        stats = torch.empty((rows, len(statistics_of(spec))), dtype=dtype)
        add_outputs(params, terms, stats)
        _C.forward(params)
        return terms, stats

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        params = _params(logits, targets, spec)
        add_gradients(params, grad_terms, stats, out)
        _C.backward(params)


def _params(logits: Tensor, targets: Tensor | None, spec: RowSpec):
    params = row_params(_C, logits, targets, spec)
    params.threads = 1 if _is_forked else torch.get_num_threads()
    return params
