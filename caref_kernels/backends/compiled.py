"""The compiled module, if it is installed, and the arguments of its calls: raw pointers, sizes and strides."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..config import RowSpec

try:
    from .. import _C as MODULE
except ImportError as error:  # a pure-Python installation; unsupported() reports the reason
    MODULE = None
    MISSING = f"the compiled module caref_kernels._C is missing or does not load ({error})"
else:
    MISSING = None


def row_params(module: ModuleType, logits: Tensor, targets: Tensor | None, spec: RowSpec):
    """The ``module.RowParams`` of a call, without its outputs; ``Backend`` documents the shapes."""
    params = module.RowParams()
    params.logits, params.logits_dtype = logits.data_ptr(), module.DTYPES[str(logits.dtype)]
    params.outer_rows = logits.size(0) if logits.dim() == 3 else 1
    params.inner_rows, params.columns = logits.shape[-2:]
    params.outer_stride, params.inner_stride = row_strides(logits)
    if targets is not None:
        params.targets, params.targets_dtype = targets.data_ptr(), module.DTYPES[str(targets.dtype)]
    params.alpha, params.beta, params.vocab_size, params.ignore_index, params.with_sced, *topk = spec[:8]
    params.k_scale, params.k_min, params.k_max = topk
    params.has_column_grads = spec.is_extended
    return params


def add_outputs(params, terms: Tensor, stats: Tensor) -> None:
    """Add the tensors that a forward writes."""
    params.terms, params.stats = terms.data_ptr(), stats.data_ptr()


def add_gradients(params, grad_terms: Tensor, stats: Tensor, out: Tensor) -> None:
    """Add the tensors that a backward reads besides the logits, and the gradient that it writes."""
    params.stats = stats.data_ptr()
    params.grad_terms = grad_terms.data_ptr()
    params.grad_row_stride, params.grad_term_stride = grad_terms.stride()
    params.grad_logits = out.data_ptr()
    params.out_outer_stride, params.out_inner_stride = row_strides(out)


def row_strides(rows: Tensor) -> tuple[int, int]:
    """The (outer, inner) strides of rows (N, V) or (B, T, V), in elements."""
    return (rows.stride(0), rows.stride(1)) if rows.dim() == 3 else (0, rows.stride(0))
