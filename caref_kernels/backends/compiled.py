"""The compiled module, if it is there, and a call as it takes it: raw pointers, sizes and strides."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..config import RowSpec

try:
    from .. import _C as MODULE
except ImportError as error:  # a pure-Python installation; the reason is shown by unsupported()
    MODULE = None
    MISSING = f"the compiled module caref_kernels._C is missing or does not load ({error})"
else:
    MISSING = None


def row_params(module: ModuleType, logits: Tensor, targets: Tensor | None, spec: RowSpec):
    """``module.RowParams`` of a call, without its outputs; see ``Backend`` for the shapes."""
    params = module.RowParams()
    params.logits, params.logits_dtype = logits.data_ptr(), module.DTYPES[str(logits.dtype)]
    params.outer_rows = logits.size(0) if logits.dim() == 3 else 1
    params.inner_rows, params.columns = logits.shape[-2:]
    params.outer_stride, params.inner_stride = row_strides(logits)
    if targets is not None:
        params.targets, params.targets_dtype = targets.data_ptr(), module.DTYPES[str(targets.dtype)]
    params.alpha, params.beta, params.vocab_size, params.ignore_index, params.with_sced, *budget = spec
    params.k_scale, params.k_min, params.k_max = budget
    return params


def add_outputs(params, terms: Tensor, stats: Tensor) -> None:
    """What a forward writes."""
    params.terms, params.stats = terms.data_ptr(), stats.data_ptr()


def add_gradients(params, grad_terms: Tensor, stats: Tensor, out: Tensor) -> None:
    """What a backward reads and writes besides."""
    params.stats = stats.data_ptr()
    params.grad_terms = grad_terms.data_ptr()
    params.grad_row_stride, params.grad_term_stride = grad_terms.stride()
    params.grad_logits = out.data_ptr()
    params.out_outer_stride, params.out_inner_stride = row_strides(out)


def row_strides(rows: Tensor) -> tuple[int, int]:
    """(outer, inner) strides of the rows, in elements."""
    return (rows.stride(0), rows.stride(1)) if rows.dim() == 3 else (0, rows.stride(0))
