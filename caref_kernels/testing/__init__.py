"""What tests/ and benchmarks/ share: logit regimes, cases, the float64 oracle, error budgets.  Needs torch alone."""

from .budgets import (
    GRADCHECK,
    IDENTITIES,
    check_at_most,
    check_evaluation,
    check_gradient,
    check_identity,
    check_row_sums,
    check_term,
)
from .cases import (
    GRADIENT_PARTS,
    REGIMES,
    Case,
    Evaluation,
    confident_logits,
    eager_terms,
    evaluate,
    evaluate_eager,
    make_case,
    oracle,
    oracle_given,
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
