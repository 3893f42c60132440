"""Shared by tests/ and benchmarks/: logit regimes, cases, the float64 oracle, tolerances.  Requires torch alone."""

from .cases import REGIMES, Case, confident_logits, make_case
from .oracle import GRADIENT_PARTS, Evaluation, eager_terms, evaluate, evaluate_eager, oracle, oracle_given
from .tolerances import (
    GRADCHECK,
    IDENTITIES,
    check_at_most,
    check_evaluation,
    check_gradient,
    check_identity,
    check_row_sums,
    check_term,
)

__all__ = [
    "GRADCHECK",
    "GRADIENT_PARTS",
    "IDENTITIES",
    "REGIMES",
    "Case",
    "Evaluation",
    "check_at_most",
    "check_evaluation",
    "check_gradient",
    "check_identity",
    "check_row_sums",
    "check_term",
    "confident_logits",
    "eager_terms",
    "evaluate",
    "evaluate_eager",
    "make_case",
    "oracle",
    "oracle_given",
]
