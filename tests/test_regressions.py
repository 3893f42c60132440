"""Mistakes that a mutant made and no other test noticed."""

from __future__ import annotations

import pytest
import torch

from caref_kernels import caref_loss
from caref_kernels.testing import make_case


def _far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, 2^31 elements from one another; only the pages that are touched take memory."""
    stride = 2**31
    try:
        storage = torch.empty((len(rows) - 1) * stride + rows.size(-1), dtype=rows.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for rows so far apart: {error}")
    far = storage.as_strided(rows.shape, (stride, 1))
    return far.copy_(rows)


@pytest.mark.parametrize("inplace", [False, True])
def test_row_offsets_beyond_32_bits_G01(backend, inplace):
    case = make_case("normal_3", 2, 50, torch.bfloat16)
    losses, gradients = [], []
    for logits in (case.logits, _far_apart(case.logits)):
        leaf = logits.requires_grad_()
        loss = caref_loss(leaf.view_as(leaf), case.labels, inplace_backward=inplace, reduction="none", backend=backend)
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    assert gradients[0][1].count_nonzero() > 0


def test_second_derivative_of_the_reference_passes_ignored_rows_L10():
    """NaN in a row that does not count must not come back through a masked select."""
    case = make_case("normal_1", 3, 7, torch.float64)
    logits = case.logits.clone()
    logits[1] = torch.nan
    labels = case.labels.clone()
    labels[1] = -100
    leaf = logits.requires_grad_()
    loss = caref_loss(leaf, labels, backend="reference")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert second[1].count_nonzero() == 0
    assert torch.isfinite(second).all()
    assert second[0].count_nonzero() > 0
