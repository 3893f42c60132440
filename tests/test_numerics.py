"""Values and gradients of every backend against the float64 oracle, in every regime and at every kind of width."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn import functional

from caref_kernels import caref_loss, fused_sced, ops
from caref_kernels.config import RowSpec
from caref_kernels.testing import (
    GRADIENT_PARTS,
    REGIMES,
    check_at_most,
    check_evaluation,
    check_gradient,
    check_identity,
    check_term,
    confident_logits,
    evaluate,
    evaluate_eager,
    make_case,
    oracle,
)

# One width on either side of every block size in use, the vocabularies of real models, and the extremes.
WIDTHS = (1, 2, 3, 7, 31, 32, 33, 127, 128, 129, 1000, 1023, 1025, 4095, 4097)
VOCABULARIES = (32000, 32100, 32128, 50257, 65537, 128256, 151936, 262144)
ALPHAS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0)
BETAS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)


@functools.lru_cache(maxsize=64)
def _with_references(regime, rows, columns, seed, parts=GRADIENT_PARTS):
    """A case with its oracle and eager results, computed once for all backends."""
    case = make_case(regime, rows, columns, seed=seed)
    return case, parts, oracle(*case, parts), evaluate_eager(*case, parts)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3])
def test_widths(backend, rows, columns):
    case, parts, *judges = _with_references("normal_3", rows, columns, columns)
    check_evaluation(evaluate(*case, parts, backend=backend), *judges)


@pytest.mark.parametrize("columns", VOCABULARIES)
def test_vocabularies(backend, columns):
    case, parts, *judges = _with_references("lm_like", 2, columns, columns, ("loss", "sced"))
    check_evaluation(evaluate(*case, parts, backend=backend), *judges)


def test_many_rows(backend):
    case = make_case("lm_like", 289, 1000, ignored=17)
    check_evaluation(evaluate(*case, backend=backend), oracle(*case), evaluate_eager(*case))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("columns", [1000, 32128])
def test_distributions(backend, regime, columns):
    case, parts, *judges = _with_references(regime, 2, columns, 7)
    check_evaluation(evaluate(*case, parts, backend=backend), *judges, regime)


@pytest.mark.parametrize("regime", ["normal_0.1", "near_uniform", "confident_1e-7", "bimodal"])
def test_widest_vocabulary(backend, regime):
    case, parts, expected, _ = _with_references(regime, 2, 262144, 8, ("sced", "kl"))
    check_evaluation(evaluate(*case, parts, backend=backend), expected, label=regime)


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_confident_rows(backend, rest):
    """Every float32 form that starts from lse is wrong by 100 % here, so eager results are not compared."""
    logits = confident_logits(rest, 4, 32128, seed=3).float()
    labels = logits.argmax(-1)
    labels[2:] = torch.tensor([5, 32127])
    expected = oracle(logits, labels)
    check_evaluation(evaluate(logits, labels, backend=backend), expected, label=f"1-p = {rest}")
    # SCED of such a row is (log V)^2 (1-p) to first order, so the oracle itself cannot be off by much.
    leading = (math.log(32128) ** 2) * rest
    assert (expected.terms.sced / leading - 1).abs().max() < 10 * math.sqrt(rest) + 0.05


@pytest.mark.parametrize("columns", [1, 2, 7, 1000, 32128])
@pytest.mark.parametrize("value", [0.0, -3.7, 1e4])
def test_uniform_row(backend, columns, value):
    logits = torch.full((2, columns), value)
    terms, gradients, _ = evaluate(logits, torch.tensor([0, columns - 1]), backend=backend)
    assert torch.equal(terms.sced, torch.zeros(2))
    assert torch.equal(gradients["sced"], torch.zeros(2, columns))
    assert torch.equal(gradients["kl"], torch.zeros(2, columns))
    uniform = torch.full((2,), math.log(columns), dtype=torch.float64)
    check_term("kl", terms.kl, torch.zeros(2, dtype=torch.float64))
    check_term("entropy", terms.entropy, uniform)
    check_term("ce", terms.ce, uniform)


def test_noise_of_1e6(backend):
    generator = torch.Generator().manual_seed(1)
    logits = 1e-6 * torch.randn(3, 32128, generator=generator)
    labels = torch.tensor([0, 1, 2])
    actual, expected = evaluate(logits, labels, backend=backend), oracle(logits, labels)
    for part in ("sced", "kl"):
        for row in range(3):
            check_identity(actual.gradients[part][row], expected.gradients[part][row], "near_uniform", part)


def _masked_columns(pattern: str, columns: int) -> torch.Tensor:
    masked = torch.zeros(columns, dtype=torch.bool)
    masked[{"one": slice(5, 6), "first": slice(0, 1), "half": slice(1, None, 2), "tail": slice(700, None)}[pattern]] = (
        True
    )
    return masked


@pytest.mark.parametrize("fill", ["-inf", "lowest"])
@pytest.mark.parametrize("pattern", ["one", "first", "half", "tail"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_columns(backend, dtype, pattern, fill):
    """Columns of -inf change nothing: the result is that of the row without them, at the same V."""
    columns = 1000
    masked = _masked_columns(pattern, columns)
    logits = make_case("lm_like", 3, columns, dtype, seed=2).logits.clone()
    logits[:, masked] = -math.inf if fill == "-inf" else torch.finfo(dtype).min
    kept = logits[:, ~masked]
    labels = torch.tensor([0, 3, 9])
    positions = (~masked).nonzero().flatten()
    actual = evaluate(logits, positions[labels], backend=backend)
    for part, gradient in actual.gradients.items():
        assert torch.count_nonzero(gradient[:, masked]) == 0, part
        actual.gradients[part] = gradient[:, ~masked]
    check_evaluation(actual, oracle(kept, labels, vocab_size=columns))


def test_label_on_a_masked_column(backend):
    """As in torch the cross-entropy is infinite and its gradient finite; the other terms are unchanged."""
    logits = make_case("normal_1", 2, 50).logits
    logits[0, 7] = -math.inf
    labels = torch.tensor([7, 7])
    terms, gradients, _ = evaluate(logits, labels, backend=backend)
    assert terms.ce[0] == math.inf
    assert torch.isfinite(terms.sced).all()
    assert torch.isfinite(terms.kl).all()
    expected = torch.softmax(logits.double(), -1) - functional.one_hot(labels, 50)
    check_gradient(gradients["ce"], expected)


POISONS = {
    "all -inf": (slice(None), -math.inf),
    "+inf first": (0, math.inf),
    "+inf last": (-1, math.inf),
    "all +inf": (slice(None), math.inf),
    "nan first": (0, math.nan),
    "nan last": (-1, math.nan),
    "nan in the tail of a block": (258, math.nan),
    "nan at the label": (100, math.nan),
    "nan at the maximum": (40, math.nan),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_poisoned_row_is_nan_alone(backend, dtype, poison):
    place, value = POISONS[poison]
    clean = make_case("normal_1", 3, 259, dtype, seed=4).logits
    clean[:, 40] = 9.0
    poisoned = clean.clone()
    poisoned[1, place] = value
    labels = torch.tensor([100, 100, 100])
    before, after = (evaluate(logits, labels, backend=backend) for logits in (clean, poisoned))
    for name, term in after.terms._asdict().items():
        assert torch.isnan(term[1]), f"{name} is {term[1]}"
        assert torch.equal(term[[0, 2]], getattr(before.terms, name)[[0, 2]]), name
    for part, gradient in after.gradients.items():
        assert torch.isnan(gradient[1]).all(), part
        assert torch.equal(gradient[[0, 2]], before.gradients[part][[0, 2]]), part


@pytest.mark.parametrize("columns", [259, 5003])
def test_terms_that_are_not_asked_for_are_0_in_a_poisoned_row(backend, columns):
    logits = make_case("normal_1", 2, columns, seed=4).logits
    logits[1, 7] = math.nan
    valid = torch.tensor([True, True])
    for targets, with_sced, zeros in ((valid, True, [0]), (None, True, [0]), (torch.tensor([3, 4]), False, [1])):
        terms, _ = ops.forward(logits, targets, RowSpec(2.0, 1.0, columns, -100, with_sced), backend)
        assert torch.isnan(terms[1]).nonzero().flatten().tolist() == [i for i in range(3) if i not in zeros]
        assert torch.count_nonzero(terms[:, zeros]) == 0


@pytest.mark.parametrize(
    ("dtype", "extreme"),
    [(torch.bfloat16, 1e4), (torch.float16, 65504.0), (torch.float32, 3e38), (torch.float64, 1e300)],
)
def test_extreme_logits(backend, dtype, extreme):
    logits = torch.tensor([[extreme, -extreme, 0.0], [0.0, extreme, -extreme], [0.0, 0.0, -extreme]], dtype=dtype)
    labels = torch.tensor([0, 1, 0])
    actual = evaluate(logits, labels, backend=backend)
    assert all(torch.isfinite(term).all() for term in actual.terms)
    check_evaluation(actual, oracle(logits, labels))


@pytest.mark.parametrize("shift", [-1024.0, 1024.0])
def test_shift(backend, shift):
    """Adding a constant to a row changes nothing, on a grid where the addition is exact."""
    case = make_case("normal_3", 3, 1000)
    logits = (case.logits * 1024).round() / 1024
    before, after = (evaluate(z, case.labels, backend=backend) for z in (logits, logits + shift))
    for name, term in after.terms._asdict().items():
        assert torch.equal(term, getattr(before.terms, name)), name
    for part, gradient in after.gradients.items():
        assert torch.equal(gradient, before.gradients[part]), part


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_single_column(backend, beta):
    terms, gradients, _ = evaluate(torch.tensor([[3.0], [-2.0]]), torch.tensor([0, 0]), beta=beta, backend=backend)
    for value in (*terms, *gradients.values()):
        assert torch.count_nonzero(value) == 0


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("regime", ["lm_like", "confident_1e-4", "confident_1e-7", "tied_maxima", "normal_3"])
def test_exponents(backend, regime, alpha):
    case = make_case(regime, 3, 1000, seed=7)
    for beta in BETAS:
        actual = evaluate(*case, ("sced",), alpha=alpha, beta=beta, backend=backend)
        expected = oracle(*case, ("sced",), alpha=alpha, beta=beta)
        check_evaluation(actual, expected, label=f"alpha {alpha}, beta {beta}")


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_exponents_in_float64(backend, alpha, beta):
    for regime in ("lm_like", "confident_1e-12", "tied_maxima"):
        case = make_case(regime, 3, 300, torch.float64, seed=6)
        actual = evaluate(*case, alpha=alpha, beta=beta, backend=backend)
        check_evaluation(actual, oracle(*case, alpha=alpha, beta=beta), label=regime)


def test_kink_of_alpha_one(backend):
    """|L| has a kink at p = U, where the gradient is 0; beside it, it is at most twice the largest p |f'|."""
    logits = torch.zeros(3, 8)
    logits[1, 2] = torch.nextafter(torch.tensor(0.0), torch.tensor(1.0))
    logits[2, 2] = 1e-7
    for beta in (0.0, 1.0):
        gradient = evaluate(logits, torch.zeros(3, dtype=torch.long), ("sced",), alpha=1, beta=beta, backend=backend)[1]
        assert torch.equal(gradient["sced"][0], torch.zeros(8))
        assert torch.isfinite(gradient["sced"]).all()
        check_at_most(gradient["sced"].abs(), 2 * (1 + beta) / 8, "float32")


