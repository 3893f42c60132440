"""Evaluations to compare: a backend, the float64 oracle, and the plain torch composition (eager)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..config import CarefConfig
from ..functional import CarefOutput, caref_loss
from ..objective import accumulation_dtype
from ..sparsity import TopK

GRADIENT_PARTS = ("loss", "ce", "sced", "kl")


class Terms(NamedTuple):
    """The terms of a row, as every call returns them: the first five fields of :class:`caref_kernels.CarefOutput`."""

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


def oracle_given(num_kept: Tensor, logits: Tensor, labels: Tensor, parts: Iterable[str] = GRADIENT_PARTS, **options):
    """:func:`oracle` with ``TopK(num_kept[row])`` for each row (N,), to compare the values given the k of a row."""
    singles = [
        oracle(logits[row : row + 1], labels[row : row + 1], parts, sparsity=TopK(int(k)), **options)
        for row, k in enumerate(num_kept.tolist())
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
