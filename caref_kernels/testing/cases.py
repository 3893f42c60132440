"""Logit regimes, and seeded cases drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import CarefConfig

Regime = Callable[[int, int, torch.Generator], Tensor]


def _noise(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _normal(sigma: float) -> Regime:
    return lambda rows, columns, generator: sigma * _noise(rows, columns, generator)


def _confident(rest: float) -> Regime:
    """One column holds 1 - ``rest`` of the probability, noise of sigma 1 shares the remainder."""

    def regime(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        logits = _noise(rows, columns, generator)
        if columns == 1:
            return logits
        top = torch.randint(columns, (rows, 1), generator=generator)
        others = logits.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
        return logits.scatter(-1, top, others + math.log1p(-rest) - math.log(rest))

    return regime


def _bimodal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Two columns share nearly everything, 0.57 to 0.43, so that every small change moves the loss."""
    logits = _noise(rows, columns, generator) - 5 - math.log(columns)
    peaks = torch.rand(rows, columns, generator=generator).argsort(-1)[:, :2]
    return logits.scatter(-1, peaks, torch.tensor([[0.28, 0.0]], dtype=torch.float64).repeat(rows, 1)[:, :columns])


def _zipf(exponent: float, sigma: float) -> Regime:
    """Zipf's law over a random order of the columns, with log-normal noise: the shape of language models' rows."""

    def regime(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        rank = torch.rand(rows, columns, generator=generator).argsort(-1) + 1
        return -exponent * rank.double().log() + sigma * _noise(rows, columns, generator)

    return regime


def _tied_maxima(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Two to four columns share the maximum, as in 4 % of real bf16 rows."""
    logits = _noise(rows, columns, generator)
    order = torch.rand(rows, columns, generator=generator).argsort(-1)
    for row in range(rows):
        logits[row, order[row, : 2 + row % 3]] = logits[row].max() + 4
    return logits


REGIMES: dict[str, Regime] = {
    "normal_0.1": _normal(0.1),
    "normal_1": _normal(1.0),
    "normal_3": _normal(3.0),
    "normal_10": _normal(10.0),
    "near_uniform": _normal(1e-4),
    "confident_1e-4": _confident(1e-4),
    "confident_1e-7": _confident(1e-7),
    "confident_1e-12": _confident(1e-12),
    "bimodal": _bimodal,
    "zipf": _zipf(1.0, 0.0),
    "lm_like": _zipf(1.3, 1.0),
    "tied_maxima": _tied_maxima,
}


def confident_logits(rest: float, rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) float64 logits whose arg-max has probability 1 - ``rest``."""
    return _confident(rest)(rows, columns, torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    """Logits (N, V) in their dtype and int64 labels (N,); ignored rows hold the default ignore_index."""

    logits: Tensor
    labels: Tensor


def make_case(
    regime: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0, ignored: int = 0
) -> Case:
    """Seeded logits of one regime; even rows are labelled with their arg-max, odd ones at random.

    Raises:
        KeyError: unknown regime.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = REGIMES[regime](rows, columns, generator).to(dtype)
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[::2] = logits[::2].argmax(-1)
    labels[torch.randperm(rows, generator=generator)[:ignored]] = CarefConfig.ignore_index
    return Case(logits, labels)
