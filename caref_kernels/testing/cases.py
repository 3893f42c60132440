"""Logit regimes, seeded cases, the float64 oracle and the plain torch composition to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..config import CarefConfig
from ..functional import CarefOutput, caref_loss
from ..objective import accumulation_dtype
from ..sparsity import TopK

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


GRADIENT_PARTS = ("loss", "ce", "sced", "kl")


class Terms(NamedTuple):
    """What every call returns of a row: :class:`caref_kernels.CarefOutput` without the support of its mask."""

    loss: Tensor
    ce: Tensor
    sced: Tensor
    kl: Tensor
    entropy: Tensor


class Evaluation(NamedTuple):
    """Terms of each row, and for each part named in ``GRADIENT_PARTS`` the gradient of its sum over rows."""

    terms: Terms
    gradients: dict[str, Tensor]
    columns: int


def evaluate(logits: Tensor, labels: Tensor, parts: Iterable[str] = GRADIENT_PARTS, **options) -> Evaluation:
    """Run :func:`caref_kernels.caref_loss` row by row, with the gradient of every part on its own.

    ``logits`` keep their strides; ``options`` go to the function.  Gradients are those of a leaf of the same shape.
    """
    leaf = logits.detach().requires_grad_()
    return _differentiate(leaf, caref_loss(leaf, labels, reduction="none", return_terms=True, **options), parts)


def oracle(logits: Tensor, labels: Tensor, parts: Iterable[str] = GRADIENT_PARTS, **options) -> Evaluation:
    """:func:`evaluate` by the reference in float64 on the upcast logits; ``options`` must not name a backend."""
    return evaluate(logits.double(), labels, parts, backend="reference", **options)


def oracle_given(support: Tensor, logits: Tensor, labels: Tensor, parts: Iterable[str] = GRADIENT_PARTS, **options):
    """:func:`oracle` with ``TopK(support[row])`` for each row (N,): a mask's values are compared given its k."""
    singles = [
        oracle(logits[row : row + 1], labels[row : row + 1], parts, sparsity=TopK(int(k)), **options)
        for row, k in enumerate(support.tolist())
    ]
    terms = Terms(*(torch.cat([getattr(single.terms, name) for single in singles]) for name in Terms._fields))
    gradients = {part: torch.cat([single.gradients[part] for single in singles]) for part in parts}
    return Evaluation(terms, gradients, logits.size(-1))


def eager_terms(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = CarefConfig.alpha,
    beta: float = CarefConfig.beta,
    lambda_sced: float = CarefConfig.lambda_sced,
    lambda_kl: float = CarefConfig.lambda_kl,
    vocab_size: int | None = None,
) -> CarefOutput:
    """The objective as a user would compose it in torch: per-row terms, float32 (float64 for float64 logits).

    It shares no code with :mod:`caref_kernels.objective`.  NaN where a logit is -inf.
    """
    log_p = functional.log_softmax(logits, -1, dtype=accumulation_dtype(logits.dtype))
    p = log_p.exp()
    log_ratio = log_p + math.log(vocab_size or logits.size(-1))
    counts = labels != CarefConfig.ignore_index
    ce = functional.nll_loss(
        log_p.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=CarefConfig.ignore_index
    ).view(labels.shape)
    sced = ((p * log_ratio.abs()) ** alpha * (1 - p) ** beta).sum(-1) * counts
    kl = (p * log_ratio).sum(-1) * counts
    entropy = -(p * log_p).sum(-1) * counts
    return CarefOutput(ce + lambda_sced * sced + lambda_kl * kl, ce, sced, kl, entropy)


def evaluate_eager(logits: Tensor, labels: Tensor, parts: Iterable[str] = GRADIENT_PARTS, **options) -> Evaluation:
    """:func:`evaluate` for :func:`eager_terms`."""
    leaf = logits.detach().requires_grad_()
    return _differentiate(leaf, eager_terms(leaf, labels, **options), parts)


def _differentiate(leaf: Tensor, terms: CarefOutput, parts: Iterable[str]) -> Evaluation:
    gradients = {part: torch.autograd.grad(getattr(terms, part).sum(), leaf, retain_graph=True)[0] for part in parts}
    values = (getattr(terms, name).detach() for name in Terms._fields)
    return Evaluation(Terms(*values), gradients, leaf.size(-1))
