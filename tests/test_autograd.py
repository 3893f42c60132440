"""The autograd node: derivatives, incoming gradients of any kind, memory, in-place use, and refused calls."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from caref_kernels import caref_loss, fused_sced
from caref_kernels.testing import GRADCHECK, check_gradient, check_identity, make_case, oracle

EXPONENTS = [(2.0, 1.0), (1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (3.0, 2.0), (1.0, 0.0), (4.0, 2.0)]


def _leaf(rows=4, columns=7, dtype=torch.float64, seed=0):
    return make_case("normal_1", rows, columns, dtype, seed).logits.clone().requires_grad_()


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_gradcheck_of_exponents(backend, alpha, beta):
    """gradcheck in slow mode, with an ignored row, on the loss and the three terms at once."""
    labels = torch.tensor([1, -100, 6, 0])
    for reduction in ("mean", "none"):

        def terms(logits, reduction=reduction):
            out = caref_loss(
                logits, labels, alpha=alpha, beta=beta, lambda_sced=0.7, lambda_kl=0.3, reduction=reduction,
                return_terms=True, backend=backend,
            )  # fmt: skip
            return out[:4]

        assert torch.autograd.gradcheck(terms, _leaf(), **GRADCHECK)
    assert torch.autograd.gradcheck(
        lambda logits: fused_sced(logits, alpha=alpha, beta=beta, backend=backend), _leaf(), **GRADCHECK
    )


@pytest.mark.parametrize("regime", ["normal_10", "tied_maxima", "confident_1e-4"])
def test_gradcheck_of_regimes(backend, regime):
    leaf = make_case(regime, 3, 9, torch.float64, 1).logits.requires_grad_()
    if regime == "tied_maxima":  # finite differences need the tie broken by more than their step
        leaf = (leaf.detach() + torch.arange(9) * 1e-4).requires_grad_()
    labels = torch.tensor([1, 3, 5])
    assert torch.autograd.gradcheck(lambda logits: caref_loss(logits, labels, backend=backend), leaf, **GRADCHECK)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_second_derivative_of_the_reference(alpha, beta):
    labels = torch.tensor([1, -100, 6])

    def loss(logits):
        return caref_loss(logits, labels, alpha=alpha, beta=beta, lambda_sced=0.7, lambda_kl=0.3, backend="reference")

    assert torch.autograd.gradgradcheck(loss, _leaf(3), **GRADCHECK)


@pytest.mark.parametrize("factor", [2.0, 0.25, -1.0, 3.0, 1 / 7, 0.0])
def test_scaled_loss_scales_the_gradient(backend, factor):
    case = make_case("lm_like", 4, 300, seed=1)
    for reduction in ("mean", "sum"):
        leaf = case.logits.clone().requires_grad_()
        plain = torch.autograd.grad(caref_loss(leaf, case.labels, reduction=reduction, backend=backend), leaf)[0]
        scaled = torch.autograd.grad(
            caref_loss(leaf, case.labels, reduction=reduction, backend=backend) * factor, leaf
        )[0]
        check_identity(scaled, plain * factor, "float32")
        if factor in (2.0, 0.25, -1.0, 0.0):
            assert torch.equal(scaled, plain * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradient_per_row_follows_its_incoming_gradient(backend, dtype):
    """Each row has its own incoming gradient, 0 and negative ones among them."""
    case = make_case("lm_like", 6, 300, dtype, seed=2)
    weights = torch.tensor([1.0, 0.0, -2.5, 0.3, -0.7, 11.0])
    leaf = case.logits.clone().requires_grad_()
    loss = caref_loss(leaf, case.labels, reduction="none", backend=backend)
    gradient = torch.autograd.grad(loss, leaf, weights.to(loss.dtype))[0]
    assert torch.count_nonzero(gradient[1]) == 0
    expected = oracle(*case, ("loss",)).gradients["loss"] * weights.to(loss.dtype).double()[:, None]
    check_gradient(gradient, expected)


def test_strides_of_the_incoming_gradient(backend):
    """An expanded, a strided and a transposed incoming gradient give bitwise the result of a contiguous one."""
    case = make_case("lm_like", 6, 50, seed=3)
    leaf = case.logits.clone().view(2, 3, 50).requires_grad_()
    out = caref_loss(leaf, case.labels.view(2, 3), reduction="none", return_terms=True, backend=backend)
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    layouts = [
        torch.tensor(1.7).expand(2, 3),
        weights[:, 1].view(2, 3),
        weights.view(-1)[:6].view(3, 2).t(),
        weights[:, :1].reshape(2, 3).expand(2, 3),
        weights[:2, :1].expand(2, 3),
    ]
    for part in ("loss", "sced", "kl"):
        for weight in layouts:
            term = getattr(out, part)
            strided = torch.autograd.grad(term, leaf, weight, retain_graph=True)[0]
            dense = torch.autograd.grad(term, leaf, weight.contiguous(), retain_graph=True)[0]
            assert torch.equal(strided, dense), (part, weight.stride())
    summed = torch.autograd.grad(out.loss.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(summed, torch.autograd.grad(out.loss, leaf, torch.ones(2, 3))[0])


def test_backward_twice(backend):
    case = make_case("lm_like", 4, 300, seed=4)
    leaf = case.logits.clone().requires_grad_()
    loss = caref_loss(leaf, case.labels, backend=backend)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_second_derivative_is_refused(fused_backend):
    """A second derivative raises: a penalty on the gradient must not silently become a constant."""
    leaf = _leaf()
    loss = caref_loss(leaf, torch.tensor([0, 1, 2, 3]), backend=fused_backend)
    gradient = torch.autograd.grad(loss, leaf, create_graph=True)[0]
    check_gradient(gradient.detach(), oracle(leaf, torch.tensor([0, 1, 2, 3]), ("loss",)).gradients["loss"] / 4)
    with pytest.raises(RuntimeError, match=r"once_differentiable|double backward|second derivative"):
        (loss + gradient.square().sum()).backward()


def test_second_derivative_through_the_incoming_gradient(fused_backend):
    leaf, weight = _leaf(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = caref_loss(leaf, torch.tensor([0, 1, 2, 3]), reduction="none", backend=fused_backend)
    gradient = torch.autograd.grad(loss, leaf, weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|double backward|second derivative"):
        gradient.square().sum().backward()


def test_nothing_is_saved_without_gradient(backend):
    case = make_case("lm_like", 4, 300, seed=5)
    leaf = case.logits.clone().requires_grad_()
    expected = caref_loss(leaf, case.labels, backend=backend).detach()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plain = caref_loss(case.logits, case.labels, return_terms=True, backend=backend)
        with torch.no_grad():
            quiet = caref_loss(leaf, case.labels, return_terms=True, backend=backend)
        with torch.inference_mode():
            inferred = caref_loss(leaf, case.labels, return_terms=True, backend=backend)
    assert saved == []
    for out in (plain, quiet, inferred):
        assert torch.equal(out.loss, expected)
        assert not any(term.requires_grad for term in out if term is not None)


def test_logits_are_left_alone(backend):
    case = make_case("lm_like", 4, 300, seed=6, ignored=1)
    leaf = case.logits.clone().requires_grad_()
    version = leaf._version
    loss = caref_loss(leaf, case.labels, backend=backend)
    assert torch.equal(leaf.detach(), case.logits)
    loss.backward()
    assert torch.equal(leaf.detach(), case.logits)
    assert leaf._version == version
    assert leaf.grad.data_ptr() != leaf.data_ptr()


@pytest.mark.parametrize("upstream", [torch.exp, torch.sigmoid, lambda x: torch.softmax(x, -1)])
def test_upstream_op_that_saved_the_logits(backend, upstream):
    source = make_case("normal_1", 4, 40, torch.float64, seed=7).logits
    labels = torch.tensor([0, 1, 2, 3])
    gradients = []
    for name in (backend, "reference"):
        leaf = source.clone().requires_grad_()
        caref_loss(upstream(leaf), labels, backend=name).backward()
        gradients.append(leaf.grad)
    check_identity(*gradients, "float64")


def test_inplace_backward(backend):
    """The gradient is written into the memory of the logits, and autograd reports a later use of their old value."""
    case = make_case("lm_like", 4, 300, torch.bfloat16, seed=8, ignored=1)
    gradients = []
    for inplace in (False, True):
        leaf = case.logits.clone().requires_grad_()
        logits = leaf * 1
        loss = caref_loss(logits, case.labels, inplace_backward=inplace, backend=backend)
        assert torch.equal(logits.detach(), case.logits)
        seen = []
        logits.register_hook(lambda gradient, seen=seen: seen.append(gradient.data_ptr()))
        loss.backward()
        gradients.append(leaf.grad)
        assert (seen[0] == logits.data_ptr()) == inplace
    assert torch.equal(*gradients)


def test_second_use_of_overwritten_logits(backend):
    leaf = _leaf(dtype=torch.float32)
    labels = torch.tensor([0, 1, 2, 3])
    logits = leaf * 1
    loss = caref_loss(logits, labels, inplace_backward=True, backend=backend)
    other = logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_two_losses_on_the_same_logits_add_up(backend):
    case = make_case("lm_like", 4, 300, seed=9)
    leaf = case.logits.clone().requires_grad_()
    total = caref_loss(leaf, case.labels, backend=backend) + 3 * fused_sced(leaf, reduction="sum", backend=backend)
    total.backward()
    exact = oracle(*case).gradients
    check_gradient(leaf.grad, exact["loss"] / 4 + 3 * exact["sced"])


def test_expanded_logits_get_the_sum_over_their_copies(backend):
    row = make_case("lm_like", 1, 300, seed=10).logits
    labels = torch.tensor([3, 1, 4, 1])
    leaf = row.clone().requires_grad_()
    caref_loss(leaf.expand(4, 300), labels, backend=backend).backward()
    check_gradient(leaf.grad, oracle(row.expand(4, 300), labels, ("loss",)).gradients["loss"].mean(0, keepdim=True))
    assert torch.equal(leaf.detach(), row)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_the_same_gradient(backend, use_reentrant):
    case = make_case("lm_like", 4, 300, seed=11)
    plain, recomputed = (case.logits.clone().requires_grad_() for _ in range(2))
    caref_loss(plain * 2, case.labels, backend=backend).backward()
    checkpoint(
        lambda logits: caref_loss(logits * 2, case.labels, backend=backend), recomputed, use_reentrant=use_reentrant
    ).backward()
    assert torch.equal(plain.grad, recomputed.grad)


def test_hooks_fire_under_anomaly_mode(backend):
    case = make_case("lm_like", 4, 300, seed=12)
    leaf = case.logits.clone().requires_grad_()
    fired = []
    leaf.register_hook(lambda gradient: fired.append(("hook", gradient.shape)))
    leaf.register_post_accumulate_grad_hook(lambda tensor: fired.append(("accumulated", tensor.grad.shape)))
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        caref_loss(leaf, case.labels, backend=backend).backward()
    assert fired == [("hook", leaf.shape), ("accumulated", leaf.shape)]


def test_forward_and_backward_may_run_in_different_threads(backend):
    case = make_case("lm_like", 4, 300, seed=13)
    here, there = (case.logits.clone().requires_grad_() for _ in range(2))
    caref_loss(here, case.labels, backend=backend).backward()
    losses = []
    forward = threading.Thread(target=lambda: losses.append(caref_loss(there, case.labels, backend=backend)))
    forward.start()
    forward.join()
    backward = threading.Thread(target=lambda: losses[0].backward())
    backward.start()
    backward.join()
    assert torch.equal(here.grad, there.grad)


@pytest.mark.parametrize("return_terms", [False, True])
def test_nothing_is_kept_alive(backend, return_terms):
    """There is no reference cycle: without the garbage collector the logits are freed together with the loss."""
    labels = torch.tensor([0, 1, 2, 3])
    gc.collect()
    gc.disable()
    try:
        for use_backward in (False, True):
            leaf = _leaf()
            logits = leaf * 1
            alive = weakref.ref(logits)
            loss = caref_loss(logits, labels, return_terms=return_terms, backend=backend)
            if use_backward:
                (loss.loss if return_terms else loss).backward()
            del logits, loss
            assert alive() is None
    finally:
        gc.enable()


def test_saved_tensor_hooks_may_replace_what_is_saved(backend):
    case = make_case("lm_like", 4, 300, seed=14, ignored=1)
    plain, offloaded = (case.logits.clone().requires_grad_() for _ in range(2))
    caref_loss(plain, case.labels, backend=backend).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
        loss = caref_loss(offloaded, case.labels, backend=backend)
    loss.backward()
    assert torch.equal(plain.grad, offloaded.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # inside torch.func.jvp
def test_function_transforms_are_refused(backend):
    labels = torch.tensor([0, 1, 2, 3])
    leaf = _leaf().detach()

    def loss(logits):
        return caref_loss(logits, labels, backend=backend)

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(loss)(leaf)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.jvp(loss, (leaf,), (leaf,))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda logits: fused_sced(logits, backend=backend))(leaf.expand(2, 4, 7))
    with pytest.raises(NotImplementedError, match=r"jvp|forward"), forward_ad.dual_level():
        loss(forward_ad.make_dual(leaf, leaf))