@pytest.mark.parametrize("gap", [200.0, 1e4, 3e38])
def test_one_hot_limit(backend, gap):
    """The limit is (log V)^alpha for beta = 0 and 0 otherwise, also where eager gives NaN (0 < beta < 1)."""
    logits = torch.full((2, 100), -gap / 2)
    logits[0, 17] = gap / 2
    logits[1, 99] = gap / 2
    labels = torch.tensor([17, 99])
    for alpha in (1.0, 2.0, 3.0):
        limit = torch.full((2,), math.log(100) ** alpha, dtype=torch.float64)
        for beta in (0.0, 0.5, 1.0):
            terms, gradients, _ = evaluate(logits, labels, alpha=alpha, beta=beta, backend=backend)
            check_term("sced", terms.sced, limit if beta == 0 else torch.zeros_like(limit))
            check_at_most(gradients["sced"].abs().max(), 0.0, "float64", f"alpha {alpha} beta {beta}")
            assert all(torch.isfinite(value).all() for value in (*terms, *gradients.values()))


@pytest.mark.parametrize("vocab_size", [None, 32100, 40000])
def test_vocab_size(backend, vocab_size):
    """``vocab_size`` changes U alone; the reference is eager code in float64, which shares nothing with the kernels."""
    case = make_case("lm_like", 4, 32128, seed=9)
    expected = evaluate_eager(case.logits.double(), case.labels, vocab_size=vocab_size)
    actual = evaluate(*case, vocab_size=vocab_size, backend=backend)
    check_evaluation(actual, expected, label=f"vocab_size {vocab_size}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [2, 3, 100])
def test_tied_maxima(backend, ties, dtype):
    """Exactly one of the tied columns may be left out of the residual."""
    logits = make_case("normal_1", 4, 1000, dtype, seed=ties).logits
    order = torch.rand(4, 1000, generator=torch.Generator().manual_seed(ties)).argsort(-1)
    logits.scatter_(-1, order[:, :ties], 6.0)
    labels = torch.stack([order[0, 0], order[1, 1], order[2, -1], order[3, -2]])
    actual = evaluate(logits, labels, backend=backend)
    check_evaluation(actual, oracle(logits, labels), label=f"{ties} ties")
    check_evaluation(actual, evaluate_eager(logits.double(), labels), label=f"{ties} ties, independent")


def test_order_of_the_columns(backend):
    """The maximum may be in any block: rising, falling and sawtooth rows."""
    values = make_case("normal_3", 1, 5000, seed=10).logits[0]
    rising = values.sort().values
    top, rest = rising[-1:], values[values != rising[-1]]
    orders = [values, rising, rising.flip(0), rising.view(50, 100).t().reshape(-1)]
    orders += [torch.cat((rest[:place], top, rest[place:])) for place in (0, 2500, 4999)]
    logits = torch.stack(orders)
    terms = evaluate(logits, logits.argmax(-1), (), backend=backend).terms
    for name, term in terms._asdict().items():
        check_identity(term, term[:1].expand_as(term), "float32", name)


def test_many_short_rows(backend):
    case = make_case("normal_3", 200_000, 5, seed=11)
    check_evaluation(evaluate(*case, ("loss",), backend=backend), oracle(*case, ("loss",)))


@pytest.mark.parametrize("regime", ["normal_0.1", "normal_1", "lm_like"])
@pytest.mark.parametrize("inside_ratio", [False, True])
def test_official_formula(backend, regime, inside_ratio):
    """The authors' code adds 1e-9 inside the logarithm; in float64 the results differ by at most the proven bounds."""
    eps, columns = 1e-9, 4096
    case = make_case(regime, 4, columns, torch.float64, seed=12)
    p = torch.softmax(case.logits, -1)
    log_ratio = torch.log(p * columns + eps) if inside_ratio else torch.log((p + eps) * columns)
    official_sced = ((p * log_ratio.abs()) ** 2 * (1 - p)).sum(-1)
    official_kl = (p * log_ratio).sum(-1)
    terms = evaluate(*case, (), backend=backend).terms
    sced_bound = 2 * eps * (math.log(columns) + 2 / math.e)
    check_at_most((terms.sced - official_sced).abs(), sced_bound, "float64")
    check_at_most((terms.kl - official_kl).abs(), eps if inside_ratio else columns * eps, "float64")
    # KL of a uniform row is 0, not V * eps.
    uniform = evaluate(torch.zeros(1, columns, dtype=torch.float64), case.labels[:1], (), backend=backend).terms
    check_at_most(uniform.kl.abs(), 0.0, "float64")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_plain_cross_entropy(backend, reduction):
    case = make_case("lm_like", 6, 1000, seed=13, ignored=2)
    leaf = case.logits.clone().requires_grad_()
    loss = caref_loss(leaf, case.labels, lambda_sced=0, lambda_kl=0, reduction=reduction, backend=backend)
    exact_leaf = case.logits.double().requires_grad_()
    exact = functional.cross_entropy(exact_leaf, case.labels, reduction=reduction)
    check_term("ce", loss.detach(), exact.detach())
    loss.sum().backward()
    exact.sum().backward()
    check_gradient(leaf.grad, exact_leaf.grad)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1e6, 0.0), (0.0, 1e6), (0.3, 0.7)])
