"""Numbers that change from step to step, as in a warm-up of lambda, cost one more compilation and no other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_linear import make_problem
from torch._dynamo.testing import CompileCounterWithBackend

from caref_kernels import (
    CarefConfig,
    CarefLoss,
    EntropyTopK,
    LinearCarefLoss,
    caref_loss,
    fused_sced,
    linear_caref_loss,
)
from caref_kernels.testing import make_case

pytestmark = [  # of torch's own compiler
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
MODULE, HEAD = CarefLoss(), LinearCarefLoss()
WARM_UP = [0.02 * step for step in range(20)]  # from 0, where SCED is not computed
ITEMS = [40 + 3 * step for step in range(20)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _both(x, y, value, backend):
    out = caref_loss(x, y, lambda_sced=value, lambda_kl=2 * value, return_terms=True, backend=backend)
    return out.loss + 0.5 * out.kl


OF_LOGITS = {
    "lambda_sced": (WARM_UP, lambda x, y, v, b: caref_loss(x, y, lambda_sced=v, backend=b)),
    "lambda_kl": (WARM_UP, lambda x, y, v, b: caref_loss(x, y, lambda_kl=v, backend=b)),
    "both, with terms": (WARM_UP, _both),
    "per row": (WARM_UP, lambda x, y, v, b: caref_loss(x, y, lambda_sced=v, reduction="none", backend=b).sum()),
    "num_items": (ITEMS, lambda x, y, v, b: caref_loss(x, y, num_items=v, backend=b)),
    "num_items, real": ([1.5 * n for n in ITEMS], lambda x, y, v, b: fused_sced(x, num_items=v, backend=b)),
    "alpha": ([1 + v for v in WARM_UP], lambda x, y, v, b: caref_loss(x, y, alpha=v, backend=b)),
    "beta": ([1 + v for v in WARM_UP], lambda x, y, v, b: caref_loss(x, y, beta=v, backend=b)),
    "scale": (
        [0.1 + v for v in WARM_UP],
        lambda x, y, v, b: caref_loss(x, y, sparsity=EntropyTopK(scale=v), lambda_sced=1.0, backend=b),
    ),
    "module": (ITEMS, lambda x, y, v, b: MODULE(x, y, num_items=v)),
    "new module": (WARM_UP, lambda x, y, v, b: CarefLoss(lambda_sced=v, backend=b)(x, y)),
}
OF_HEADS = {
    "lambdas": (WARM_UP, lambda *h, v, b: linear_caref_loss(*h, lambda_sced=v, lambda_kl=2 * v, backend=b)),
    "per row": (WARM_UP, lambda *h, v, b: linear_caref_loss(*h, lambda_sced=v, reduction="none", backend=b).sum()),
    "num_items": (ITEMS, lambda *h, v, b: linear_caref_loss(*h, num_items=v, backend=b)),
    "alpha": ([1 + v for v in WARM_UP], lambda *h, v, b: linear_caref_loss(*h, alpha=v, chunk_rows=4, backend=b)),
    "module": (ITEMS, lambda *h, v, b: HEAD(*h, num_items=v)),
}


def _check(step, values, leaves, compiler="aot_eager"):
    """Two compilations at most, both within three steps, and results bitwise identical to eager code."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for index, value in enumerate(values):
        expected, actual = step(value), compiled(value)
        assert torch.equal(actual, expected)
        pair = (torch.autograd.grad(loss, leaves) for loss in (actual, expected))
        for ours, other in zip(*pair, strict=True):
            assert torch.equal(ours, other)
        if index == 2:
            early = counter.frame_count
    assert counter.frame_count == early <= 2


@pytest.mark.parametrize("name", OF_LOGITS)
def test_schedules_of_logits(backend, name):
    case = make_case("lm_like", 6, 50, seed=1, ignored=1)
    leaf = case.logits.clone().requires_grad_()
    values, loss = OF_LOGITS[name]
    _check(lambda value: loss(leaf * 1.0, case.labels, value, backend), values, [leaf])


@pytest.mark.parametrize("name", OF_HEADS)
def test_schedules_of_heads(backend, name):
    problem = make_problem(9, 33, 4, seed=2, ignored=2)
    values, loss = OF_HEADS[name]
    leaves = [problem.hidden, problem.weight, problem.bias]

    def step(value):
        return loss(problem.hidden * 1.0, problem.weight, problem.labels, problem.bias, v=value, b=backend)

    _check(step, values, leaves)


def test_schedule_by_replacing_a_configuration():
    case = make_case("lm_like", 6, 50, seed=3)
    leaf = case.logits.clone().requires_grad_()
    module = CarefLoss()

    def step(value):
        return module(leaf * 1.0, case.labels)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in WARM_UP:
        module.config = dataclasses.replace(module.config, lambda_sced=value)
        assert torch.equal(compiled(value), step(value))
    assert counter.frame_count <= 2


def test_schedules_under_inductor():
    case = make_case("lm_like", 6, 50, seed=4, ignored=1)
    leaf = case.logits.clone().requires_grad_()

    def step(value):
        return caref_loss(leaf * 1.0, case.labels, lambda_sced=value, lambda_kl=value / 2, num_items=value + 3)

    _check(step, WARM_UP, [leaf], "inductor")


def test_opcheck_of_numbers_that_change(backend):
    """The operands that replace numbers pass opcheck and give the values that the numbers give."""
    case = make_case("lm_like", 6, 33, seed=5)
    ops = torch.ops.caref_kernels
    spec, placeholder = (CarefConfig(alpha=alpha, sparsity=EntropyTopK(scale=s)).row_spec(33)
                         for alpha, s in ((1.5, 0.5), (2.0, 1.0)))  # fmt: skip
    numbers = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64, device="cpu")
    call = (case.logits, case.labels, *placeholder, backend, numbers)
    torch.library.opcheck(ops.forward.default, call)
    terms, stats = ops.forward(*call)
    expected = ops.forward(case.logits, case.labels, *spec, backend)
    assert torch.equal(terms, expected[0])
    assert torch.equal(stats, expected[1])
    call = (terms, case.logits, case.labels, stats, *placeholder, backend, numbers)
    torch.library.opcheck(ops.backward.default, call)
    varying = torch.tensor([1.0, 0.3, 0.0])
    torch.library.opcheck(ops.reduce.default, (terms, None, [1.0, 1.0, 1.0], False, False, varying))
    weights = varying.double().tolist()
    pair = (ops.reduce(terms, None, w, False, False, v)[0] for w, v in ((weights, None), ([1.0] * 3, varying)))
    assert torch.equal(*pair)
