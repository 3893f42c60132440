"""Calls of a fused head: wrong arguments, labels, autograd, autocast and torch.compile."""

from __future__ import annotations

import gc
import math
import sys
import weakref

import pytest
import torch
import torch._functorch.config
from test_linear import check_gradients, doubled, exact, leaves, make_problem
from torch.nn import functional

from caref_kernels import CarefConfig, LinearCarefLoss, caref_loss, linear, linear_caref_loss
from caref_kernels.testing import check_identity

HIDDEN, WEIGHT, LABELS = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])


def _call(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, bias=None, **options):
    return lambda: linear_caref_loss(hidden, weight, labels, bias, **{"backend": "reference", **options})


CALLS = [
    (
        _call(weight=WEIGHT.half()),
        ValueError,
        r"hidden, weight and bias must have one dtype .*; got hidden torch.float32, weight torch.float16",
    ),
    (
        _call(bias=torch.zeros(5).double()),
        ValueError,
        "hidden, weight and bias must have one dtype .* weight torch.float32, bias torch.float64",
    ),
    (
        _call(weight=WEIGHT.to("meta")),
        ValueError,
        "hidden, weight and bias must be on one device; got hidden cpu, weight meta",
    ),
    (_call(labels=LABELS.to("meta")), ValueError, "labels: on meta, but hidden are on cpu"),
    (_call(hidden=torch.zeros(4)), ValueError, r"hidden: expected shape \(\.\.\., 4\) .*got \(4,\)"),
    (_call(hidden=torch.zeros(2, 3)), ValueError, r"hidden: .* weight of shape \(5, 4\); got \(2, 3\)"),
    (_call(weight=torch.zeros(5, 4, 1)), ValueError, r"weight: expected shape \(V, D\) .*; got \(5, 4, 1\)"),
    (_call(bias=torch.zeros(4)), ValueError, r"bias: expected shape \(5,\); got \(4,\)"),
    (
        _call(labels=torch.tensor([0])),
        ValueError,
        r"labels: expected shape \(2,\) for hidden of shape \(2, 4\); got \(1,\)",
    ),
    (_call(hidden=[[0.0]]), TypeError, "hidden: expected a dense torch.Tensor; got .*list"),
    (_call(weight=WEIGHT.to_sparse()), TypeError, "weight: expected a dense torch.Tensor; got a torch.sparse"),
    (_call(hidden=HIDDEN.long()), TypeError, "hidden: dtype must be one of .*; got torch.int64"),
    (_call(labels=LABELS.float()), TypeError, "labels: target must hold class indices"),
    (_call(weight=torch.zeros(0)), ValueError, r"weight has 0 elements, shape \(0,\) \(a ZeRO-3 or FSDP shard"),
    (_call(alpha=0.5), ValueError, "alpha must be in"),
    (_call(vocab_size=51), ValueError, r"vocab_size must be in \[1, 10 \* columns\]"),
    (_call(num_items=0), ValueError, "num_items must be > 0 where there are valid rows; got 0 for 2"),
    (_call(backend="quantum"), ValueError, "backend must be 'auto' or one of"),
    (_call(chunk_rows=0), ValueError, "chunk_rows must be >= 1 or None; got 0"),
    (_call(chunk_rows=2.0), TypeError, "chunk_rows must be an integer or None; got 2.0"),
    (lambda: LinearCarefLoss(chunk_rows=-1), ValueError, "chunk_rows must be >= 1 or None; got -1"),
    (
        lambda: LinearCarefLoss(inplace_backward=True)(HIDDEN, WEIGHT, LABELS),
        ValueError,
        "inplace_backward must be False",
    ),
    (lambda: linear_caref_loss(HIDDEN, WEIGHT, LABELS, None, 2.0), TypeError, ".*positional"),
]


NAMES = [case[2][:40] for case in CALLS]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=NAMES)
def test_wrong_calls_are_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


# ---------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("label", [5, -1, -101, 2**31, -(2**63)])
def test_label_out_of_range_names_its_row(raising_backend, label):
    """The error names the row of the batch, not of the chunk, and comes before any product."""
    labels = torch.tensor([0, -100, 1, label, 2])
    with pytest.raises(IndexError, match=rf"target {label} at row 3 is out of range \[0, 5\)"):
        linear_caref_loss(torch.zeros(5, 4), WEIGHT, labels, chunk_rows=1, backend=raising_backend)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_label_at_all(backend, rows):
    problem = make_problem(rows, 9, 3, ignored=rows)
    mean = linear_caref_loss(*problem, backend=backend)
    assert math.isnan(mean.detach())
    total = linear_caref_loss(*problem, reduction="sum", backend=backend)
    each = linear_caref_loss(*problem, reduction="none", backend=backend)
    divided = linear_caref_loss(*problem, num_items=7, backend=backend)
    assert float(total.detach()) == float(divided.detach()) == float(each.detach().sum()) == 0
    assert each.shape == (rows,)
    for loss in (mean, total, each.sum(), divided):
        for gradient, leaf in zip(torch.autograd.grad(loss, leaves(problem)), leaves(problem), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


def test_ignored_rows_may_hold_anything(backend):
    problem = make_problem(seed=1)
    spoiled = problem.hidden.detach().clone()
    spoiled[problem.labels == -100] = math.nan
    spoiled.requires_grad_()
    loss = linear_caref_loss(spoiled, *problem[1:], backend=backend)
    clean = linear_caref_loss(*problem, backend=backend)
    assert torch.equal(loss, clean)
    inputs = (spoiled, problem.weight, problem.bias)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(clean, leaves(problem)), strict=True):
        assert torch.equal(a, b)
    assert not a.isnan().any()


