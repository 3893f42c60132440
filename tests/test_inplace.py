"""Gradients written into the memory of the logits, where they must not be, and views with a negative bit."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caref_kernels import caref_loss, fused_sced, linear_caref_loss, ops
from caref_kernels.testing import check_identity, make_case

OVERLAPPING = {
    "rows": ((3, 8), (4, 1)),  # 0 < stride < V
    "outer rows": ((2, 3, 8), (12, 8, 1)),
    "inner rows": ((2, 3, 8), (40, 5, 1)),
    "equal rows of two batches": ((2, 3, 8), (8, 8, 1)),
    "rows of another order": ((3, 2, 8), (8, 20, 1)),
}
SEPARATE = {
    "padded": ((3, 8), (10, 1)),
    "transposed": ((3, 2, 8), (8, 24, 1)),
    "one row": ((1, 8), (3, 1)),
    "batches of one row": ((3, 1, 8), (8, 0, 1)),
    "one batch": ((1, 3, 8), (0, 9, 1)),
    "one column": ((4, 1), (2, 7)),
    "no row": ((0, 8), (1, 1)),
}


def _leaf() -> Tensor:
    return make_case("normal_1", 4, 7, torch.float32).logits.clone().requires_grad_()


@pytest.mark.parametrize("name", OVERLAPPING)
def test_inplace_backward_of_rows_that_overlap(backend, name):
    """Overlapping rows are refused: the gradient of one would overwrite the logits of another."""
    shape, strides = OVERLAPPING[name]
    leaf = torch.randn(64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.long)
    logits = (leaf * 1).as_strided(shape, strides)
    pattern = "share no memory .*" + re.escape(f"got shape {shape} with strides {strides}")
    with pytest.raises(ValueError, match=pattern):
        caref_loss(logits, labels, inplace_backward=True, backend=backend)
    gradients = [
        torch.autograd.grad(caref_loss(rows, labels, backend=backend), leaf, retain_graph=True)[0]
        for rows in (logits, logits.contiguous())
    ]
    check_identity(*gradients, "float32")


@pytest.mark.parametrize("name", SEPARATE)
def test_inplace_backward_of_rows_apart(backend, name):
    shape, strides = SEPARATE[name]
    leaf = torch.randn(64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.long)
    gradients = [
        torch.autograd.grad(
            caref_loss((leaf * 1).as_strided(shape, strides), labels, reduction="sum", backend=backend, **options), leaf
        )[0]
        for options in ({}, {"inplace_backward": True})
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("view", [torch._neg_view, lambda x: torch.complex(x, x).conj().imag], ids=["bit", "imag"])
def test_views_that_negate_their_memory(backend, view):
    """Logits, hidden states, weight and bias with a negative bit are read with their sign."""
    generator, labels = torch.Generator().manual_seed(3), torch.tensor([0, 1])
    logits, hidden, weight, bias = (torch.randn(*size, generator=generator) for size in ((2, 5), (2, 4), (5, 4), (5,)))

    def values(change):
        leaves = [tensor.clone().requires_grad_() for tensor in (logits, hidden, weight, bias)]
        z, h, w, b = (change(leaf) for leaf in leaves)
        loss = caref_loss(z, labels, backend=backend) + linear_caref_loss(h, w, labels, b, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert view(logits).is_neg()
    for ours, expected in zip(values(view), values(torch.neg), strict=True):
        assert torch.equal(ours, expected)


HOOKS = {
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "mutation allowed": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


@pytest.mark.parametrize("hooks", HOOKS)
def test_inplace_backward_under_saved_tensor_hooks(backend, hooks):
    """Saved-tensor hooks are refused: no version counter would report a later use of the overwritten logits."""
    labels = torch.tensor([0, 1, 2, 3])
    for loss in (
        lambda logits, **options: caref_loss(logits, labels, backend=backend, **options),
        lambda logits, **options: fused_sced(logits, backend=backend, **options),
    ):
        leaf = _leaf()
        with HOOKS[hooks]():
            logits = leaf * 1
            square = logits.square().sum()
            with pytest.raises(RuntimeError, match="inplace_backward=True cannot be used under saved-tensor hooks"):
                loss(logits, inplace_backward=True)
            with torch.no_grad():  # nothing is saved, so nothing is overwritten
                loss(logits, inplace_backward=True)
            loss(logits.detach(), inplace_backward=True)
            gradient = torch.autograd.grad(square + loss(logits), leaf)[0]
        plain = leaf.detach().clone().requires_grad_()
        expected = torch.autograd.grad(plain.square().sum() + loss(plain), plain)[0]
        check_identity(gradient, expected, "float32")


def test_inplace_backward_under_non_reentrant_checkpointing(backend):
    leaf = _leaf()
    labels = torch.tensor([0, 1, 2, 3])

    def loss(leaf):
        logits = leaf * 1
        return caref_loss(logits, labels, inplace_backward=True, backend=backend) + logits.square().sum()

    with pytest.raises(RuntimeError, match="inplace_backward=True cannot be used under saved-tensor hooks"):
        checkpoint(loss, leaf, use_reentrant=False)


def test_inplace_backward_in_two_threads_at_once(backend, monkeypatch):
    """A second backward that begins while the first one writes the logits must not read them."""
    leaf = _leaf()
    loss = caref_loss(leaf * 1, torch.tensor([0, 1, 2, 3]), inplace_backward=True, backend=backend)
    write, errors = ops.backward_, []

    def second_pass():
        try:
            loss.backward(retain_graph=True)
        except RuntimeError as error:
            errors.append(str(error))

    def interrupted(*arguments):
        monkeypatch.setattr(ops, "backward_", write)
        thread = threading.Thread(target=second_pass)
        thread.start()
        thread.join()
        write(*arguments)

    monkeypatch.setattr(ops, "backward_", interrupted)
    loss.backward(retain_graph=True)
    assert len(errors) == 1
    assert "another backward pass through the same retained graph is overwriting the logits" in errors[0]
    plain = leaf.detach().clone().requires_grad_()
    caref_loss(plain, torch.tensor([0, 1, 2, 3]), backend=backend).backward()
    assert torch.equal(leaf.grad, plain.grad)
