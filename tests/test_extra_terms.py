"""The z-loss and label smoothing: values and gradients in every backend, and where no kernel is involved."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from caref_kernels import CarefConfig, CarefLoss, SCEDLoss, TopK, caref_loss, linear_caref_loss
from caref_kernels.testing import check_identity, make_case

EXPONENTS = [(2.0, 1.0), (4.0, 2.0), (1.5, 0.5)]
OPTIONS = [{"lambda_z": 1e-2}, {"label_smoothing": 0.1}, {"lambda_z": 1e-3, "label_smoothing": 0.25}]
REGIMES = ["lm_like", "near_uniform", "confident_1e-7", "tied_maxima"]
# Of torch's own compiler.
compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def exact(logits, labels, lambda_z=0.0, label_smoothing=0.0, reduction="mean", **options):
    """The loss in float64: torch's own cross-entropy and log-sum-exp, and the other terms of the reference."""
    valid = labels != -100
    kept, targets = logits.double()[valid], labels[valid]
    ce = functional.cross_entropy(kept, targets, label_smoothing=label_smoothing, reduction="none")
    other = caref_loss(kept, targets, reduction="none", backend="reference", return_terms=True, **options)
    rows = ce + other.loss - other.ce + lambda_z * kept.logsumexp(-1) ** 2
    total = torch.zeros(labels.shape, dtype=torch.float64).masked_scatter(valid, rows)
    return {"none": total, "sum": total.sum(), "mean": total.sum() / valid.sum()}[reduction]


def check(backend, case, extra, **options):
    """Loss and gradient of one call against float64; a gradient in 16 bits by its rounding."""
    logits, labels = case
    leaf, double = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    actual, expected = (
        caref_loss(leaf, labels, backend=backend, **extra, **options),
        exact(double, labels, **extra, **options),
    )
    check_identity(actual.detach(), expected.detach(), "float32_terms")
    gradient, truth = torch.autograd.grad(actual.sum(), leaf)[0], torch.autograd.grad(expected.sum(), double)[0]
    if leaf.dtype.itemsize > 2:
        check_identity(gradient, truth, "float32_gradient")
    else:
        rounding = torch.finfo(leaf.dtype).eps
        assert ((gradient.double() - truth).abs() <= rounding * truth.abs() + 1e-6 * truth.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
@pytest.mark.parametrize("extra", OPTIONS, ids=str)
def test_value_and_gradient(backend, extra, alpha, beta, dtype):
    check(backend, make_case("lm_like", 5, 131, dtype, seed=1, ignored=2), extra, alpha=alpha, beta=beta)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes_and_far_logits(backend, regime, offset):
    logits, labels = make_case(regime, 4, 300, seed=2)
    check(backend, (logits + offset, labels), OPTIONS[2])


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("sparsity", [None, TopK(7)])
def test_reductions_and_masks(backend, reduction, sparsity):
    case = make_case("lm_like", 5, 131, seed=3, ignored=1)
    check(backend, case, OPTIONS[2], reduction=reduction, sparsity=sparsity)


def test_without_sced_and_on_several_blocks(backend):
    check(backend, make_case("lm_like", 3, 5003, seed=4), OPTIONS[2], lambda_sced=0.0)
    check(backend, make_case("lm_like", 3, 5003, torch.bfloat16, seed=4), OPTIONS[2])


def test_terms(backend):
    """They are the unweighted terms, each differentiable; ``ce`` is never smoothed."""
    case = make_case("lm_like", 5, 131, seed=5, ignored=1)
    leaf = case.logits.clone().requires_grad_()
    out = caref_loss(leaf, case.labels, lambda_z=0.3, label_smoothing=0.2, return_terms=True, backend=backend)
    parts = ((0.8, out.ce), (0.1, out.sced), (0.1, out.kl), (0.3, out.z_loss), (0.2, out.uniform_ce))
    check_identity(out.loss.detach(), sum(weight * part.detach().double() for weight, part in parts), "float32")
    kept = case.logits[case.labels != -100].double().requires_grad_()
    for name, expected in (("z_loss", kept.logsumexp(-1) ** 2), ("uniform_ce", -kept.log_softmax(-1).mean(-1))):
        check_identity(getattr(out, name).detach(), expected.mean().detach(), "float32_terms", name)
        (gradient,) = torch.autograd.grad(getattr(out, name), leaf, retain_graph=True)
        (truth,) = torch.autograd.grad(expected.mean(), kept)
        check_identity(gradient[case.labels != -100], truth, "float32_gradient", name)
    for option, absent in (({"lambda_z": 0.3}, "uniform_ce"), ({"label_smoothing": 0.3}, "z_loss")):
        assert getattr(caref_loss(leaf, case.labels, return_terms=True, backend=backend, **option), absent) is None


def test_rows_that_hold_anything(backend):
    """Rows that are not valid, a row with a NaN, and a logit of -inf, whose smoothed loss is infinite."""
    logits, labels = make_case("lm_like", 4, 50, seed=6, ignored=1)
    logits[labels == -100] = math.nan
    wrong = int((labels != -100).nonzero()[0])
    logits[wrong, 3] = math.nan
    leaf = logits.requires_grad_()
    loss = caref_loss(leaf, labels, reduction="none", backend=backend, **OPTIONS[2])
    assert loss.isnan().nonzero().tolist() == [[wrong]]
    (gradient,) = torch.autograd.grad(loss.nan_to_num().sum(), leaf)
    assert torch.count_nonzero(gradient[labels == -100]) == 0
    logits = make_case("lm_like", 2, 50, seed=7).logits
    logits[0, 7] = -math.inf
    labels = torch.tensor([3, 4])
    loss = caref_loss(logits, labels, reduction="none", label_smoothing=0.1, backend=backend)
    assert loss.isinf().tolist() == [True, False]
    assert caref_loss(logits, labels, lambda_z=0.1, backend=backend).isfinite()


def test_all_of_the_label_may_be_smoothed(backend):
    check(backend, make_case("lm_like", 4, 60, seed=8), {"label_smoothing": 1.0}, lambda_sced=0.0, lambda_kl=0.0)


def test_inplace(backend):
    logits, labels = make_case("lm_like", 4, 60, seed=9)
    gradients = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        caref_loss(leaf * 1.0, labels, inplace_backward=inplace, backend=backend, **OPTIONS[2]).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_heads(backend, reduction, softcap):
    hidden = make_case("normal_1", 9, 6, seed=10).logits.requires_grad_()
    weight = make_case("normal_1", 40, 6, seed=11).logits.requires_grad_()
    labels = make_case("normal_1", 9, 40, seed=12, ignored=2).labels
    options = {"reduction": reduction, "token_weights": torch.linspace(0.5, 2, 9), **OPTIONS[2]}
    actual = linear_caref_loss(hidden, weight, labels, chunk_rows=3, softcap=softcap, backend=backend, **options)
    logits = hidden @ weight.T
    expected = caref_loss(
        logits if softcap is None else softcap * torch.tanh(logits / softcap), labels, backend=backend, **options
    )
    check_identity(actual.detach(), expected.detach(), "float32_terms")
    for one, other in zip(
        *(torch.autograd.grad(loss.sum(), (hidden, weight)) for loss in (actual, expected)), strict=True
    ):
        check_identity(one, other, "float32_gradient")


def test_derivatives_of_the_reference():
    logits, labels = make_case("normal_1", 3, 12, torch.float64, seed=13)

    def loss(values):
        return caref_loss(values, labels, lambda_z=0.3, label_smoothing=0.2, backend="reference")

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logits)


