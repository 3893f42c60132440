"""Rows of many splits as means, spreads and paired differences."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .variants import VARIANTS

# FEB's two figures, and this harness's own.
MAIN = ("accuracy", "nbert")
EXTENSIONS = (
    *("choice_accuracy", "ece", "brier", "nll", "label_nll", "label_entropy", "explanation_nll"),
    *("explanation_entropy", "k_t", "broken", "unparsable"),
)
# What a row's curve holds at every logged step.
CURVE = ("loss", "ce", "sced", "kl", "entropy", "k_t")
_EXACT_FLIPS, _RANDOM_FLIPS = 14, 10_000
# Two-sided; fewer splits cannot reach the level by flipping signs, whatever the figures: 2 / 2^6 < 0.05.
LEVEL = 0.05
FEWEST_SPLITS = 6
# (1.96 + 0.84)^2: five percent two-sided, eighty percent power.
_POWER = 7.85


class Cell(NamedTuple):
    """A figure over splits: mean, standard deviation (ddof 0, as FEB), standard error (ddof 1; None for one split)."""

    mean: float
    std: float
    error: float | None
    splits: int


@dataclass(frozen=True)
class Difference:
    """``first - second`` over the splits that both have.

    ``p`` is from flipping signs, two-sided: it cannot be below 2 / 2^splits.  ``detectable`` is the difference that
    this many splits would find in 80 % of the cases, ``needed`` the splits that the observed one would take, which is
    never fewer than sign flips can resolve.
    """

    first: str
    second: str
    splits: int
    mean: float
    error: float | None
    p: float
    detectable: float | None
    needed: int | None


def select(rows: Iterable[dict[str, Any]], alpha: float, beta: float) -> list[dict[str, Any]]:
    """The rows with these exponents."""
    return [row for row in rows if (row["alpha"], row["beta"]) == (alpha, beta)]


def values(rows: Iterable[dict[str, Any]], dataset: str, variant: str, metric: str) -> dict[int, float]:
    """The figure of every split that has it, by seed."""
    found = {}
    for row in rows:
        value = row["metrics"].get(metric)
        if (row["dataset"], row["variant"]) == (dataset, variant) and value is not None:
            found[row["seed"]] = float(value)
    return found


def cell(numbers: Iterable[float]) -> Cell | None:
    """The summary of these numbers, ``None`` for none: nothing is printed that was not measured."""
    numbers = list(numbers)
    if not numbers:
        return None
    error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return Cell(statistics.fmean(numbers), statistics.pstdev(numbers), error, len(numbers))


def difference(rows: Sequence[dict[str, Any]], dataset: str, pair: tuple[str, str], metric: str) -> Difference | None:
    """The paired difference of two variants, ``None`` if no split has both."""
    first, second = (values(rows, dataset, variant, metric) for variant in pair)
    deltas = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not deltas:
        return None
    mean = statistics.fmean(deltas)
    spread = statistics.stdev(deltas) if len(deltas) > 1 else None
    return Difference(
        *pair,
        splits=len(deltas),
        mean=mean,
        error=None if spread is None else spread / math.sqrt(len(deltas)),
        p=sign_flip(deltas),
        detectable=None if spread is None else math.sqrt(_POWER / len(deltas)) * spread,
        needed=None if not spread or not mean else max(FEWEST_SPLITS, math.ceil(_POWER * (spread / mean) ** 2)),
    )


def sign_flip(deltas: Sequence[float]) -> float:
    """Two-sided p-value of the mean of ``deltas`` under random signs; exact up to 14 of them."""
    observed = abs(math.fsum(deltas))
    # Equal sums must count as equal although they are added in another order.
    bound = observed * (1 - 1e-12)
    if len(deltas) <= _EXACT_FLIPS:
        flips = itertools.product((1, -1), repeat=len(deltas))
        hits = [abs(math.fsum(s * d for s, d in zip(signs, deltas, strict=True))) >= bound for signs in flips]
        return sum(hits) / len(hits)
    generator = random.Random(0)
    hits = [
        abs(math.fsum(generator.choice((1, -1)) * delta for delta in deltas)) >= bound for _ in range(_RANDOM_FLIPS)
    ]
    return (1 + sum(hits)) / (1 + len(hits))


def pairs(variants: Iterable[str]) -> list[tuple[str, str]]:
    """The comparisons that the paper's questions ask for: each objective with cross-entropy alone on the same
    parameters, and CAREF-AQ with every other row of the table."""
    present = [name for name in VARIANTS if name in set(variants)]
    found = []
    for name in present:
        objective, _, trained = name.partition("-")
        counterpart = f"CE-{trained}"
        if objective in ("CAREF", "SCED", "KL") and counterpart in present:
            found.append((name, counterpart))
    if "CAREF-AQ" in present:
        found += [("CAREF-AQ", name) for name in present if VARIANTS[name].paper and name != "CAREF-AQ"]
    return found
