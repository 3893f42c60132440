"""The operators under opcheck; torch.compile and torch.export give results bitwise identical to eager mode."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from caref_kernels import CarefLoss, EntropyTopK, caref_loss, fused_sced
from caref_kernels.config import RowSpec
from caref_kernels.testing import make_case

# torch's own compiler warns about itself here and there; the warnings of this package stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
OPS = torch.ops.caref_kernels


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _operands(dtype, layout, targets):
    logits = make_case("lm_like", 6, 33, dtype, seed=1).logits
    if layout == "3-D strided":
        logits = torch.stack((logits, logits))[:, :3]
    labels = {
        "labels": torch.tensor([0, -100, 5, 7, 32, 1]),
        "mask": torch.tensor([True, False, True, True, False, True]),
        "none": None,
    }[targets]
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("layout", "targets", "options"),
    [
        ("2-D", "labels", {}),
        ("2-D", "mask", {}),
        ("3-D strided", "none", {}),
        ("2-D", "labels", {"k_scale": 0.5, "k_min": 1}),
        ("3-D strided", "mask", {"with_z": True, "smoothed": -1}),
    ],
)
def test_opcheck(backend, dtype, layout, targets, options):
    """Schema, fake and dispatch of every operator are right; the operators are not differentiable themselves."""
    logits, labels = _operands(dtype, layout, targets)
    spec = (*RowSpec(2.0, 1.0, 33, -100, True, **options), backend)
    terms, stats = OPS.forward(logits, labels, *spec)
    torch.library.opcheck(OPS.forward.default, (logits, labels, *spec))
    torch.library.opcheck(OPS.backward.default, (terms + 1, logits, labels, stats, *spec))
    torch.library.opcheck(OPS.backward_.default, (terms + 1, logits.clone(), labels, stats, *spec))
    divisor = torch.tensor(3.0, dtype=terms.dtype)
    for per_row in (False, True):
        for by in (divisor, None):
            torch.library.opcheck(
                OPS.reduce.default, (terms, by, [0.5] * terms.size(1), per_row, False, None, terms[:, 0])
            )


def _run(function, case, *arguments):
    leaf = case.logits.clone().requires_grad_()
    results = function(leaf, case.labels, *arguments)
    tensors = results if isinstance(results, tuple) else (results,)
    tensors[0].sum().backward()
    return [*(tensor.detach() for tensor in tensors), leaf.grad]


def _assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(torch.nan_to_num(a, nan=-7), torch.nan_to_num(b, nan=-7))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_inductor_is_bitwise_identical_to_eager_mode(backend, reduction):
    def step(logits, labels):
        out = caref_loss(logits * 1.0, labels, reduction=reduction, return_terms=True, backend=backend)
        return out.loss, out.ce, out.sced, out.kl

    case = make_case("lm_like", 6, 50, seed=2, ignored=1)
    _assert_same(_run(step, case), _run(torch.compile(step, fullgraph=True), case))


def test_masks_compile(backend):
    """A compiled function may construct the top-k policy and return the number of tokens it kept."""

    def step(logits, labels):
        out = caref_loss(
            logits * 1.0,
            labels,
            sparsity=EntropyTopK(scale=0.5),
            return_terms=True,
            backend=backend,
            reduction="none",
        )
        return out.loss, out.sced, out.num_kept

    case = make_case("lm_like", 6, 50, seed=2, ignored=1)
    _assert_same(_run(step, case), _run(torch.compile(step, fullgraph=True, backend="aot_eager"), case))


def test_other_arguments_compile(backend):
    """A valid mask, a tensor of items, real exponents, 16 bits and 3-D logits compile without a graph break."""
    valid = torch.tensor([[True, False, True], [True, True, False]])

    def step(logits, labels, items):
        rows = logits.view(2, 3, 50)
        loss = caref_loss(rows, labels.view(2, 3), alpha=1.5, beta=0.5, num_items=items, backend=backend)
        return loss + fused_sced(rows, valid=valid, vocab_size=60, backend=backend)

    case = make_case("lm_like", 6, 50, torch.bfloat16, seed=3, ignored=1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for items in (5.0, 9.0):
        _assert_same(_run(step, case, torch.tensor(items)), _run(compiled, case, torch.tensor(items)))


def test_dynamic_shapes_compile_at_most_three_times(backend):
    """Ten shapes, of other rows and then of other columns, take at most two recompilations."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, labels):
        return caref_loss(logits, labels, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows, columns in (
        (4, 50),
        (5, 50),
        (9, 50),
        (17, 50),
        (33, 50),
        (33, 51),
        (8, 99),
        (7, 128),
        (6, 129),
        (5, 200),
    ):
        case = make_case("lm_like", rows, columns, seed=rows, ignored=1)
        _assert_same(_run(step, case), _run(compiled, case))
    assert counter.frame_count <= 3


def test_second_backward(backend):
    def step(logits, labels):
        return caref_loss(logits * 2, labels, backend=backend)

    case = make_case("lm_like", 4, 50, seed=4)
    leaf = case.logits.clone().requires_grad_()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf, case.labels)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    assert torch.equal(first, _run(step, case)[-1])


