"""objective.py on any device and float dtype: the reference for the other backends; about ten (N, V) temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import objective
from ..checks import check_label_range, valid_labels
from ..config import RowSpec
from ..distributed import local_stats


class ReferenceBackend:
    """See :class:`caref_kernels.backends.Backend`."""

    name = "reference"

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """Runs wherever torch does."""
        return None

    def describe(self) -> str:
        return "plain PyTorch, any device, differentiable twice"

    def forward(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
        rows, labels, valid = _prepare(logits, targets, spec)
        terms = objective.row_terms(rows, labels, spec)
        stats = objective.row_statistics(rows, spec)
        return _zero_unless(valid, terms), _zero_unless(valid, stats)

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        rows, labels, valid = _prepare(logits, targets, spec)
        out.copy_(_zero_unless(valid, objective.row_gradient(rows, labels, grad_terms, spec)).view(logits.shape))

    def differentiable_gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, spec: RowSpec
    ) -> Tensor:
        """The gradient as a differentiable function of ``logits`` and ``grad_terms``."""
        rows, labels, valid = _prepare(logits, targets, spec)
        if spec.is_extended:
            grad_terms = objective.column_grads(grad_terms, rows.maximum[:, 0], rows.residual[:, 0], spec)
        gradient = objective.row_gradient(rows, labels, grad_terms, spec)
        return _zero_unless(valid, gradient).to(logits.dtype).view(logits.shape)

    def sums(self, logits: Tensor, labels: Tensor, spec: RowSpec) -> local_stats.LocalStats:
        return local_stats.local_sums(logits, labels, spec)

    def local_gradient(
        self, grad_terms: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        for rows in local_stats.blocks(logits):
            out[rows] = local_stats.column_gradient(logits[rows], labels[rows], grad_terms[rows], stats[rows], spec)


def _prepare(
    logits: Tensor, targets: Tensor | None, spec: RowSpec
) -> tuple[objective.ShiftedRows, Tensor | None, Tensor | None]:
    values = logits.reshape(-1, logits.size(-1)).to(objective.accumulation_dtype(logits.dtype))
    if targets is None:
        return _rows(values, spec), None, None
    if targets.dtype == torch.bool:
        labels, valid = None, targets[:, None]
    else:
        valid = valid_labels(targets, spec.ignore_index)[:, None]
        inside = (targets >= 0) & (targets < values.size(-1))
        check_label_range(targets, values.size(-1), spec.ignore_index)
        if targets.device.type != "cpu":
            values = torch.where(valid & ~inside[:, None], torch.nan, values)
        labels = torch.where(inside & valid[:, 0], targets, 0).long()
    # Rows that are not valid may hold anything, so they are replaced before any arithmetic.
    return _rows(torch.where(valid, values, 0.0), spec), labels, valid


def _rows(values: Tensor, spec: RowSpec) -> objective.ShiftedRows:
    return objective.with_top_k(objective.shift_rows(values), values, spec)


def _zero_unless(valid: Tensor | None, values: Tensor) -> Tensor:
    return values if valid is None else torch.where(valid, values, 0.0)
