"""The one table of tolerances of the project, and the checks that apply them.

Every value meets two conditions.  With E the error against the oracle, evaluated in float64 on the same (already
rounded) logits:

1. cap: ``E <= cap``, a constant of the quantity and the dtype;
2. not worse than eager: ``E <= 2 * E_eager + floor``, where eager is the plain torch composition.  This condition is
   omitted where eager does not exist (-inf logits); on confident rows, where eager is wrong by 100 %, it is void.

Gradients are compared row by row and relative to the row: an absolute tolerance of 1e-5 would accept a gradient of the
auxiliary terms that is zero, or has the wrong sign, from V = 32,128 on.  A 16-bit gradient must also equal the rounded
oracle in 99 % of its entries, which is sharper than any tolerance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .oracle import Evaluation


class Tolerance(NamedTuple):
    """Limit of one error, and what condition 2 adds to twice the eager error."""

    cap: float
    floor: float


class TermTolerance(NamedTuple):
    """Tolerances of a per-row term, and the unit of its error."""

    float32: Tolerance
    float64: Tolerance
    unit: float = 0.0  # error / max(|expected|, unit); inf makes it absolute


# float64: the accuracy of the reference, which the suite validates against mpmath.
_EXACT = Tolerance(1e-12, 1e-13)
TERM_TOLERANCES: dict[str, TermTolerance] = {
    "loss": TermTolerance(Tolerance(1e-5, 1e-6), _EXACT, 0.1),  # holds lambda_kl * KL, whose error is absolute
    "ce": TermTolerance(Tolerance(1e-5, 1e-6), _EXACT),
    "sced": TermTolerance(Tolerance(1e-5, 1e-6), _EXACT),
    "kl": TermTolerance(Tolerance(1e-5, 2e-6), Tolerance(1e-12, 1e-13), math.inf),
    "entropy": TermTolerance(Tolerance(5e-6, 1e-6), _EXACT),
}
# Per row, ||error||_2 / ||expected||_2; float16 has the element rule alone.
GRADIENT_L2 = {
    torch.float64: Tolerance(2e-12, 2e-13),
    torch.float32: Tolerance(2e-5, 2e-6),
    torch.bfloat16: Tolerance(4e-3 + 2e-5, 2.0**-8),
}
GRADIENT_MAX = {torch.float64: Tolerance(5e-12, 5e-13), torch.float32: Tolerance(3e-5, 3e-6)}
# Per element, |error| <= rounding * |expected| + one subnormal step + ELEMENT_REST * max|expected| of the row.
ELEMENT_ROUNDING = {
    torch.bfloat16: 1.02 * 2.0**-8,
    torch.float16: 1.02 * 2.0**-11,
    torch.float32: 0.0,
    torch.float64: 0.0,
}
ELEMENT_REST = 2e-5
EQUAL_SHARE = 0.99
# A row whose gradient is smaller than this is held to the element rule instead of the norms.
SMALL_NORM = 1e-10
# A float16 row with more subnormal entries than this is not held to its row sum.
SUBNORMAL_SHARE = 0.01
# |sum of the gradient| / sum of |gradient| per row, 0 in exact arithmetic; 100 tied columns reach 2.6e-6.
ROW_SUM = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-2}
# Short rows are ill-conditioned: log(p/U), good to one rounding, may be nearly 0 in every column, and the slopes of
# a few columns may cancel.  Their SCED and gradients are measured against at least these units instead of themselves,
# and not against eager, whose rounding errors differ by chance.
SHORT_ROW = 129
SHORT_ROW_UNITS = {"sced": 1e-6, "gradient": 1e-2, "row_sum": 0.1}

# Relative (in the 2-norm) difference of two results that exact arithmetic makes equal.
IDENTITIES: dict[str, float] = {
    "float64": 1e-12,
    "float64_far": 1e-10,  # after a shift of the logits, whose rounding enters
    "float32": 1e-6,
    "float32_terms": 1e-5,  # sums of the cap of two backends or of terms with cancellation
    "float32_gradient": 4e-5,
    "eager_float32_gradient": 1e-4,  # of torch's compositions, whose sums lose more at V = 262,144
    "bfloat16_gradient": 4e-3,  # one rounding to 8 bits
    # A head: the logits and their gradient are rounded too, before the products.
    "bfloat16_head": 1e-2,
    "float16_head": 2e-3,
    "peer": 2e-2,  # another library computes the same thing, in its own precision
    "directional_derivative": 1e-6,
    "near_uniform": 1e-4,
    "stored_reference": 1e-9,  # float64 values of another implementation, kept in a file
}
GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}


def check_evaluation(
    actual: Evaluation, expected: Evaluation, eager: Evaluation | None = None, label: str = ""
) -> None:
    """Compare every term and gradient of ``actual`` with the oracle, ``expected``; ``eager`` adds condition 2.

    Raises:
        AssertionError: a tolerance is exceeded; the message starts with ``label`` and gives the error and the limit.
    """
    if actual.columns < SHORT_ROW:
        eager = None
    for name in actual.terms._fields:
        other = None if eager is None else getattr(eager.terms, name)
        unit = SHORT_ROW_UNITS.get(name, 0.0) if actual.columns < SHORT_ROW else 0.0
        check_term(name, getattr(actual.terms, name), getattr(expected.terms, name), other, label, unit)
    for part, gradient in actual.gradients.items():
        other = None if eager is None else eager.gradients[part]
        check_gradient(gradient, expected.gradients[part], other, f"{label} gradient of {part}".strip())


def check_term(
    name: str, actual: Tensor, expected: Tensor, eager: Tensor | None = None, label: str = "", least_unit: float = 0.0
) -> None:
    """Compare the row values of one term, float32 or float64, within ``TERM_TOLERANCES[name]``."""
    term = TERM_TOLERANCES[name]
    tolerance = term.float64 if actual.dtype == torch.float64 else term.float32
    absolute = term.unit == math.inf
    unit = torch.ones_like(expected) if absolute else expected.abs().clamp_min(max(term.unit, least_unit))
    # Below the smallest normal number a residual has lost its bits to underflow, or is 0; CE and the entropy of such a
    # row are its products with logit differences, below 1024 in every dtype.
    slack = 1024 * torch.finfo(actual.dtype).tiny

    def error(values: Tensor) -> Tensor:
        return ((values.double() - expected).abs() - slack).clamp_min(0) / unit.clamp_min(slack)

    _check_finite(f"{label} {name}".strip(), actual)
    _within(f"{label} {name}".strip(), error(actual), tolerance, None if eager is None else error(eager))


def check_gradient(actual: Tensor, expected: Tensor, eager: Tensor | None = None, label: str = "gradient") -> None:
    """Check a gradient (..., V) by its norms, the element rule and, in 16 bits, equality with the rounded oracle."""
    dtype = actual.dtype
    _check_finite(label, actual)
    error = (actual.double() - expected).abs().flatten(0, -2)
    other = None if eager is None else (eager.double() - expected).abs().flatten(0, -2)
    rows = expected.flatten(0, -2)
    short = rows.size(-1) < SHORT_ROW
    least = SHORT_ROW_UNITS["gradient"] if short else 0.0
    by_norm = rows.norm(dim=-1) >= SMALL_NORM
    by_element = ~by_norm if dtype in GRADIENT_MAX else torch.ones_like(by_norm)
    _check_elements(label, error[by_element], rows[by_element], dtype, least)
    for name, tolerances, order in (("2-norm", GRADIENT_L2, 2.0), ("max-norm", GRADIENT_MAX, math.inf)):
        if dtype in tolerances:
            scale = rows[by_norm].norm(order, dim=-1).clamp_min(least)
            errors = error[by_norm].norm(order, dim=-1) / scale
            eager_errors = None if other is None else other[by_norm].norm(order, dim=-1) / scale
            _within(f"{label} ({name})", errors, tolerances[dtype], eager_errors)
    if dtype in (torch.bfloat16, torch.float16) and not short:
        _check_rounded(label, actual.flatten(0, -2), rows)
    check_row_sums(actual.flatten(0, -2)[by_norm], label)


def check_row_sums(gradient: Tensor, label: str = "gradient", least_unit: float = 0.0) -> None:
    """Every row of a gradient sums to zero, relative to its sum of magnitudes or ``least_unit`` if that is larger."""
    rows = gradient.double().flatten(0, -2)
    if gradient.dtype == torch.float16:
        rows = rows[(rows.abs() < torch.finfo(torch.float16).tiny).double().mean(-1) <= SUBNORMAL_SHARE]
    least = SHORT_ROW_UNITS["row_sum"] if gradient.size(-1) < SHORT_ROW else torch.finfo(torch.float64).tiny
    least = max(least, least_unit)
    share = rows.sum(-1).abs() / rows.abs().sum(-1).clamp_min(least)
    _within(f"{label} (row sum)", share, Tolerance(ROW_SUM[gradient.dtype], 0.0))


def check_identity(actual: Tensor, expected: Tensor, identity: str, label: str = "") -> None:
    """Two results that exact arithmetic makes equal: relative difference in the 2-norm within ``IDENTITIES``."""
    difference = (actual.double() - expected.double()).norm()
    # A smaller result of float32 may be a sum of exponentials of which some underflowed.
    scale = expected.double().norm().clamp_min(1e-290 if actual.dtype == torch.float64 else 1e-29)
    relative = difference / scale
    _within(f"{label} (identity {identity})".strip(), relative.view(1), Tolerance(IDENTITIES[identity], 0.0))


def check_at_most(actual: Tensor, bound: Tensor | float, identity: str, label: str = "") -> None:
    """``actual <= bound`` up to the slack of an identity, relative to the larger of 1 and the bound."""
    limit = torch.as_tensor(bound, dtype=torch.float64)
    excess = (actual.double() - limit) / limit.abs().clamp_min(1)
    _within(f"{label} (bound)", excess.flatten(), Tolerance(IDENTITIES[identity], 0.0))


def _check_finite(label: str, actual: Tensor) -> None:
    if not bool(torch.isfinite(actual).all()):
        raise AssertionError(
            f"{label}: {int((~torch.isfinite(actual)).sum())} of {actual.numel()} values are not finite"
        )


def _within(label: str, errors: Tensor, tolerance: Tolerance, eager: Tensor | None = None) -> None:
    """Both conditions for the worst row; NaN errors fail."""
    if errors.numel() == 0:
        return
    worst, row = torch.nan_to_num(errors, nan=math.inf).flatten().max(-1)
    if not worst <= tolerance.cap:
        raise AssertionError(f"{label}: error {worst:.3g} in row {int(row)} exceeds the cap {tolerance.cap:.3g}")
    if eager is None:
        return
    limit = 2 * torch.nan_to_num(eager, nan=math.inf).max() + tolerance.floor
    if worst > limit:
        raise AssertionError(
            f"{label}: error {worst:.3g} in row {int(row)} exceeds twice the eager error plus the floor "
            f"{tolerance.floor:.3g}, {limit:.3g} (cap {tolerance.cap:.3g})"
        )


def _check_elements(label: str, error: Tensor, expected: Tensor, dtype: torch.dtype, least: float) -> None:
    info = torch.finfo(dtype)
    step = info.tiny * info.eps if dtype in (torch.bfloat16, torch.float16) else info.tiny
    rest = GRADIENT_MAX[torch.float64].cap if dtype == torch.float64 else ELEMENT_REST
    if expected.size(-1) == 0 or expected.size(0) == 0:
        return
    limit = (
        ELEMENT_ROUNDING[dtype] * expected.abs() + step + rest * expected.abs().amax(-1, keepdim=True).clamp_min(least)
    )
    excess = error / limit
    if bool((excess > 1).any()):
        place = divmod(int(excess.argmax()), error.size(-1))
        raise AssertionError(
            f"{label}: element {place} is off by {error[place]:.3g}, the bound is {limit[place]:.3g} "
            f"(expected {expected[place]:.6g})"
        )


def _check_rounded(label: str, actual: Tensor, expected: Tensor) -> None:
    different = int((actual != expected.to(actual.dtype)).sum())
    allowed = max(1, int((1 - EQUAL_SHARE) * actual.numel()))
    if different > allowed:
        raise AssertionError(
            f"{label}: {different} of {actual.numel()} entries differ from the rounded oracle, at most {allowed} may"
        )
