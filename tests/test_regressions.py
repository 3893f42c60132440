"""Defects that a mutant introduced and no other test detected."""

from __future__ import annotations

import pytest
import torch

from caref_kernels import CarefConfig, caref_loss, ops
from caref_kernels.testing import make_case


def _far_apart(rows: torch.Tensor) -> torch.Tensor:
    """Rows that lie 2^31 elements apart; only the pages that are touched take memory."""
    stride = 2**31
    try:
        storage = torch.empty((len(rows) - 1) * stride + rows.size(-1), dtype=rows.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for rows so far apart: {error}")
    far = storage.as_strided(rows.shape, (stride, 1))
    return far.copy_(rows)


@pytest.mark.parametrize("inplace", [False, True])
def test_row_offsets_beyond_32_bits(backend, inplace):
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


def test_second_derivative_of_the_reference_passes_ignored_rows():
    """NaN in an ignored row must not come back through a masked select."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [1030, 5000])
def test_nan_among_masked_columns_before_the_maximum(backend, columns, dtype):
    """A row that begins with whole blocks of -inf, before any sum exists, still reports its NaN."""
    logits = torch.full((2, columns), -torch.inf, dtype=dtype)
    logits[:, -3:] = torch.tensor([1.0, 2.0, 0.5])
    logits[1, 5] = torch.nan
    labels = torch.tensor([columns - 1, columns - 2])
    leaf = logits.requires_grad_()
    loss = caref_loss(leaf, labels, reduction="none", backend=backend)
    assert torch.isfinite(loss[0])
    assert torch.isnan(loss[1])
    loss.sum().backward()
    assert torch.isfinite(leaf.grad[0]).all()
    assert torch.isnan(leaf.grad[1]).all()


def test_incoming_gradients_of_any_strides(backend):
    """The operator accepts incoming gradients of any strides, although autograd passes contiguous ones."""
    case = make_case("normal_1", 5, 40)
    spec = CarefConfig().row_spec(40)
    _, stats = ops.forward(case.logits, case.labels, spec, backend)
    grad_terms = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    layouts = {
        "contiguous": grad_terms,
        "transposed": grad_terms.t().contiguous().t(),
        "every second": grad_terms.repeat_interleave(2, -1)[:, ::2],
    }
    gradients = {name: ops.backward(g, case.logits, case.labels, stats, spec, backend) for name, g in layouts.items()}
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients["contiguous"]), name
    assert gradients["contiguous"].count_nonzero() > 0
