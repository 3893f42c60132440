"""The tolerances reject every mistake that a default tolerance would accept, and the message gives both numbers."""

from __future__ import annotations

import math

import pytest
import torch

from caref_kernels.testing import (
    REGIMES,
    check_at_most,
    check_evaluation,
    check_gradient,
    check_identity,
    check_row_sums,
    check_term,
    confident_logits,
    evaluate,
    evaluate_eager,
    make_case,
    oracle,
)

WRONG = {
    "zero": lambda g: torch.zeros_like(g),
    "flipped": lambda g: -g,
    "halved": lambda g: g / 2,
    "one part in 10,000": lambda g: g * (1 + 1e-4),
    "a constant added": lambda g: g + g.abs().mean(),
    "one element": lambda g: g.index_fill(-1, torch.tensor([17]), 0.0),
    "rows swapped": lambda g: g.flip(0),
    "NaN": lambda g: g.index_fill(-1, torch.tensor([17]), math.nan),
}


@pytest.mark.parametrize("part", ["loss", "sced", "kl"])
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_gradient_is_refused(mistake, part):
    """On normal logits over 32,128 columns, after a mean over 512 rows: where allclose accepts zeros."""
    case = make_case("normal_1", 2, 32128, seed=1)
    case.labels.fill_(17)
    expected = oracle(*case, (part,)).gradients[part] / 512
    check_gradient(expected.float(), expected)
    with pytest.raises(AssertionError, match=r"gradient"):
        check_gradient(WRONG[mistake](expected.float()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mistake", ["zero", "flipped", "halved", "a constant added", "NaN"])
def test_wrong_gradient_in_sixteen_bits_is_refused(mistake, dtype):
    case = make_case("lm_like", 2, 5000, dtype, seed=2)
    expected = oracle(*case, ("sced",)).gradients["sced"]
    check_gradient(expected.to(dtype), expected)
    with pytest.raises(AssertionError):
        check_gradient(WRONG[mistake](expected.to(dtype)), expected)


def test_rounding_twice_is_refused():
    """Cross-entropy and the regulariser rounded to bfloat16 before they are added."""
    case = make_case("lm_like", 4, 5000, torch.bfloat16, seed=3)
    exact = oracle(*case).gradients
    twice = exact["ce"].bfloat16() + (0.1 * exact["sced"]).bfloat16() + (0.1 * exact["kl"]).bfloat16()
    with pytest.raises(AssertionError, match="differ from the rounded oracle|is off by"):
        check_gradient(twice, exact["loss"])


def test_arithmetic_in_the_dtype_of_the_logits_is_refused():
    case = make_case("normal_3", 4, 1000, torch.bfloat16, seed=4)
    log_p = torch.log_softmax(case.logits, -1)
    kl = (log_p.exp() * (log_p + math.log(1000))).sum(-1).float()
    with pytest.raises(AssertionError, match=r"kl: error .* exceeds the cap 1e-05"):
        check_term("kl", kl, oracle(*case, ()).terms.kl)


def test_eager_fails_on_confident_rows():
    """The reason for the residual form: the plain composition is wrong by 100 % and the cap says so."""
    logits = confident_logits(1e-8, 2, 32128).float()
    labels = logits.argmax(-1)
    with pytest.raises(AssertionError, match=r"error 1 in row \d exceeds the cap"):
        check_evaluation(evaluate_eager(logits, labels), oracle(logits, labels))


def test_condition_two_is_applied():
    """Within the cap, and ten times worse than eager: refused, with the error and the limit in the message."""
    case = make_case("lm_like", 2, 1000, seed=5)
    expected, eager = oracle(*case), evaluate_eager(*case)
    worse = (expected.terms.sced * (1 + 8e-6)).float()
    check_term("sced", worse, expected.terms.sced)
    with pytest.raises(AssertionError, match=r"sced: error 8.* exceeds twice the eager error .* \(cap 1e-05\)"):
        check_term("sced", worse, expected.terms.sced, eager.terms.sced)


def test_other_checks_can_fail():
    with pytest.raises(AssertionError, match=r"identity float32\): error 2.*e-06 in row 0 exceeds the cap 1e-06"):
        check_identity(torch.full((3,), 1.000002), torch.ones(3), "float32")
    with pytest.raises(AssertionError, match="exceeds the cap"):
        check_identity(torch.tensor([math.nan]), torch.ones(1), "float32")
    with pytest.raises(AssertionError, match="bound"):
        check_at_most(torch.tensor([1.1]), 1.0, "float32")
    with pytest.raises(AssertionError, match="bound"):
        check_at_most(torch.tensor([math.nan]), 1.0, "float32")
    with pytest.raises(AssertionError, match="row sum"):
        check_row_sums(torch.tensor([[0.5, -0.4999] + [0.0] * 200]))


@pytest.mark.parametrize("regime", REGIMES)
def test_cases_are_reproducible_and_what_they_are_called(regime):
    case = make_case(regime, 4, 500, seed=6, ignored=1)
    assert torch.equal(case.logits, make_case(regime, 4, 500, seed=6, ignored=1).logits)
    assert not torch.equal(case.logits, make_case(regime, 4, 500, seed=7).logits)
    assert int((case.labels == -100).sum()) == 1
    top = torch.softmax(case.logits.double(), -1).max(-1).values
    if regime.startswith("confident_"):
        rest = float(regime.removeprefix("confident_"))
        assert ((1 - top) / rest - 1).abs().max() < 0.1
    ties = (case.logits == case.logits.max(-1, keepdim=True).values).sum(-1)
    assert ties.tolist() == ([2, 3, 4, 2] if regime == "tied_maxima" else [1, 1, 1, 1])


def test_oracle_takes_no_backend():
    case = make_case("normal_1", 1, 3)
    with pytest.raises(TypeError, match="backend"):
        oracle(*case, backend="cpu")
    assert evaluate(*case, (), backend="reference").gradients == {}
