"""The oracle: objective.py on any device and float dtype.  About ten (N, V) temporaries; correct before fast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import objective
from ..config import RowSpec


class ReferenceBackend:
    """See :class:`caref_kernels.backends.Backend`."""

    name = "reference"

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """Runs wherever torch does."""
        return None

    def describe(self) -> str:
        return "plain PyTorch, any device, differentiable twice"

    def forward(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
        rows, labels, counts = _prepare(logits, targets, spec)
        terms = objective.row_terms(rows, labels, spec)
        stats = objective.row_statistics(rows, spec)
        return _finish(terms, counts), _finish(stats, counts)

    def backward(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        out.copy_(self.gradient(grad_terms, logits, targets, spec))

    def gradient(self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> Tensor:
        """The gradient as a differentiable function of ``logits`` and ``grad_terms``."""
        rows, labels, counts = _prepare(logits, targets, spec)
        gradient = objective.row_gradient(rows, labels, grad_terms, spec)
        return _finish(gradient, counts).to(logits.dtype).view(logits.shape)


def _prepare(
    logits: Tensor, targets: Tensor | None, spec: RowSpec
) -> tuple[objective.ShiftedRows, Tensor | None, Tensor | None]:
    values = logits.reshape(-1, logits.size(-1)).to(objective.accumulation_dtype(logits.dtype))
    if targets is None:
        return _rows(values, spec), None, None
    if targets.dtype == torch.bool:
        labels, counts = None, targets[:, None]
    else:
        counts = labelled(targets, spec.ignore_index)[:, None]
        inside = (targets >= 0) & (targets < values.size(-1))
        if targets.device.type == "cpu":
            check_labels(targets, values.size(-1), spec.ignore_index)
        else:  # without a synchronisation: the row becomes NaN
            values = torch.where(counts & ~inside[:, None], torch.nan, values)
        labels = torch.where(inside & counts[:, 0], targets, 0).long()
    # Rows that do not count may hold anything, so they are replaced before any arithmetic.
    return _rows(torch.where(counts, values, 0.0), spec), labels, counts


def _rows(values: Tensor, spec: RowSpec) -> objective.ShiftedRows:
    return objective.mask_rows(objective.shift_rows(values), values, spec)


def _finish(values: Tensor, counts: Tensor | None) -> Tensor:
    return values if counts is None else torch.where(counts, values, 0.0)


def labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels are not ``ignore_index``, which torch would wrap to the 32 bits of labels that are int32."""
    return (labels.long() if labels.dtype == torch.int32 else labels) != ignore_index


def check_labels(labels: Tensor, columns: int, ignore_index: int) -> None:
    """Raise IndexError for the first label on the CPU that is neither in [0, columns) nor ``ignore_index``."""
    wrong = ((labels < 0) | (labels >= columns)) & labelled(labels, ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(
            f"labels: target {int(labels[row])} at row {row} is out of range [0, {columns}) "
            f"and is not ignore_index={ignore_index}"
        )