def test_weights(backend, weights):
    """A weight of 0 leaves a term out of value and gradient, and 1e6 scales it."""
    w_sced, w_kl = weights
    case = make_case("lm_like", 3, 1000, seed=14)
    terms, exact, _ = oracle(*case)
    leaf = case.logits.clone().requires_grad_()
    loss = caref_loss(leaf, case.labels, lambda_sced=w_sced, lambda_kl=w_kl, reduction="none", backend=backend)
    check_identity(loss.detach(), terms.ce + w_sced * terms.sced + w_kl * terms.kl, "float32")
    loss.sum().backward()
    check_gradient(leaf.grad, exact["ce"] + w_sced * exact["sced"] + w_kl * exact["kl"])


def test_fused_sced_is_the_term(backend):
    case = make_case("lm_like", 3, 1000, seed=14)
    leaf = case.logits.clone().requires_grad_()
    loss = fused_sced(leaf, reduction="none", backend=backend)
    expected = oracle(*case, ("sced",))
    check_term("sced", loss.detach(), expected.terms.sced)
    loss.sum().backward()
    check_gradient(leaf.grad, expected.gradients["sced"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6])
def test_gradient_of_the_true_class(backend, rest, dtype):
    """dCE of a confident row at its label is -(1-p) to one step of the dtype; p - 1 would lose it."""
    logits = confident_logits(rest, 4, 32128, seed=15).to(dtype)
    labels = logits.argmax(-1)
    expected = oracle(logits, labels, ("ce", "loss")).gradients
    actual = evaluate(logits, labels, ("ce", "loss"), backend=backend).gradients
    for part in ("ce", "loss"):
        at_label = [gradients[part].gather(-1, labels[:, None]).to(dtype) for gradients in (actual, expected)]
        steps = at_label[0].view(torch.int16).int() - at_label[1].view(torch.int16).int()
        assert steps.abs().max() <= 1, (part, at_label)
