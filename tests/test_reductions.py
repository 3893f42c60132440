"""Sum, mean and none agree, divisors divide, the terms add up and can be used on their own."""

from __future__ import annotations

import math

import pytest
import torch

from caref_kernels import CarefConfig, CarefLoss, SCEDLoss, caref_loss, fused_sced
from caref_kernels.testing import check_gradient, check_identity, check_term, eager_terms, make_case, oracle

TERMS = ("loss", "ce", "sced", "kl", "entropy")


def test_reductions_agree(backend):
    """The mean divides by the number of valid rows, not of all rows."""
    case = make_case("lm_like", 12, 300, seed=1, ignored=5)
    out = {
        reduction: caref_loss(*case, reduction=reduction, return_terms=True, backend=backend)
        for reduction in ("none", "sum", "mean")
    }
    exact = eager_terms(case.logits.double(), case.labels)
    for name in TERMS:
        rows, total, mean = (getattr(out[reduction], name) for reduction in ("none", "sum", "mean"))
        assert rows.shape == (12,)
        assert total.shape == mean.shape == ()
        check_identity(total, rows.double().sum(), "float32", name)
        check_identity(mean, rows.double().sum() / 7, "float32", name)
        check_identity(mean, getattr(exact, name).sum() / 7, "float32_terms", name)