def test_one_spoiled_row_is_one_spoiled_row(backend):
    problem = make_problem(seed=2, ignored=0)
    with torch.no_grad():
        problem.hidden[3] = math.nan
    rows = linear_caref_loss(*problem, reduction="none", chunk_rows=5, backend=backend)
    assert rows.isnan().nonzero().flatten().tolist() == [3]


# -------------------------------------------------------------------------------------------------------- autograd


def test_second_backward_of_a_head(backend):
    """A retained graph gives the gradients again, not scaled twice; without one torch raises."""
    problem = make_problem(seed=3)
    loss = linear_caref_loss(*problem, chunk_rows=8, backend=backend)
    first = [gradient.clone() for gradient in torch.autograd.grad(3 * loss, leaves(problem), retain_graph=True)]
    second = torch.autograd.grad(-loss, leaves(problem))
    for a, b in zip(first, second, strict=True):
        check_identity(a, -3 * b, "float32")
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves(problem))


def test_second_backward_between_any_two_bytecodes_of_the_first(backend):
    """Another thread may interrupt a backward anywhere: only one pass scales the ready gradients in place."""
    problem = make_problem(seed=13)
    expected = torch.autograd.grad(linear_caref_loss(*problem, backend=backend), leaves(problem))
    taking = linear._linear_gradients.__code__

    def both(step):
        """Gradients of a pass, and of the one that begins and ends before the bytecode of that number, if there is."""
        loss, inner, seen = linear_caref_loss(*problem, backend=backend), [], []

        def trace(frame, event, _argument):
            if frame.f_code is not taking or inner:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                seen.append(event)
                if len(seen) == step:
                    inner.extend(torch.autograd.grad(loss, leaves(problem), retain_graph=True))
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            return torch.autograd.grad(loss, leaves(problem), retain_graph=True), inner
        finally:
            sys.settrace(previous)

    for step in range(1, 30):
        for gradients in both(step):
            for ours, other in zip(gradients, expected, strict=True):
                check_identity(ours, other, "float32")


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_double_backward_is_refused(backend, reduction):
    problem = make_problem(seed=4)
    loss = linear_caref_loss(*problem, reduction=reduction, backend=backend).sum()
    gradients = torch.autograd.grad(loss, leaves(problem), create_graph=True)
    assert all(gradient.requires_grad for gradient in gradients)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradients[1].square().sum(), problem.hidden)


def test_incoming_gradients(backend):
    """Incoming gradients may differ per row, be negative, 0 or expanded, or be a scalar other than 1."""
    problem = make_problem(seed=5)
    grad = torch.randn(37, generator=torch.Generator().manual_seed(1))
    grad[::5] = 0
    loss = linear_caref_loss(*problem, reduction="none", chunk_rows=9, backend=backend)
    check_gradients(
        problem, torch.autograd.grad(loss, leaves(problem), grad), exact(problem, grad, reduction="none")[1], "random"
    )
    loss = linear_caref_loss(*problem, reduction="none", chunk_rows=9, backend=backend)
    total = exact(problem, reduction="sum")[1]
    check_gradients(problem, torch.autograd.grad(loss.sum(), leaves(problem)), total, "expanded")
    loss = linear_caref_loss(*problem, reduction="sum", backend=backend)
    check_gradients(problem, torch.autograd.grad(loss / 7, leaves(problem)), [g / 7 for g in total], "scalar")


def test_no_gradient_no_work(backend):
    problem = make_problem(seed=6)
    expected = linear_caref_loss(*problem, backend=backend).detach()
    with torch.no_grad():
        assert torch.equal(linear_caref_loss(*problem, backend=backend), expected)
    with torch.inference_mode():
        assert torch.equal(linear_caref_loss(*problem, backend=backend), expected)
    detached = [None if t is None else t.detach() for t in problem]
    assert not linear_caref_loss(*detached, backend=backend).requires_grad


