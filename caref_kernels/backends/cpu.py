"""The compiled CPU kernels: tensors to raw pointers and back.  The row formulas are in csrc/."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..config import RowSpec
from ..objective import NUM_TERMS, accumulation_dtype, statistics_of

try:
    from .. import _C
except ImportError as error:  # a pure-Python installation; the reason is shown by unsupported()
    _C = None
    _missing = f"the compiled module caref_kernels._C is missing or does not load ({error})"


# GNU OpenMP's pool of threads does not survive a fork: a parallel region in the child would wait for it for ever.
_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_after_fork)


class CpuBackend:
    """See :class:`caref_kernels.backends.Backend`."""

    name = "cpu"

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """Needs the compiled module and logits on the CPU."""
        if _C is None:
            return _missing
        if logits.device.type != "cpu":
            return f"logits are on {logits.device}, this backend takes CPU tensors"
        return None

    def describe(self) -> str:
        return f"compiled, instruction set {_C.instruction_set()}, {torch.get_num_threads()} threads"

    def forward(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
        params = _row_params(logits, targets, spec)
        dtype = accumulation_dtype(logits.dtype)
        rows = params.outer_rows * params.inner_rows
        terms = torch.empty((rows, NUM_TERMS), dtype=dtype)
        stats = torch.empty((rows, len(statistics_of(spec))), dtype=dtype)
        params.terms, params.stats = terms.data_ptr(), stats.data_ptr()
        _C.forward(params)
        return terms, stats

    def backward(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        params = _row_params(logits, targets, spec)
        params.stats = stats.data_ptr()
        params.grad_terms = grad_terms.data_ptr()
        params.grad_row_stride, params.grad_term_stride = grad_terms.stride()
        params.grad_logits = out.data_ptr()
        params.out_outer_stride, params.out_inner_stride = _row_strides(out)
        _C.backward(params)


def _row_params(logits: Tensor, targets: Tensor | None, spec: RowSpec) -> _C.RowParams:
    params = _C.RowParams()
    params.logits, params.logits_dtype = logits.data_ptr(), _C.DTYPES[str(logits.dtype)]
    params.outer_rows = logits.size(0) if logits.dim() == 3 else 1
    params.inner_rows, params.columns = logits.shape[-2:]
    params.outer_stride, params.inner_stride = _row_strides(logits)
    if targets is not None:
        params.targets, params.targets_dtype = targets.data_ptr(), _C.DTYPES[str(targets.dtype)]
    params.alpha, params.beta, params.vocab_size, params.ignore_index, params.with_sced, *budget = spec
    params.k_scale, params.k_min, params.k_max = budget
    params.threads = 1 if _is_forked else torch.get_num_threads()
    return params


def _row_strides(rows: Tensor) -> tuple[int, int]:
    return (rows.stride(0), rows.stride(1)) if rows.dim() == 3 else (0, rows.stride(0))