def test_mean_of_fused_sced_divides_by_the_valid_rows(backend):
    logits = make_case("lm_like", 6, 300, seed=2).logits
    valid = torch.tensor([True, False, True, True, False, True])
    rows = fused_sced(logits, valid=valid, reduction="none", backend=backend)
    check_identity(fused_sced(logits, valid=valid, backend=backend), rows.double().sum() / 4, "float32")
    check_identity(fused_sced(logits, backend=backend), fused_sced(logits, reduction="none").mean(), "float32")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_of_each_reduction(backend, reduction):
    case = make_case("lm_like", 6, 300, seed=3, ignored=2)
    leaf = case.logits.clone().requires_grad_()
    caref_loss(leaf, case.labels, reduction=reduction, backend=backend).sum().backward()
    expected = oracle(*case, ("loss",)).gradients["loss"]
    check_gradient(leaf.grad, expected / 4 if reduction == "mean" else expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_output_dtype_is_float32_or_float64(backend, dtype, reduction):
    case = make_case("normal_1", 3, 20, dtype)
    out = caref_loss(*case, reduction=reduction, return_terms=True, backend=backend)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {term.dtype for term in out if term is not None} == {expected}
    assert fused_sced(case.logits, reduction=reduction, backend=backend).dtype == expected


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [(0.1, 0.1), (0.5, 0.0), (0.0, 2.0), (0.0, 0.0)])
def test_terms_add_up(backend, reduction, weights):
    case = make_case("lm_like", 6, 300, seed=4, ignored=1)
    w_sced, w_kl = weights
    options = {"lambda_sced": w_sced, "lambda_kl": w_kl, "reduction": reduction, "backend": backend}
    out = caref_loss(*case, return_terms=True, **options)
    check_identity(out.loss, out.ce.double() + w_sced * out.sced.double() + w_kl * out.kl.double(), "float32")
    check_identity(caref_loss(*case, **options), out.loss, "float32")
    # The terms do not depend on the weights, also where a weight of 0 would let the work be skipped.
    exact = oracle(*case, ()).terms
    counts = (case.labels != -100).double()
    for name in ("ce", "sced", "kl", "entropy"):
        rows = getattr(exact, name) * counts
        expected = {"mean": rows.sum() / counts.sum(), "sum": rows.sum(), "none": rows}[reduction]
        check_identity(getattr(out, name), expected, "float32_terms", name)
    check_identity(
        out.kl + out.entropy,
        (counts if reduction == "none" else counts.sum()) * math.log(300)
        if reduction != "mean"
        else torch.tensor(math.log(300)),
        "float32",
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_are_differentiable(backend, reduction):
    """The terms may be weighted by the caller, with or without the loss; the entropy has no gradient."""
    case = make_case("lm_like", 5, 300, seed=5, ignored=1)
    leaf = case.logits.clone().requires_grad_()
    out = caref_loss(leaf, case.labels, reduction=reduction, return_terms=True, backend=backend)
    assert not out.entropy.requires_grad
    expected = oracle(*case).gradients
    scale = 4 if reduction == "mean" else 1
    for part in ("ce", "sced", "kl", "loss"):
        gradient = torch.autograd.grad(getattr(out, part).sum(), leaf, retain_graph=True)[0]
        check_gradient(gradient, expected[part] / scale, label=part)
    mixed = (2.0 * out.loss + 0.5 * out.kl - 3.0 * out.sced).sum()
    gradient = torch.autograd.grad(mixed, leaf)[0]
    check_gradient(
        gradient, (2 * expected["loss"] + 0.5 * expected["kl"] - 3 * expected["sced"]) / scale, label="mixed"
    )


def test_micro_batches(backend):
    """Eight micro-batches with the divisor of their batch, a number or a tensor, add up to it."""
    case = make_case("lm_like", 64, 300, seed=6, ignored=11)
    whole = case.logits.clone().requires_grad_()
    loss = caref_loss(whole, case.labels, backend=backend)
    loss.backward()
    for divisor in (53, 53.0, torch.tensor(53), torch.tensor(53.0)):
        leaf = case.logits.clone().requires_grad_()
        total = 0.0
        for part in torch.arange(64).split(8):
            piece = caref_loss(leaf[part], case.labels[part], num_items=divisor, backend=backend)
            piece.backward()
            total += piece.detach().double()
        check_identity(total, loss.detach(), "float32")
        check_identity(leaf.grad, whole.grad, "float32")


def test_num_items_divides_every_term(backend):
    case = make_case("lm_like", 5, 300, seed=7, ignored=2)
    summed = caref_loss(*case, reduction="sum", return_terms=True, backend=backend)
    divided = caref_loss(*case, num_items=12.5, return_terms=True, backend=backend)
    for name in TERMS:
        check_identity(getattr(divided, name), getattr(summed, name).double() / 12.5, "float32", name)
    sced = fused_sced(case.logits, num_items=12.5, backend=backend)
    check_identity(sced, fused_sced(case.logits, reduction="sum", backend=backend).double() / 12.5, "float32")


def test_sum_over_many_rows(backend):
    """The sum over 300,000 rows keeps the digits that float32 partial sums would lose."""
    case = make_case("normal_1", 300_000, 3, seed=8)
    exact = eager_terms(case.logits.double(), case.labels)
    out = caref_loss(*case, reduction="sum", return_terms=True, backend=backend)
    for name in TERMS:
        check_identity(getattr(out, name), getattr(exact, name).sum(), "float32", name)


def test_modules_are_the_functions(backend):
    case = make_case("lm_like", 4, 300, seed=9, ignored=1)
    options = {"alpha": 1.5, "beta": 0.5, "vocab_size": 310, "backend": backend}
    by_options, by_config = CarefLoss(lambda_sced=0.3, **options), CarefLoss(CarefConfig(lambda_sced=0.3, **options))
    expected = caref_loss(*case, lambda_sced=0.3, **options)
    assert torch.equal(by_options(*case), expected)
    assert torch.equal(by_config(*case), expected)
    assert torch.equal(by_config(*case, num_items=9), caref_loss(*case, lambda_sced=0.3, num_items=9, **options))
    valid = case.labels != -100
    assert torch.equal(SCEDLoss(**options)(case.logits, valid), fused_sced(case.logits, valid=valid, **options))
    assert "lambda_sced=0.3" in repr(by_config)
    check_term("loss", expected, torch.as_tensor(by_options(case.logits.double(), case.labels)))