@compiler
@pytest.mark.parametrize("function", ["logits", "head"])
def test_schedules_compile_once_more(function):
    """The first change of a weight compiles anew, later ones do not."""
    labels = make_case("normal_1", 4, 40, seed=14, ignored=1).labels
    leaf = make_case("normal_1", 4, 40 if function == "logits" else 6, seed=15).logits.requires_grad_()
    weight = make_case("normal_1", 40, 6, seed=16).logits

    def loss_of(leaf, lambda_z, label_smoothing):
        options = {"lambda_z": lambda_z, "label_smoothing": label_smoothing}
        if function == "logits":
            return caref_loss(leaf, labels, **options)
        return linear_caref_loss(leaf, weight, labels, **options)

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
        for step in range(1, 5):
            losses = [call(leaf, 1e-3 * step, 0.1 * step) for call in (compiled, loss_of)]
            assert torch.equal(*losses)
            assert torch.equal(*(torch.autograd.grad(loss, leaf)[0] for loss in losses))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambda_z": -1.0}, ValueError, "lambda_z must be finite and >= 0; got -1.0"),
        ({"lambda_z": math.inf}, ValueError, "lambda_z must be finite and >= 0; got inf"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in \[0, 1\]; got nan"),
        ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing must be a Python float or int"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_ranges(options, error, message):
    for call in (CarefConfig, CarefLoss):
        with pytest.raises(error, match=message):
            call(**options)


def test_sced_alone_has_neither():
    for name in ("lambda_z", "label_smoothing"):
        with pytest.raises(TypeError, match=f"SCEDLoss has no option '{name}'"):
            SCEDLoss(**{name: 0.1})
