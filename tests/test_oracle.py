"""Validate the float64 reference against 50-digit arithmetic (mpmath) and against the plain composition.

No expected value here comes from caref_kernels.objective, so that a wrong formula cannot confirm itself.
"""

from __future__ import annotations

import mpmath
import pytest
import torch

from caref_kernels.testing import (
    check_evaluation,
    check_gradient,
    check_term,
    confident_logits,
    evaluate,
    evaluate_eager,
    make_case,
    oracle,
)


def _exact_row(logits: list[float], label: int, alpha: float, beta: float, vocab_size: int):
    """(CE, SCED, KL, H) and the gradients of the first three, by the definitions and the chain rule through softmax."""
    exps = [mpmath.exp(mpmath.mpf(z)) for z in logits]
    total = mpmath.fsum(exps)
    p = [e / total for e in exps]
    ratio = [mpmath.log(x * vocab_size) for x in p]
    ce = -mpmath.log(p[label])
    sced = mpmath.fsum((x * abs(r)) ** alpha * (1 - x) ** beta for x, r in zip(p, ratio, strict=True))
    kl = mpmath.fsum(x * r for x, r in zip(p, ratio, strict=True))
    entropy = -mpmath.fsum(x * mpmath.log(x) for x in p)
    slopes = [
        alpha * (x * abs(r)) ** (alpha - 1) * mpmath.sign(r) * (r + 1) * (1 - x) ** beta
        - (beta * (x * abs(r)) ** alpha * (1 - x) ** (beta - 1) if beta else 0)
        for x, r in zip(p, ratio, strict=True)
    ]
    kl_slopes = [r + 1 for r in ratio]
    ce_slopes = [-1 / x if column == label else mpmath.mpf(0) for column, x in enumerate(p)]
    gradients = []
    for slope in (ce_slopes, slopes, kl_slopes):
        mean = mpmath.fsum(x * s for x, s in zip(p, slope, strict=True))
        gradients.append([float(x * (s - mean)) for x, s in zip(p, slope, strict=True)])
    return [float(value) for value in (ce, sced, kl, entropy)], gradients


ROWS = {
    "normal_1": make_case("normal_1", 1, 130, torch.float64, seed=1).logits,
    "normal_10": make_case("normal_10", 1, 130, torch.float64, seed=2).logits,
    "near_uniform": make_case("near_uniform", 1, 130, torch.float64, seed=3).logits,
    "lm_like": make_case("lm_like", 1, 130, torch.float64, seed=4).logits,
    "tied_maxima": make_case("tied_maxima", 1, 130, torch.float64, seed=5).logits,
    "confident_1e-8": confident_logits(1e-8, 1, 130, seed=6),
    "confident_1e-14": confident_logits(1e-14, 1, 130, seed=7),
}


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.5, 0.5), (3.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize("name", ROWS)
def test_reference_against_50_digits(name, alpha, beta):
    logits = ROWS[name]
    label, vocab_size = int(logits.argmax()), logits.size(-1)
    if beta == 1 and name != "near_uniform":  # where another V would leave the difference of nearly equal slopes
        label, vocab_size = 3, vocab_size + 5
    with mpmath.workdps(50):
        values, gradients = _exact_row(logits[0].tolist(), label, alpha, beta, vocab_size)
    actual = oracle(logits, torch.tensor([label]), alpha=alpha, beta=beta, vocab_size=vocab_size)
    for term, value in zip(("ce", "sced", "kl", "entropy"), values, strict=True):
        check_term(term, getattr(actual.terms, term), torch.tensor([value], dtype=torch.float64), label=name)
    for part, gradient in zip(("ce", "sced", "kl"), gradients, strict=True):
        check_gradient(actual.gradients[part], torch.tensor([gradient], dtype=torch.float64), label=part)
    weighted = [ce + 0.1 * sced + 0.1 * kl for ce, sced, kl in zip(*gradients, strict=True)]
    check_gradient(actual.gradients["loss"], torch.tensor([weighted], dtype=torch.float64))


@pytest.mark.parametrize("regime", ["normal_1", "normal_3", "lm_like", "zipf", "tied_maxima"])
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (3.0, 2.0), (1.5, 0.5)])
def test_every_backend_against_the_composition(backend, regime, alpha, beta):
    """On rows that are not confident the plain composition in float64 is an independent, exact reference."""
    case = make_case(regime, 4, 1000, seed=20, ignored=1)
    expected = evaluate_eager(case.logits.double(), case.labels, alpha=alpha, beta=beta)
    check_evaluation(evaluate(*case, alpha=alpha, beta=beta, backend=backend), expected, label=regime)
