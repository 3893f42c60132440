"""Heads with scaled or capped logits, as in Cohere, Granite and Gemma 2, against float64 autograd."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import pytest
import torch
from test_linear import HEAD_IDENTITIES, TERMS, check_gradients, doubled, leaves, make_problem
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from caref_kernels import CarefConfig, LinearCarefLoss, TopK, caref_loss, linear_caref_loss, linear_chunks
from caref_kernels.linear_chunks import Head, NeedsInputGrad
from caref_kernels.ops import WholeRows
from caref_kernels.testing import GRADCHECK, check_identity


class Form(NamedTuple):
    """How a head makes its logits."""

    logit_scale: float = 1.0
    softcap: float | None = None


FORMS = [Form(0.0625), Form(1.7), Form(1.0, 3.0), Form(0.4, 30.0), Form(2.5, 0.5)]
NAMES = [f"scale {form.logit_scale} cap {form.softcap}" for form in FORMS]


def make_logits(problem, form: Form) -> Tensor:
    logits = form.logit_scale * functional.linear(problem.hidden, problem.weight, problem.bias)
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)


def exact(problem, form: Form, grad: Tensor | None = None, **options):
    """Loss and gradients from float64 logits, by torch and the reference."""
    wide = doubled(problem)
    loss = caref_loss(make_logits(wide, form), wide.labels, backend="reference", **options)
    return loss.detach(), torch.autograd.grad(loss, leaves(wide), None if grad is None else grad.double())


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("dtype", list(HEAD_IDENTITIES))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_and_gradients(backend, form, dtype, reduction):
    """Values and gradients are right if made in the forward, and if made again for incoming gradients per row."""
    problem = make_problem(dtype=dtype, seed=1)
    grad = torch.linspace(-1, 2, 37) if reduction == "none" else None
    options = {"reduction": reduction, "lambda_sced": 0.5}
    expected_loss, expected = exact(problem, form, grad, **options)
    for chunk_rows in (5, None):
        loss = linear_caref_loss(*problem, **form._asdict(), chunk_rows=chunk_rows, backend=backend, **options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check_identity(loss.detach(), expected_loss, "float32" if dtype == torch.float32 else HEAD_IDENTITIES[dtype])
        given = None if grad is None else grad.to(loss.dtype)
        check_gradients(problem, torch.autograd.grad(loss, leaves(problem), given), expected)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_gradcheck(backend, form):
    problem = make_problem(5, 11, 3, torch.float64, seed=2, ignored=1)

    def rows(hidden, weight, bias):
        return linear_caref_loss(
            hidden, weight, problem.labels, bias, **form._asdict(), reduction="none", chunk_rows=3, backend=backend
        )

    assert torch.autograd.gradcheck(rows, leaves(problem), **GRADCHECK)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "hidden weight", "hidden bias", ""])
@pytest.mark.parametrize("form", [Form(0.5), Form(0.5, 3.0)], ids=["scale", "cap"])
def test_frozen_weights_and_constant_biases_get_no_gradient(backend, wanted, form):
    problem = make_problem(seed=3)
    expected_loss, expected = exact(problem, form)
    for name in ("hidden", "weight", "bias"):
        getattr(problem, name).requires_grad_(name in wanted.split())
    loss = linear_caref_loss(*problem, **form._asdict(), chunk_rows=8, backend=backend)
    check_identity(loss.detach(), expected_loss, "float32")
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward()
    for name, gradient in zip(("hidden", "weight", "bias"), expected, strict=True):
        if name in wanted.split():
            check_identity(getattr(problem, name).grad, gradient, "float32_gradient", name)
        else:
            assert getattr(problem, name).grad is None


@pytest.mark.parametrize("form", [Form(0.5), Form(0.5, 3.0)], ids=["scale", "cap"])
@pytest.mark.parametrize("bias", [True, False])
def test_terms(backend, form, bias):
    problem = make_problem(seed=4, bias=bias)
    options = {"return_terms": True, "sparsity": TopK(7)}
    out = linear_caref_loss(*problem, **form._asdict(), chunk_rows=10, backend=backend, **options)
    wide = doubled(problem)
    expected = caref_loss(make_logits(wide, form), wide.labels, backend="reference", **options)
    for name in (*TERMS, "num_kept"):
        check_identity(getattr(out, name).detach(), getattr(expected, name).detach(), "float32_terms", name)
    mixed, other = (2 * o.loss + 0.5 * o.kl - 3 * o.sced for o in (out, expected))
    check_gradients(problem, torch.autograd.grad(mixed, leaves(problem)), torch.autograd.grad(other, leaves(wide)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cap_rounds_nothing_in_16_bits(backend, dtype):
    """In 16 bits only the product is rounded: the loss is that of its values, capped in float64."""
    problem = make_problem(dtype=dtype, seed=11, bias=False)
    product = (problem.hidden @ problem.weight.t()).detach().double()
    loss = linear_caref_loss(*problem, softcap=4.0, backend=backend)
    expected = caref_loss(4 * torch.tanh(product / 4), problem.labels, backend="reference")
    check_identity(loss.detach(), expected, "float32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saturated_caps_keep_their_gradients(backend, dtype):
    """Gradients survive logits of 5 to 11 times the cap, where 1 - tanh^2 in float32 would be 0 or one rounding."""
    problem = make_problem(bias=False, ignored=0, dtype=dtype, seed=5)
    with torch.no_grad():  # logits of 5 to 11 of either sign
        problem.hidden.copy_(functional.one_hot(torch.arange(37) % 16, 16))
        problem.weight.copy_((5 + 6 * torch.rand_like(problem.weight)) * problem.weight.sign())
    form = Form(1.0, 1.0)
    expected_loss, expected = exact(problem, form)
    loss = linear_caref_loss(*problem, **form._asdict(), chunk_rows=9, backend=backend)
    check_identity(loss.detach(), expected_loss, HEAD_IDENTITIES[dtype] if dtype != torch.float32 else "float32")
    for ours, other in zip(torch.autograd.grad(loss, leaves(problem)), expected, strict=True):
        check_identity(ours, other, HEAD_IDENTITIES[dtype] if dtype != torch.float64 else "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1e3, 6e4])
def test_logits_far_beyond_the_cap(backend, dtype, size):
    """Logits far beyond the cap do not overflow: the loss is that of the cap, the gradient 0."""
    problem = make_problem(6, 9, 4, dtype, ignored=0, bias=False)
    with torch.no_grad():  # one summand a logit, of either sign
        problem.hidden.copy_(size * functional.one_hot(torch.arange(6) % 4, 4) * problem.hidden.sign())
        problem.weight.copy_(problem.weight.sign())
    signs = (problem.hidden @ problem.weight.t()).detach().sign().float()
    loss = linear_caref_loss(*problem, logit_scale=1.5, softcap=2.0, backend=backend)
    check_identity(loss.detach(), caref_loss(2 * signs, problem.labels, backend="reference"), "float32")
    for gradient in torch.autograd.grad(loss, leaves(problem)):
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_scale_of_a_power_of_two_is_bitwise_identical_to_scaled_states(backend, dtype, softcap):
    """A scale rounds neither the logits nor a gradient before the incoming gradient is applied."""
    problem = make_problem(dtype=dtype, seed=6, bias=False)
    scaled = (problem.hidden.detach() * 0.25).requires_grad_()
    ours = linear_caref_loss(*problem, logit_scale=0.25, softcap=softcap, chunk_rows=7, backend=backend)
    other = linear_caref_loss(scaled, *problem[1:], softcap=softcap, chunk_rows=7, backend=backend)
    assert torch.equal(ours, other)
    pair = torch.autograd.grad(ours, leaves(problem)), torch.autograd.grad(other, (scaled, problem.weight))
    assert torch.equal(pair[0][0], pair[1][0] * 0.25)
    assert torch.equal(pair[0][1], pair[1][1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_small_scale_does_not_underflow_in_float16(backend, reduction):
    """The loss scale and a small factor are multiplied in float32."""
    problem = make_problem(64, 300, 8, torch.float16, seed=7, ignored=0)
    form, scale = Form(2.0**-13), 2.0**13
    loss = linear_caref_loss(*problem, **form._asdict(), reduction=reduction, backend=backend)
    grad = torch.full(loss.shape, scale)
    expected = exact(problem, form, grad, reduction=reduction)[1]
    check_gradients(problem, torch.autograd.grad(loss, leaves(problem), grad), expected)


class _Operators(TorchDispatchMode):
    """The operators that were dispatched, and the peak bytes of all storages of at least ``least`` bytes."""

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.names: list[str] = []
        self.least, self.live, self.peak = least, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                place, size = value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
                if size >= self.least and place not in self.live:
                    self.live[place] = size
                    weakref.finalize(value, self.live.pop, place)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def _dispatched(problem, form: Form, backend: str, needs: NeedsInputGrad, least: int = 0) -> _Operators:
    head = Head(*(None if t is None else t.detach() for t in (problem.hidden, problem.weight, problem.bias)), *form)
    spec = CarefConfig().row_spec(head.weight.size(0)).for_columns(head.weight.size(0))
    with _Operators(least) as operators:
        linear_chunks.forward(head, problem.labels, WholeRows(backend, spec), [1.0, 0.1, 0.1], needs, 0)
    return operators


@pytest.mark.parametrize("bias", [True, False])
def test_a_scale_costs_no_operator(fused_backend, bias):
    problem = make_problem(bias=bias)
    plain, scaled = (
        _dispatched(problem, form, fused_backend, NeedsInputGrad(True, True, bias)).names
        for form in (Form(), Form(0.5))
    )
    assert [name.replace("addmm", "mm") for name in scaled] == [name.replace("addmm", "mm") for name in plain]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    # The product and the logits of a chunk; in 16 bits also the part of it that is widened at a time, here all of it.
    [(torch.float32, [4, 4]), (torch.bfloat16, [2, 4, 4])],
)
def test_memory_of_a_cap(fused_backend, dtype, expected, monkeypatch):
    monkeypatch.setattr(linear_chunks, "SMALL_CHUNK_BYTES", 0)
    rows, columns = 2048, 640
    problem = make_problem(rows, columns, 7, dtype, ignored=0, bias=False)
    chunk = linear_chunks.LEAST_ROWS * columns
    made = _dispatched(problem, Form(1.0, 5.0), fused_backend, NeedsInputGrad(True, False, False), chunk)
    assert made.peak == chunk * sum(expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "trains", "expected"),
    [
        # As in test_linear.py, and the rows of the same memory: a half in float32, a third in 16 bits.
        ((4096, 32_128, 256), torch.float32, True, 320),
        ((8192, 256_000, 2304), torch.bfloat16, True, 640),
        ((8192, 256_000, 2304), torch.bfloat16, False, 640),
        ((16384, 128_256, 4096), torch.bfloat16, False, 1152),
        ((100, 50_000, 64), torch.float32, True, 100),
    ],
)
def test_chunks_of_real_heads(shape, dtype, trains, expected):
    rows, columns, features = shape
    with torch.device("meta"):
        tensors = torch.empty(rows, features, dtype=dtype), torch.empty(columns, features, dtype=dtype), None
    assert linear_chunks.auto_chunk_rows(rows, Head(*tensors, 1.0, 30.0), trains) == expected


def test_module_equals_the_function():
    problem = make_problem(seed=8)
    module = LinearCarefLoss(logit_scale=0.5, softcap=3.0, chunk_rows=8, lambda_kl=0.3)
    loss = linear_caref_loss(*problem, logit_scale=0.5, softcap=3.0, chunk_rows=8, lambda_kl=0.3)
    assert torch.equal(module(*problem), loss)
    assert "softcap=3.0" in repr(module)


FACTOR = r"{} must be finite and > 0 in float32; got {}"
WRONG = [
    ({"logit_scale": 0}, ValueError, FACTOR.format("logit_scale", "0")),
    ({"logit_scale": -0.5}, ValueError, FACTOR.format("logit_scale", "-0.5")),
    ({"logit_scale": math.nan}, ValueError, FACTOR.format("logit_scale", "nan")),
    ({"logit_scale": 1e39}, ValueError, FACTOR.format("logit_scale", r"1e\+39")),
    ({"logit_scale": None}, TypeError, "logit_scale must be a Python float or int; got None"),
    (
        {"logit_scale": torch.tensor(2.0)},
        TypeError,
        "logit_scale must be .*gradients with respect to logit_scale are not provided",
    ),
    ({"softcap": 0.0}, ValueError, FACTOR.format("softcap", "0.0")),
    ({"softcap": -30}, ValueError, FACTOR.format("softcap", "-30")),
    ({"softcap": math.inf}, ValueError, FACTOR.format("softcap", "inf")),
    ({"softcap": "30"}, TypeError, "softcap must be a Python float or int; got '30'"),
    ({"softcap": True}, TypeError, "softcap must be a Python float or int; got True"),
    ({"logit_scale": 1e30, "softcap": 1e-30}, ValueError, FACTOR.format("logit_scale / softcap", "1e")),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(options) for options, *_ in WRONG])
def test_wrong_options_are_refused(options, error, message):
    for call in (lambda: linear_caref_loss(*make_problem(), **options), lambda: LinearCarefLoss(**options)):
        with pytest.raises(error, match=f"^{message}"):
            call()


# ------------------------------------------------------------------------------------------------------- the compiler


compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@compiler
@pytest.mark.parametrize("form", [Form(0.5), Form(0.5, 3.0)], ids=["scale", "cap"])
def test_opcheck(backend, form):
    problem = make_problem(6, 33, 4, ignored=2)
    hidden, weight, bias = (tensor.detach() for tensor in leaves(problem))
    spec = (*CarefConfig().row_spec(33), backend)
    ops = torch.ops.caref_kernels
    call = (hidden, weight, bias, *form, problem.labels, [1.0, 0.1, 0.1], (True, True, True), 4, *spec)
    torch.library.opcheck(ops.linear_forward.default, call)
    terms, stats, *_ = ops.linear_forward(*call)
    call = (terms + 1, hidden, weight, None, *form, problem.labels, stats, (True, True, False), 4, *spec)
    torch.library.opcheck(ops.linear_backward.default, call)


@compiler
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", [Form(0.5), Form(0.5, 3.0)], ids=["scale", "cap"])
def test_compiled_equals_eager(backend, form, reduction):
    torch._dynamo.reset()

    def step(hidden, weight, bias, labels):
        return linear_caref_loss(
            hidden * 1.0, weight, labels, bias, **form._asdict(), reduction=reduction, chunk_rows=8, backend=backend
        ).sum()

    problem = make_problem(seed=9)
    arguments = (*leaves(problem), problem.labels)
    eager, loss = step(*arguments), torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(eager, loss)
    pair = (torch.autograd.grad(value, leaves(problem)) for value in (eager, loss))
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)
