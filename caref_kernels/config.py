"""Options of the CAREF loss: every default, every range check and the text of every error about them.

Nothing else in the package repeats a default.  ``CarefConfig`` is the object that a user holds; ``RowSpec`` is the part
of it that a backend needs to compute one row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple, TypeVar, get_args

from .sparsity import Sparsity, TopKSpec, check_sparsity

_Class = TypeVar("_Class")
Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

# 16 keeps (log V)**alpha inside float32 for every vocabulary (it overflows from alpha = 36 at V = 262,144).
ALPHA_RANGE = (1.0, 16.0)
# Below 0.1 the derivative (1-p)**(beta-1) leaves float32 on confident rows; beta = 0 drops the factor altogether.
BETA_RANGE = (0.1, 16.0)
# Exponents whose SCED follows from the sums of one pass, as those of visit_exponents() in csrc/row_kinds.h; a test
# compares the two.  For other exponents the expansion of (1-p)^beta and (y-c)^alpha cancels more digits than float32
# has.
ONE_PASS_EXPONENTS = ((2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2))
# Normal numbers of float32.
FACTOR_RANGE = (2.0**-126, 2.0**127)
INT64_RANGE = (-(2**63), 2**63 - 1)


class RowSpec(NamedTuple):
    """What one row's terms and gradient depend on besides the logits and the label."""

    alpha: float
    beta: float
    vocab_size: int  # V of U = 1/V; 0 means the number of columns, so that a traced graph fits any number
    ignore_index: int
    with_sced: bool  # False skips the divergence sums: its column of the terms is then 0
    # The top-k mask of SCED, flat, because operators take numbers: see sparsity.TopKSpec.
    k_scale: float = 0.0
    k_min: int = 0
    k_max: int = 0
    with_z: bool = False  # whether there is a z-loss
    smoothed: int = 0  # columns over which labels are smoothed: 0 for none, -1 for all, as with vocab_size

    @property
    def is_extended(self) -> bool:
        """Whether a row has the terms of objective.EXTRA_TERMS too."""
        return self.with_z or self.smoothed != 0

    @property
    def is_masked(self) -> bool:
        """Whether SCED is summed over the top k of a row instead of over all of it."""
        return self.k_min > 0

    @property
    def is_one_pass(self) -> bool:
        """Whether SCED and its gradient follow from sums of one pass over the row."""
        return self.with_sced and not self.is_masked and (self.alpha, self.beta) in ONE_PASS_EXPONENTS

    @property
    def top_k(self) -> TopKSpec:
        """The fields of the top-k mask."""
        return TopKSpec(self.k_scale, self.k_min, self.k_max)

    def for_columns(self, columns: int) -> RowSpec:
        """The specification that backends get: ``vocab_size`` and ``k_max`` as numbers, and k within the row."""
        spec = self if self.vocab_size else self._replace(vocab_size=columns)
        spec = spec._replace(smoothed=columns) if spec.smoothed else spec
        if not self.is_masked:
            return spec
        return spec._replace(k_min=min(self.k_min, columns), k_max=min(self.k_max or columns, columns))


