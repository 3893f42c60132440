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
