"""Every dtype against the oracle on the upcast logits; autocast, torch's defaults, denormals, order of rounding."""

from __future__ import annotations

import pytest
import torch

from caref_kernels import caref_loss, fused_sced
from caref_kernels.testing import (
    REGIMES,
    check_evaluation,
    check_gradient,
    check_identity,
    check_term,
    evaluate,
    evaluate_eager,
    make_case,
    oracle,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Backends whose threads take 16 bytes at a time.
ON_GPUS = ("triton", "cuda", "cuda-emulated")


@pytest.mark.parametrize("regime", REGIMES)
def test_float64_stays_float64(backend, regime):
    """float64 logits are computed in float64: the tolerance is 1e-12, six digits below what float32 reaches."""
    case = make_case(regime, 3, 2000, torch.float64, seed=1, ignored=1)
    actual = evaluate(*case, backend=backend)
    assert {term.dtype for term in actual.terms} == {torch.float64}
    assert {gradient.dtype for gradient in actual.gradients.values()} == {torch.float64}
    check_evaluation(actual, oracle(*case), label=regime)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(backend, dtype, regime):
    """The arithmetic is float32: terms are as accurate as for float32 logits, gradients are rounded once."""
    case = make_case(regime, 4, 5000, dtype, seed=2, ignored=1)
    check_evaluation(evaluate(*case, backend=backend), oracle(*case), evaluate_eager(*case), f"{regime} {dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_general_exponents_in_sixteen_bits(backend, dtype):
    case = make_case("lm_like", 3, 3000, dtype, seed=3)
    for alpha, beta in ((1.0, 0.0), (1.5, 0.5), (3.0, 2.0), (2.0, 0.0), (4.0, 1.0)):
        actual = evaluate(*case, alpha=alpha, beta=beta, backend=backend)
        check_evaluation(actual, oracle(*case, alpha=alpha, beta=beta), label=f"{alpha} {beta}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_has_the_dtype_of_the_logits(backend, dtype):
    case = make_case("normal_1", 3, 20, dtype)
    gradients = evaluate(*case, backend=backend).gradients
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}


def test_float16_gradient_is_scaled_before_it_is_rounded(backend):
    """In a mean over 8192 rows entries of 1e-9 survive a loss scale of 65536 only if it is applied in float32."""
    rows, columns, scale = 8192, 64, 65536.0
    case = make_case("normal_1", rows, columns, torch.float16, seed=4)
    leaf = case.logits.clone().requires_grad_()
    (caref_loss(leaf, case.labels, backend=backend) * scale).backward()
    expected = oracle(*case, ("loss",)).gradients["loss"] * (scale / rows)
    assert torch.isfinite(leaf.grad).all()
    check_gradient(leaf.grad, expected)
    small = leaf.grad == 0
    assert int(small.sum()) <= int((expected.half() == 0).sum()) + 1
    # The same through the auxiliary term alone, whose entries are smaller.
    leaf.grad = None
    (fused_sced(leaf, backend=backend) * scale).backward()
    check_gradient(leaf.grad, oracle(*case, ("sced",)).gradients["sced"] * (scale / rows))


def test_float16_gradient_of_a_wide_row(backend):
    """At V = 32128 nearly every entry of a float16 gradient that was rounded before scaling would be 0."""
    case = make_case("normal_1", 4, 32128, torch.float16, seed=5)
    leaf = case.logits.clone().requires_grad_()
    (fused_sced(leaf, num_items=8192, backend=backend) * 2.0**26).backward()
    expected = oracle(*case, ("sced",)).gradients["sced"] * (2.0**26 / 8192)
    check_gradient(leaf.grad, expected)
    assert torch.count_nonzero(leaf.grad) > 0.9 * leaf.grad.numel()


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, autocast_dtype):
    case = make_case("lm_like", 4, 300, seed=6)
    plain, inside, mixed = (case.logits.clone().requires_grad_() for _ in range(3))
    expected = caref_loss(plain, case.labels, backend=backend)
    expected.backward()
    with torch.autocast("cpu", dtype=autocast_dtype):
        loss = caref_loss(inside, case.labels, backend=backend)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(caref_loss(inside, case.labels, backend=backend), expected)
        loss.backward()
        across = caref_loss(mixed, case.labels, backend=backend)
    across.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(inside.grad, plain.grad)
    assert torch.equal(mixed.grad, plain.grad)


def test_global_settings_change_nothing(backend):
    case = make_case("lm_like", 4, 300, seed=7, ignored=1)
    expected = evaluate(*case, backend=backend)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        actual = evaluate(*case, backend=backend)
        mean = caref_loss(*case, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(mean, caref_loss(*case, backend=backend))
    for name, term in actual.terms._asdict().items():
        assert term.dtype == torch.float32
        assert torch.equal(term, getattr(expected.terms, name)), name
    for part, gradient in actual.gradients.items():
        assert torch.equal(gradient, expected.gradients[part]), part


def test_flushed_denormals(backend):
    case = make_case("normal_10", 4, 5000, seed=8)
    expected = oracle(*case)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        actual = evaluate(*case, backend=backend)
    finally:
        torch.set_flush_denormal(False)
    check_evaluation(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("into", [torch.float16, torch.bfloat16, torch.float64])
def test_incoming_gradient_may_have_another_dtype(backend, dtype, into):
    """Where the caller casts the loss, the incoming gradient has that dtype; the result has that of the logits."""
    case = make_case("lm_like", 4, 300, dtype, seed=9)
    leaf = case.logits.clone().requires_grad_()
    loss = caref_loss(leaf, case.labels, reduction="none", backend=backend)
    weights = torch.tensor([0.5, -2.0, 0.0, 1.5])
    (loss.to(into) * weights.to(into)).sum().backward()
    assert leaf.grad.dtype == dtype
    check_gradient(leaf.grad, oracle(*case, ("loss",)).gradients["loss"] * weights.double()[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_input_gives_the_same_terms(backend, dtype):
    """The terms of 16-bit logits are those of the same values in float32.

    They are bitwise identical except on a GPU, whose threads read 16 bytes of columns and add in another order.
    """
    case = make_case("lm_like", 4, 1025, dtype, seed=10)
    narrow = evaluate(*case, ("loss",), backend=backend)
    wide = evaluate(case.logits.float(), case.labels, ("loss",), backend=backend)
    for name, term in narrow.terms._asdict().items():
        check_identity(term, getattr(wide.terms, name), "float32", name)
        assert backend in ON_GPUS or torch.equal(term, getattr(wide.terms, name)), name
    if backend == "triton":
        check_gradient(narrow.gradients["loss"], wide.gradients["loss"].double())
    else:
        assert torch.equal(narrow.gradients["loss"], wide.gradients["loss"].to(dtype))


def test_mean_of_many_sixteen_bit_rows(backend):
    """The mean of 20,000 rows is exact to float32; row losses in 16 bits would lose it."""
    case = make_case("normal_1", 20_000, 9, torch.bfloat16, seed=11)
    exact = oracle(*case, ()).terms
    out = caref_loss(*case, return_terms=True, backend=backend)
    for name in ("loss", "ce", "sced", "kl"):
        check_identity(getattr(out, name), getattr(exact, name).mean(), "float32", name)
    check_term("loss", out.loss, exact.loss.mean())
