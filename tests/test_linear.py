"""A fused head has the loss and gradients of its materialised logits, for all chunks, dtypes and reductions."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from caref_kernels import (
    CarefConfig,
    EntropyTopK,
    LinearCarefLoss,
    TopK,
    backends,
    caref_loss,
    linear_caref_loss,
    linear_chunks,
)
from caref_kernels.linear_chunks import Head, NeedsInputGrad
from caref_kernels.ops import WholeRows
from caref_kernels.testing import GRADCHECK, IDENTITIES, check_identity

TERMS = ("loss", "ce", "sced", "kl", "entropy")
HEAD_IDENTITIES = {
    torch.float64: "float64",
    torch.float32: "float32_gradient",
    torch.bfloat16: "bfloat16_head",
    torch.float16: "float16_head",
}


class Problem(NamedTuple):
    """hidden (N, D), weight (V, D), labels (N,), bias (V,); leaves."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None


def make_problem(
    rows=37, columns=203, features=16, dtype=torch.float32, seed=0, ignored=9, bias=True
) -> Problem:  # sizes that no chunk, tile or register divides
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, sigma=1.0):
        return (sigma * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    labels = torch.randint(columns, (rows,), generator=generator)
    labels[torch.randperm(rows, generator=generator)[:ignored]] = CarefConfig.ignore_index
    return Problem(
        normal(rows, features),
        normal(columns, features, sigma=2 * features**-0.5),
        labels,
        normal(columns) if bias else None,
    )


def leaves(problem: Problem) -> list[Tensor]:
    return [tensor for tensor in (problem.hidden, problem.weight, problem.bias) if tensor is not None]


def doubled(problem: Problem) -> Problem:
    hidden, weight, bias = (
        None if tensor is None else tensor.detach().double().requires_grad_()
        for tensor in (problem.hidden, problem.weight, problem.bias)
    )
    return Problem(hidden, weight, problem.labels, bias)


def exact(problem: Problem, grad: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients from materialised float64 logits, by the reference."""
    wide = doubled(problem)
    logits = functional.linear(wide.hidden, wide.weight, wide.bias)
    loss = caref_loss(logits, wide.labels, backend="reference", **options)
    return loss.detach(), list(torch.autograd.grad(loss, leaves(wide), None if grad is None else grad.double()))


def check_gradients(problem: Problem, actual, expected, label: str = "") -> None:
    for gradient, exact_gradient, leaf in zip(actual, expected, leaves(problem), strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        check_identity(gradient, exact_gradient, HEAD_IDENTITIES[leaf.dtype], label)


# ---------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk_rows", [1, 2, 7, 37, 42, None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_equals_unchunked(backend, chunk_rows, reduction):
    """Chunks with different numbers of labels share one divisor."""
    problem = make_problem()
    options = {"reduction": reduction}
    loss = linear_caref_loss(*problem, chunk_rows=chunk_rows, backend=backend, **options)
    grad = torch.linspace(-1, 2, 37) if reduction == "none" else None
    expected_loss, expected = exact(problem, grad, **options)
    assert loss.shape == expected_loss.shape
    check_identity(loss.detach(), expected_loss, "float32")
    check_gradients(problem, torch.autograd.grad(loss, leaves(problem), grad), expected)


@pytest.mark.parametrize("dtype", list(HEAD_IDENTITIES))
@pytest.mark.parametrize("exponents", [(2.0, 1.0), (1.5, 0.5)])
def test_dtypes_and_exponents(backend, dtype, exponents):
    alpha, beta = exponents
    problem = make_problem(dtype=dtype, seed=1)
    options = {"alpha": alpha, "beta": beta, "lambda_sced": 0.5, "vocab_size": 210}
    loss = linear_caref_loss(*problem, chunk_rows=5, backend=backend, **options)
    expected_loss, expected = exact(problem, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_identity(loss.detach(), expected_loss, HEAD_IDENTITIES[dtype] if dtype != torch.float32 else "float32")
    check_gradients(problem, torch.autograd.grad(loss, leaves(problem)), expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 40),
    chunk_rows=st.integers(1, 12),
    ignored=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_any_chunk_size(rows, columns, chunk_rows, ignored, seed):
    problem = make_problem(rows, columns, 3, torch.float64, seed, min(ignored, rows))
    loss = linear_caref_loss(*problem, reduction="sum", chunk_rows=chunk_rows)
    expected_loss, expected = exact(problem, reduction="sum")
    check_identity(loss.detach(), expected_loss, "float64")
    for actual, other in zip(torch.autograd.grad(loss, leaves(problem)), expected, strict=True):
        check_identity(actual, other, "float64_far")  # sums of both signs


def test_gradcheck(backend):
    problem = make_problem(6, 11, 3, torch.float64, seed=2, ignored=2)

    def rows(hidden, weight, bias):
        out = linear_caref_loss(
            hidden, weight, problem.labels, bias, reduction="none", return_terms=True, chunk_rows=4, backend=backend
        )
        return out.loss, out.ce, out.sced, out.kl

    def mean(hidden, weight, bias):
        return linear_caref_loss(hidden, weight, problem.labels, bias, chunk_rows=4, backend=backend)

    for function in (rows, mean):
        assert torch.autograd.gradcheck(function, leaves(problem), **GRADCHECK)


def test_weight_gradient_does_not_degrade_with_the_number_of_chunks(backend):
    """Products are accumulated in float32, so the error of 256 chunks is that of one."""
    problem = make_problem(256, 64, 8, torch.bfloat16, seed=3, ignored=0)
    _, expected = exact(problem, reduction="sum")
    errors = []
    for chunk_rows in (256, 16, 1):
        loss = linear_caref_loss(*problem, reduction="sum", chunk_rows=chunk_rows, backend=backend)
        _, weight, bias = torch.autograd.grad(loss, leaves(problem))
        pairs = zip((weight, bias), expected[1:], strict=True)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in pairs])
    for one, many in ((errors[0], errors[1]), (errors[0], errors[2])):
        assert all(b <= 1.25 * a for a, b in zip(one, many, strict=True)), errors
    check_identity(weight, expected[1], "bfloat16_head")


def test_loss_scale_arrives_before_rounding(backend):
    """In float16 the loss scale is applied before rounding, so no gradient of a mean over many rows underflows."""
    problem = make_problem(512, 1000, 4, torch.float16, seed=4, ignored=0, bias=False)
    loss = linear_caref_loss(problem.hidden * 0.05, *problem[1:], backend=backend)
    scale = 2.0**14
    gradients = torch.autograd.grad(loss, leaves(problem), torch.tensor(scale))
    wide = doubled(problem)
    logits = functional.linear((problem.hidden * 0.05).detach().double() + 0.05 * (wide.hidden * 0), wide.weight)
    expected = torch.autograd.grad(scale * caref_loss(logits, wide.labels, backend="reference"), wide.weight)
    check_identity(gradients[1], expected[0], "float16_head")


# ------------------------------------------------------------------------------------- requested gradients, memory


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "hidden bias", "weight bias", ""])
def test_only_requested_gradients_exist(backend, wanted):
    problem = make_problem(seed=5)
    for name in ("hidden", "weight", "bias"):
        getattr(problem, name).requires_grad_(name in wanted.split())
    loss = linear_caref_loss(*problem, backend=backend)
    assert loss.requires_grad == bool(wanted)
    check_identity(loss.detach(), exact(problem)[0], "float32")
    if wanted:
        loss.backward()
        names = ("hidden", "weight", "bias")
        assert [name for name in names if getattr(problem, name).grad is not None] == wanted.split()
        for name, expected in zip(names, exact(problem)[1], strict=True):
            if name in wanted.split():
                check_identity(getattr(problem, name).grad, expected, "float32_gradient", name)


def test_tied_embedding_gets_the_gradients_of_both_uses(backend):
    """The weight is an embedding and the head: its gradient is the sum over both uses."""
    problem = make_problem(12, 50, 8, seed=6, bias=False, ignored=3)
    tokens = torch.arange(12)

    def gradient(weight, loss_of):
        return torch.autograd.grad(loss_of(torch.tanh(functional.embedding(tokens, weight)), weight), weight)[0]

    ours = gradient(
        problem.weight, lambda hidden, weight: linear_caref_loss(hidden, weight, problem.labels, backend=backend)
    )
    wide = problem.weight.detach().double().requires_grad_()
    expected = gradient(
        wide, lambda hidden, weight: caref_loss(hidden @ weight.t(), problem.labels, backend="reference")
    )
    check_identity(ours, expected, "float32_gradient")


class _NewMemory(TorchDispatchMode):
    """Elements of every piece of memory that an operator returned and that was not among ``known``."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.sizes.add(value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_and_no_gradient_of_a_frozen_head(fused_backend, frozen, dtype):
    rows, columns, features = 1024, 640, 7
    problem = make_problem(rows, columns, features, dtype, seed=7, ignored=0, bias=False)
    head = Head(problem.hidden.detach(), problem.weight.detach(), None)
    spec = CarefConfig().row_spec(columns).for_columns(columns)
    rows_of_loss = WholeRows(fused_backend, spec)
    with _NewMemory(*head[:2]) as made:
        linear_chunks.forward(
            head, problem.labels, rows_of_loss, [1.0, 0.1, 0.1], NeedsInputGrad(True, not frozen, False), 0
        )
    assert max(made.sizes) <= rows * columns // 2
    assert (columns * features in made.sizes) is not frozen


@pytest.mark.parametrize(
    ("shape", "dtype", "trains", "expected"),
    [
        # rows, V, D.  A chunk is a quarter of the logits, or the longest that D allows.
        ((4096, 32_128, 256), torch.float32, True, 704),
        ((4096, 32_128, 256), torch.float32, False, 960),
        ((1024, 32_128, 1024), torch.bfloat16, True, 512),
        ((4096, 128_256, 4096), torch.bfloat16, True, 1024),
        ((16384, 128_256, 4096), torch.bfloat16, True, 4096),
        ((16384, 128_256, 4096), torch.bfloat16, False, 3520),
        ((100, 50_000, 64), torch.float32, True, 100),
    ],
)
def test_chunks_of_real_heads(shape, dtype, trains, expected):
    rows, columns, features = shape
    with torch.device("meta"):
        head = Head(torch.empty(rows, features, dtype=dtype), torch.empty(columns, features, dtype=dtype), None)
    assert linear_chunks.auto_chunk_rows(rows, head, trains) == expected


# -------------------------------------------------------------------------------------------------- terms and modules


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_of_a_head(backend, reduction):
    problem = make_problem(seed=8)
    options = {"reduction": reduction, "return_terms": True, "lambda_sced": 0.0}
    out = linear_caref_loss(*problem, chunk_rows=10, backend=backend, **options)
    wide = doubled(problem)
    logits = functional.linear(wide.hidden, wide.weight, wide.bias)
    expected = caref_loss(logits, wide.labels, backend="reference", **options)
    assert not out.entropy.requires_grad
    for name in TERMS:
        check_identity(getattr(out, name).detach(), getattr(expected, name).detach(), "float32_terms", name)
    mixed, other = ((2 * o.loss + 0.5 * o.kl - 3 * o.sced).sum() for o in (out, expected))
    check_gradients(problem, torch.autograd.grad(mixed, leaves(problem)), torch.autograd.grad(other, leaves(wide)))


@pytest.mark.parametrize("sparsity", [TopK(5), EntropyTopK(scale=0.2, k_max=40)], ids=["top", "entropy"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparsity(backend, sparsity, reduction):
    """The top-k mask depends on its row alone, so the chunks do not change it."""
    problem = make_problem(seed=13)
    options = {"sparsity": sparsity, "lambda_sced": 1.0, "reduction": reduction}
    reason = backends.get(backend).unsupported(torch.empty(1, 2), CarefConfig(sparsity=sparsity).row_spec(203))
    if reason is not None:
        with pytest.raises(NotImplementedError, match=reason):
            linear_caref_loss(*problem, backend=backend, **options)
        return
    out = linear_caref_loss(*problem, chunk_rows=6, backend=backend, return_terms=True, **options)
    wide = doubled(problem)
    logits = functional.linear(wide.hidden, wide.weight, wide.bias)
    expected = caref_loss(logits, wide.labels, backend="reference", return_terms=True, **options)
    for name in (*TERMS, "num_kept"):
        check_identity(getattr(out, name).detach(), getattr(expected, name).detach(), "float32_terms", name)
    pair = (torch.autograd.grad(o.loss.sum(), leaves(p)) for o, p in ((out, problem), (expected, wide)))
    check_gradients(problem, *pair)


def test_module_equals_the_function_for_any_leading_dimensions():
    problem = make_problem(seed=9)
    shaped = problem.hidden.detach()[:36].view(3, 3, 4, -1).requires_grad_()
    labels = problem.labels[:36].view(3, 3, 4)
    flat = linear_caref_loss(problem.hidden[:36], problem.weight, problem.labels[:36], problem.bias, reduction="none")
    module = LinearCarefLoss(reduction="none", chunk_rows=8)
    loss = module(shaped, problem.weight, labels, problem.bias)
    assert loss.shape == (3, 3, 4)
    check_identity(loss.detach().flatten(), flat.detach(), "float32")
    loss.sum().backward()
    assert shaped.grad.shape == shaped.shape
    mean = LinearCarefLoss(CarefConfig(lambda_kl=0.3))
    assert torch.equal(mean(*problem, num_items=9), linear_caref_loss(*problem, lambda_kl=0.3, num_items=9))
    assert "lambda_kl=0.3" in repr(mean)


def test_micro_batches(backend):
    problem = make_problem(64, seed=10, ignored=11)
    whole = torch.autograd.grad(linear_caref_loss(*problem, backend=backend), leaves(problem))
    total = [torch.zeros_like(leaf) for leaf in leaves(problem)]
    for part in torch.arange(64).split(16):
        loss = linear_caref_loss(
            problem.hidden[part],
            problem.weight,
            problem.labels[part],
            problem.bias,
            num_items=torch.tensor(53),
            backend=backend,
        )
        total = [a + b for a, b in zip(total, torch.autograd.grad(loss, leaves(problem)), strict=True)]
    for a, b in zip(total, whole, strict=True):
        check_identity(a, b, "float32_terms")


def test_16_bit_heads_are_as_exact_as_materialised_logits():
    """A materialised head in the same dtype, with the loss in float32 and one rounding, is at most twice as exact."""
    problem = make_problem(256, 300, 32, torch.bfloat16, seed=11)
    logits = functional.linear(problem.hidden, problem.weight, problem.bias)
    eager = torch.autograd.grad(caref_loss(logits, problem.labels), leaves(problem))
    ours = torch.autograd.grad(linear_caref_loss(*problem), leaves(problem))
    _, expected = exact(problem)
    for mine, theirs, truth in zip(ours, eager, expected, strict=True):
        error, other = ((gradient.double() - truth).norm() / truth.norm() for gradient in (mine, theirs))
        assert error <= 2 * other
        assert other > IDENTITIES["bfloat16_head"] / 20