def test_logits_used_after_the_loss_keep_their_value(backend):
    """Logits that are returned or overwritten later keep their value: the gradient needs memory of its own."""

    def step(logits, labels):
        scores = logits * 1.0
        loss = caref_loss(scores, labels, backend=backend)
        kept = scores + 0.0
        copy = scores.detach().clone().mul_(2.0)
        return loss, kept, copy

    case = make_case("lm_like", 4, 50, seed=5)
    eager, compiled = _run(step, case), _run(torch.compile(step, fullgraph=True), case)
    _assert_same(eager, compiled)
    assert torch.equal(compiled[1], case.logits)


def test_export_keeps_the_operator(backend):
    """The exported program contains the operator, gives the same value, and has a dynamic number of rows."""
    case = make_case("lm_like", 4, 50, seed=6, ignored=1)
    module = CarefLoss(backend=backend)
    rows = torch.export.Dim("rows", min=2)
    shapes = {"logits": {0: rows}, "labels": {0: rows}}
    program = torch.export.export(module, (case.logits, case.labels), dynamic_shapes=shapes)
    assert any("caref_kernels.forward" in str(node.target) for node in program.graph.nodes)
    for other in (case, make_case("lm_like", 9, 50, seed=7)):
        assert torch.equal(program.module()(*other), module(*other))


def test_requires_grad_may_change_after_tracing(backend):
    def step(logits, labels):
        return caref_loss(logits, labels, backend=backend)

    case = make_case("lm_like", 4, 50, seed=8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert not compiled(*case).requires_grad
    _assert_same(_run(step, case), _run(compiled, case))


EVERY_CALL = """
import torch
from caref_kernels import *

def step(logits, hidden, weight, labels):
    loss = caref_loss(logits, labels) + fused_sced(logits) + CarefLoss()(logits, labels) + SCEDLoss()(logits)
    return loss + linear_caref_loss(hidden, weight, labels) + LinearCarefLoss()(hidden, weight, labels)

leaves = [torch.randn(*size, requires_grad=True) for size in ((4, 50), (4, 8), (50, 8))]
torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, torch.tensor([0, 1, 2, 3])).backward()
"""


def test_no_call_warns():
    """A compiled call gives no warning; in a process of its own, because Dynamo gives each warning only once."""
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning", "-c", EVERY_CALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_inplace_backward_is_refused_under_compile(backend):
    def step(logits, labels):
        return caref_loss(logits * 1.0, labels, inplace_backward=True, backend=backend)

    case = make_case("lm_like", 4, 50, seed=9)
    with pytest.raises(Exception, match="inplace_backward=True is not supported under torch.compile"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(case.logits.requires_grad_(), case.labels)