def test_inputs_stay_as_they_are(backend):
    problem = make_problem(seed=7)
    before = [leaf.detach().clone() for leaf in leaves(problem)]
    linear_caref_loss(*problem, backend=backend).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(problem), strict=True))


def test_checkpointed_head(backend):
    problem = make_problem(seed=8)
    plain = torch.autograd.grad(linear_caref_loss(*problem, backend=backend), leaves(problem))
    loss = torch.utils.checkpoint.checkpoint(
        lambda hidden, weight, bias: linear_caref_loss(hidden, weight, problem.labels, bias, backend=backend),
        *leaves(problem),
        use_reentrant=False,
    )
    for a, b in zip(torch.autograd.grad(loss, leaves(problem)), plain, strict=True):
        assert torch.equal(a, b)


def test_a_weight_changed_before_the_backward_is_an_error(backend):
    problem = make_problem(seed=9)
    loss = linear_caref_loss(*problem, backend=backend)
    with torch.no_grad():
        problem.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_kept_alive(backend):
    problem = make_problem(seed=10)
    gc.collect()
    gc.disable()
    try:
        for use_backward in (False, True):
            hidden = problem.hidden * 1
            alive = weakref.ref(hidden)
            loss = linear_caref_loss(hidden, *problem[1:], backend=backend)
            if use_backward:
                loss.backward()
            del hidden, loss
            assert alive() is None
    finally:
        gc.enable()


def test_function_transforms_are_refused(backend):
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda hidden: linear_caref_loss(hidden, WEIGHT, LABELS, backend=backend))(HIDDEN)


# -------------------------------------------------------------------------------------------- autocast, the compiler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """Under autocast the products are in 16 bits; the gradient of a float32 weight is not rounded to them."""
    problem = make_problem(seed=11)
    device = problem.hidden.device.type
    with torch.autocast(device, dtype):
        loss = linear_caref_loss(*problem, chunk_rows=8, backend=backend)
        with torch.autocast(device, enabled=False):
            full = linear_caref_loss(*problem, backend=backend)
    loss.backward()
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves(problem)]
    explicit = linear_caref_loss(low[0], low[1], problem.labels, low[2], chunk_rows=8, backend=backend)
    assert torch.equal(loss, explicit)
    assert not torch.equal(loss, full)
    identity = f"{str(dtype).removeprefix('torch.')}_head"
    for leaf, expected in zip(leaves(problem), exact(problem)[1], strict=True):
        assert leaf.grad.dtype == torch.float32
        check_identity(leaf.grad, expected, identity)
    assert not torch.equal(problem.weight.grad, problem.weight.grad.to(dtype).float())
    with torch.autocast(device, dtype):
        wide = doubled(problem)
        assert linear_caref_loss(*wide, backend=backend).dtype == torch.float64


compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@compiler
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)])
def test_opcheck_of_heads(backend, needs):
    problem = make_problem(6, 33, 4, ignored=2)
    hidden, weight, bias = (tensor.detach() for tensor in leaves(problem))
    spec = (*CarefConfig().row_spec(33), backend)
    ops = torch.ops.caref_kernels
    call = (hidden, weight, bias, 1.0, None, problem.labels, [1.0, 0.1, 0.1], needs, 4, *spec)
    torch.library.opcheck(ops.linear_forward.default, call)
    terms, stats, *_ = ops.linear_forward(*call)
    call = (terms + 1, hidden, weight, None, 1.0, None, problem.labels, stats, needs, 4, *spec)
    torch.library.opcheck(ops.linear_backward.default, call)


@compiler
@torch._functorch.config.patch(donated_buffer=False)  # else torch refuses retain_graph by itself
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_head_equals_eager(backend, reduction):
    """A head compiles to one graph, bitwise identical to eager mode, and a second backward is not scaled twice."""
    torch._dynamo.reset()

    def step(hidden, weight, bias, labels):
        return linear_caref_loss(
            hidden * 1.0, weight, labels, bias, reduction=reduction, chunk_rows=8, backend=backend
        ).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (37, 21):
        problem = make_problem(rows, seed=rows)
        arguments = (*leaves(problem), problem.labels)
        eager, loss = step(*arguments), compiled(*arguments)
        assert torch.equal(eager, loss)
        expected = torch.autograd.grad(eager, leaves(problem))
        first = torch.autograd.grad(loss, leaves(problem), retain_graph=True)
        second = torch.autograd.grad(2 * loss, leaves(problem))
        for a, b, c in zip(expected, first, second, strict=True):
            assert torch.equal(a, b)
            check_identity(c, 2 * a, "float32")


def test_logits_of_a_head_are_the_logits_of_the_loss():
    """The head counts labels and ignored rows as the loss of materialised logits does."""
    problem = make_problem(seed=12)
    logits = functional.linear(problem.hidden, problem.weight, problem.bias)
    check_identity(linear_caref_loss(*problem), caref_loss(logits, problem.labels), "float32")
