"""The ``accuracy`` term equals that of torch's arg-max, ties included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from caref_kernels import TopK, caref_loss, linear_caref_loss

ROWS, COLUMNS = 14, 37


def make_rows(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of coarse values, so that many have several maxima; half of the labels are the arg-max."""
    logits = torch.randn(ROWS, COLUMNS).round().to(dtype)
    labels = torch.randint(COLUMNS, (ROWS,))
    labels[::2] = logits.argmax(-1)[::2]
    labels[1::4] = logits.flip(-1).argmax(-1)[1::4].neg() + COLUMNS - 1  # the last one of them
    labels[:3] = -100
    return logits, labels


def counts(logits, labels):
    hits = (logits.argmax(-1) == labels) & (labels != -100)
    assert 0 < hits.sum() < (labels != -100).sum()
    return hits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.5}, {"lambda_sced": 0.0}, {"sparsity": TopK(3)}], ids=str)
def test_accuracy_is_that_of_torch(backend, dtype, options):
    torch.manual_seed(0)
    logits, labels = make_rows(dtype)
    hits = counts(logits, labels)
    rows = caref_loss(logits, labels, reduction="none", return_terms=True, backend=backend, **options).accuracy
    assert torch.equal(rows, hits.float())
    for reduction, items, divisor in (("sum", None, 1), ("mean", None, ROWS - 3), ("mean", 5, 5)):
        out = caref_loss(
            logits, labels, reduction=reduction, num_items=items, return_terms=True, backend=backend, **options
        )
        assert torch.equal(out.accuracy, hits.sum() / divisor)
        assert not out.accuracy.requires_grad


def test_an_ignored_row_is_never_right(backend):
    logits = functional.one_hot(torch.zeros(4, dtype=torch.long), COLUMNS).float()
    labels = torch.tensor([0, 0, 1, 1])
    out = caref_loss(logits, labels, ignore_index=0, return_terms=True, backend=backend)
    assert out.accuracy == 0


def test_heads_report_the_same_accuracy(backend):
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, 8), torch.randn(COLUMNS, 8)
    logits = hidden @ weight.t()
    labels = torch.randint(COLUMNS, (ROWS,))
    labels[::2] = logits.argmax(-1)[::2]
    labels[1] = -100
    out = linear_caref_loss(hidden, weight, labels, return_terms=True, backend=backend, chunk_rows=7)
    assert torch.equal(out.accuracy, counts(logits, labels).sum() / (ROWS - 1))
