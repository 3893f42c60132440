"""``shift`` and ``token_weights``, in every function, and the log-sum-exp among the results."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing

from caref_kernels import CarefConfig, CarefLoss, LinearCarefLoss, SCEDLoss, TopK, caref_loss, linear_caref_loss
from caref_kernels.testing import check_identity, make_case

BATCH, LENGTH, COLUMNS, FEATURES = 2, 6, 40, 5
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
FUNCTIONS = pytest.mark.parametrize("function", ["logits", "head", "module", "head module"])
# Of torch's own compiler.
compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _tensors(dtype: torch.dtype = torch.float32):
    """Logits (B, T, V), labels and weights (B, T); the weights of ignored rows are NaN, which must not matter."""
    case = make_case("lm_like", BATCH * LENGTH, COLUMNS, dtype, seed=1, ignored=3)
    weights = torch.linspace(-0.5, 2, BATCH * LENGTH)
    weights[case.labels == -100] = math.nan
    shape = (BATCH, LENGTH)
    return case.logits.reshape(*shape, COLUMNS).requires_grad_(), case.labels.reshape(shape), weights.reshape(shape)


def _head(seed: int = 2):
    weight = make_case("normal_1", COLUMNS, FEATURES, seed=seed).logits.requires_grad_()
    return make_case("normal_1", BATCH * LENGTH, FEATURES, seed=3).logits.reshape(BATCH, LENGTH, -1), weight


def _call(function: str, leaf, labels, weight, num_items=None, token_weights=None, **options):
    operands = {"num_items": num_items, "token_weights": token_weights}
    if function == "logits":
        return caref_loss(leaf, labels, **operands, **options)
    if function == "module":
        return CarefLoss(**options)(leaf, labels, **operands)
    if function == "head":
        return linear_caref_loss(leaf, weight, labels, chunk_rows=3, **operands, **options)
    return LinearCarefLoss(chunk_rows=3, **options)(leaf, weight, labels, **operands)


def _leaves(function: str):
    logits, labels, weights = _tensors()
    if "head" not in function:
        return logits, logits, labels, weights
    hidden, weight = _head()
    return hidden.requires_grad_(), weight, labels, weights


def _same(actual, expected, inputs):
    for one, other in zip(actual, expected, strict=True):
        if one is not None:
            assert one.shape == other.shape
            check_identity(one.detach(), other.detach(), "float32_terms")
    for name in ("loss", "sced"):
        sums = [getattr(out, name).sum() for out in (actual, expected)]
        gradients = (torch.autograd.grad(total, inputs, retain_graph=True) for total in sums)
        for one, other in zip(*gradients, strict=True):
            check_identity(one, other, "float32_gradient", name)


# ----------------------------------------------------------------------------------------------------------- shift


@REDUCTIONS
@FUNCTIONS
def test_shift_is_the_loss_of_slices(backend, function, reduction):
    leaf, weight, labels, _ = _leaves(function)
    options = {"reduction": reduction, "return_terms": True, "sparsity": TopK(4), "backend": backend}
    actual = _call(function, leaf, labels, weight, shift=True, **options)
    _same(actual, _call(function, leaf[:, :-1], labels[:, 1:], weight, **options), {leaf, weight})


def test_shift_does_not_copy_the_logits(backend):
    """Whole logits, a view of every second row, and the gradient in their memory."""
    logits, labels, _ = _tensors()
    for view in (logits, logits.detach()[:, ::2].requires_grad_()):
        loss = caref_loss(view, labels[:, : view.size(1)], shift=True, backend=backend)
        assert loss.grad_fn.saved_tensors[0].data_ptr() == view.data_ptr()
    leaf = logits.detach().requires_grad_()
    intermediate = leaf * 1.0
    caref_loss(intermediate, labels, shift=True, inplace_backward=True, backend=backend).backward()
    expected = caref_loss(logits[:, :-1], labels[:, 1:], backend=backend)
    check_identity(leaf.grad, torch.autograd.grad(expected, logits)[0], "float32_gradient")
    assert torch.count_nonzero(leaf.grad[:, -1]) == 0


@pytest.mark.parametrize("ignore_index", [-100, 7, 2**40, 2**62 + 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shift_with_every_ignore_index(backend, dtype, ignore_index):
    logits, labels, _ = _tensors()
    labels = torch.where(labels == -100, 3, labels).to(dtype)
    options = {"ignore_index": ignore_index, "backend": backend}
    expected = caref_loss(logits[:, :-1], labels[:, 1:].long(), **options)
    assert torch.equal(caref_loss(logits, labels, shift=True, **options), expected)


def test_shift_of_one_position_has_no_row(backend):
    logits, labels, _ = _tensors()
    loss = caref_loss(logits[:, :1], labels[:, :1], shift=True, backend=backend)
    assert math.isnan(loss.detach())
    assert torch.count_nonzero(torch.autograd.grad(loss, logits)[0]) == 0
    rows = caref_loss(logits[:, :0], labels[:, :0], shift=True, reduction="none", backend=backend)
    assert rows.shape == (BATCH, 0)


# --------------------------------------------------------------------------------------------------- token weights


@REDUCTIONS
@FUNCTIONS
@pytest.mark.parametrize("shift", [False, True])
def test_token_weights_multiply_the_rows(backend, function, reduction, shift):
    """Loss and terms are weighted sums; what is only observed is not weighted; the mean divides by the valid rows."""
    leaf, weight, labels, weights = _leaves(function)
    options = {"return_terms": True, "shift": shift, "backend": backend}
    rows = _call(function, leaf, labels, weight, reduction="none", **options)
    factors = (weights[:, 1:] if shift else weights).nan_to_num()
    valid = (labels[:, 1:] if shift else labels) != -100

    def reduced(name: str, row):
        row = row * factors if name in ("loss", "ce", "sced", "kl") else row
        return row if reduction == "none" else row.sum() / (valid.sum() if reduction == "mean" else 1)

    expected = type(rows)(**{name: row if row is None else reduced(name, row) for name, row in rows._asdict().items()})
    actual = _call(function, leaf, labels, weight, token_weights=weights, reduction=reduction, **options)
    _same(actual, expected, {leaf, weight})
    divided = _call(function, leaf, labels, weight, 5.5, weights, **options)
    check_identity(divided.loss.detach(), (rows.loss * factors).sum().detach() / 5.5, "float32_terms")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_real_dtype_of_weights(backend, dtype):
    logits, labels, _ = _tensors()
    weights = (torch.arange(BATCH * LENGTH).reshape(labels.shape) % 3).to(dtype)
    actual = caref_loss(logits, labels, token_weights=weights, backend=backend)
    assert torch.equal(actual, caref_loss(logits, labels, token_weights=weights.float(), backend=backend))


def test_weights_of_one_change_nothing(backend):
    logits, labels, _ = _tensors()
    losses = [caref_loss(logits, labels, token_weights=w, backend=backend) for w in (None, torch.ones(labels.shape))]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_second_derivative_of_weighted_rows():
    logits, labels, weights = _tensors(torch.float64)
    weights = weights.double().nan_to_num()

    def loss(values, function=caref_loss):
        return function(values, labels, token_weights=weights, shift=True, backend="reference")

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_a_head_is_weighted_in_every_pass():
    """The gradients of the forward pass, those that are computed again, and those of compiled code."""
    hidden, weight = _head()
    _, labels, weights = _tensors()
    loss = linear_caref_loss(hidden, weight, labels, token_weights=weights)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    check_identity(torch.autograd.grad(loss, weight)[0], first, "float32_gradient")


@compiler
@pytest.mark.parametrize("function", ["logits", "head"])
def test_compiled(function):
    """One graph, and no second one for other weights of the tokens."""
    leaf, weight, labels, weights = _leaves(function)
    weights = weights.nan_to_num()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_call, fullgraph=True, backend=counter)
    for scale in (1.0, 0.25):
        losses = [f(function, leaf, labels, weight, None, scale * weights, shift=True) for f in (compiled, _call)]
        assert torch.equal(*losses)
        for one, other in zip(*(torch.autograd.grad(loss, {leaf, weight}) for loss in losses), strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (1.0, TypeError, "expected a torch.Tensor or None; got "),
        (torch.ones(BATCH, LENGTH, dtype=torch.complex64), TypeError, "expected real numbers; got torch.complex64"),
        (torch.ones(BATCH, LENGTH, requires_grad=True), ValueError, "must not require grad: .*detach"),
        (torch.ones(LENGTH), ValueError, r"expected shape \(2, 6\) for {} of shape .*; got \(6,\)"),
        (torch.ones(BATCH, LENGTH, device="meta"), ValueError, "on meta, but {} are on cpu"),
    ],
    ids=["number", "complex", "gradient", "shape", "device"],
)
@FUNCTIONS
def test_wrong_weights(function, weights, error, message):
    leaf, weight, labels, _ = _leaves(function)
    named = message.format("hidden" if "head" in function else "logits")
    with pytest.raises(error, match=f"^token_weights:? {named}"):
        _call(function, leaf, labels, weight, token_weights=weights)


def test_shift_is_a_bool_of_losses_with_labels():
    with pytest.raises(TypeError, match="shift must be True or False; got 1"):
        CarefConfig(shift=1)
    with pytest.raises(TypeError, match="SCEDLoss has no option 'shift'"):
        SCEDLoss(shift=True)


# -------------------------------------------------------------------------------------------------- log-sum-exp


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
@REDUCTIONS
def test_lse(backend, reduction, offset):
    logits, labels, _ = _tensors()
    logits = logits.detach() + offset
    out = caref_loss(logits, labels, reduction=reduction, return_terms=True, backend=backend)
    valid = labels != -100
    expected = torch.where(valid, logits.double().logsumexp(-1), 0)
    expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / valid.sum()}[reduction]
    check_identity(out.lse, expected, "float32_terms")
    assert not out.lse.requires_grad
    if reduction == "none":
        label_logit = logits.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        check_identity(out.lse[valid], (label_logit.double() + out.ce)[valid], "float32_terms")