def check_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first option that ``owner`` does not have, with the closest one that it has."""
    known = tuple(known)
    for name in options:
        if name not in known:
            import difflib  # late: for an error alone

            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise TypeError(f"{owner} has no option {name!r}; {hint}")


def _checks_options(owner: type[_Class]) -> type[_Class]:
    """Class decorator: the constructor of a dataclass suggests the closest option for a misspelt one."""
    construct, known = owner.__init__, tuple(owner.__dataclass_fields__)

    @functools.wraps(construct)
    def __init__(self, *values, **options) -> None:
        check_options(owner.__name__, options, known)
        construct(self, *values, **options)

    owner.__init__ = __init__
    return owner


@_checks_options
@dataclass(frozen=True, kw_only=True)
class CarefConfig:
    """Options of :func:`caref_kernels.caref_loss`, which documents each; checked once, immutable and picklable.

    The softmax always runs over every column, whatever ``vocab_size`` is: to leave padded columns out of it as well,
    pass ``logits[..., :n]``.

    Raises:
        TypeError: there is no option of that name, or it has the wrong type (tensors included: no gradient with
            respect to an option is provided).
        ValueError: an option is out of its range.  Every message names the option, its value and the range.
    """

    alpha: float = 2.0
    beta: float = 1.0
    lambda_sced: float = 0.1
    lambda_kl: float = 0.1
    lambda_z: float = 0.0
    label_smoothing: float = 0.0
    sparsity: Sparsity | None = None
    ignore_index: int = -100
    shift: bool = False
    reduction: Reduction = "mean"
    vocab_size: int | None = None
    backend: str = "auto"
    inplace_backward: bool = False
    return_terms: bool = False

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)
        _check_beta(self.beta)
        _check_weight("lambda_sced", self.lambda_sced)
        _check_weight("lambda_kl", self.lambda_kl)
        _check_weight("lambda_z", self.lambda_z)
        if not 0 <= _real("label_smoothing", self.label_smoothing) <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1]; got {self.label_smoothing!r}")
        check_sparsity(self.sparsity)
        _check_integer("ignore_index", self.ignore_index, *INT64_RANGE)
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of 'mean', 'sum', 'none'; got {self.reduction!r}")
        if self.vocab_size is not None:
            _check_integer("vocab_size", self.vocab_size, 1, INT64_RANGE[1])
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a string; got {self.backend!r}")
        for name in ("shift", "inplace_backward", "return_terms"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")

    def row_spec(self, columns: int) -> RowSpec:
        """The row specification for logits of ``columns`` columns.

        Raises:
            ValueError: ``vocab_size`` is more than ten times the number of columns.
        """
        if self.vocab_size is not None and self.vocab_size > 10 * columns:
            raise ValueError(
                f"vocab_size must be in [1, 10 * columns] = [1, {10 * columns}] for logits of {columns} columns; "
                f"got {self.vocab_size}"
            )
        vocab_size = 0 if self.vocab_size is None else int(self.vocab_size)
        with_sced = self.lambda_sced != 0 or self.return_terms
        top_k = self.sparsity.top_k_spec() if self.sparsity is not None and with_sced else TopKSpec()
        smoothed = -1 if self.label_smoothing != 0 else 0
        return RowSpec(
            float(self.alpha),
            float(self.beta),
            vocab_size,
            int(self.ignore_index),
            with_sced,
            *top_k,
            with_z=self.lambda_z != 0,
            smoothed=smoothed,
        )

    def weights(self) -> tuple[float, ...]:
        """The weights of the terms in the loss: of objective.TERMS, and of objective.EXTRA_TERMS if there are any."""
        smoothing = float(self.label_smoothing)
        weights = (1.0 - smoothing, float(self.lambda_sced), float(self.lambda_kl))
        return (*weights, float(self.lambda_z), smoothing) if self.lambda_z or smoothing else weights


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options of :func:`caref_kernels.linear_caref_loss`, which documents each, that other losses do not have.

    Raises:
        TypeError, ValueError: an option has the wrong type, or is out of its range.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    chunk_rows: int | None = None
    reduce_hidden_grad: bool = True

    def __post_init__(self) -> None:
        scale = _real("logit_scale", self.logit_scale)
        cap = 1.0 if self.softcap is None else _real("softcap", self.softcap)
        factors = {"logit_scale": scale, "softcap": cap, "logit_scale / softcap": scale / cap if cap else math.inf}
        for name, value in factors.items():
            if not FACTOR_RANGE[0] <= value <= FACTOR_RANGE[1]:
                raise ValueError(f"{name} must be finite and > 0 in float32; got {value!r}")
        rows = self.chunk_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, Integral)):
            raise TypeError(f"chunk_rows must be an integer or None; got {rows!r} of type {type(rows).__name__}")
        if rows is not None and rows < 1:
            raise ValueError(f"chunk_rows must be >= 1 or None; got {rows}")
        if not isinstance(self.reduce_hidden_grad, bool):
            raise TypeError(f"reduce_hidden_grad must be True or False; got {self.reduce_hidden_grad!r}")


def _check_alpha(alpha: object) -> None:
    low, high = ALPHA_RANGE
    value = _real("alpha", alpha)
    if not low <= value <= high:
        raise ValueError(
            f"alpha must be in [{low:g}, {high:g}]; got {alpha!r} (for alpha < 1 the gradient is infinite where "
            f"p = 1/V, above {high:g} the term overflows float32)"
        )


def _check_beta(beta: object) -> None:
    low, high = BETA_RANGE
    value = _real("beta", beta)
    if value != 0 and not low <= value <= high:
        raise ValueError(f"beta must be 0 or in [{low:g}, {high:g}]; got {beta!r}")


def _check_weight(name: str, weight: object) -> None:
    value = _real(name, weight)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0; got {weight!r}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r} of type {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}]; got {value!r}")


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a Python float or int; got {value!r} of type {type(value).__name__} "
            f"(gradients with respect to {name} are not provided)"
        )
    try:
        return float(value)
    except OverflowError:  # an integer above the largest float, which no range holds
        return math.inf
