"""Which tokens of a row enter SCED: the policies, and the top-k mask that they give, in plain torch.

A top-k mask keeps the k largest logits of a row.  With tau the k-th largest of them, n_gt the number of columns above
tau and n_eq the number that equal it:

    w = 1 above tau        w = (k - n_gt) / n_eq at tau        w = 0 below

The weights of a row sum to k exactly, the value is that of any way to break the tie, and the order of the columns does
not matter.  Ties are the rule in 16 bits.  -0.0 equals 0.0, and columns of -inf are never part of a top-k mask: a
row with fewer than k others keeps those.  The mask is a constant for the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TOKENS = 2**31 - 1


class TopKSpec(NamedTuple):
    """k = ceil(scale * exp(H)) clipped to [k_min, min(k_max, V)], as operators take it; k_min 0 means no mask."""

    scale: float = 0.0
    k_min: int = 0
    k_max: int = 0  # 0 means V


@dataclass(frozen=True)
class TopK:
    """The k largest logits of every row; k above the number of columns keeps them all.

    Args:
        k: number of tokens, an integer from 1 on.
    Raises:
        TypeError, ValueError: k is not an integer, or below 1.
    """

    k: int

    def __post_init__(self) -> None:
        _check_count("k", self.k, 1)

    def top_k_spec(self) -> TopKSpec:
        """The policy as operators take it."""
        return TopKSpec(0.0, int(self.k), int(self.k))


@dataclass(frozen=True, kw_only=True)
class EntropyTopK:
    """The k_t largest logits of row t, with k_t = ceil(scale * exp(H_t)) clipped to [k_min, min(k_max, V)].

    exp(H) is the number of tokens over which a row spreads its probability: a confident row keeps few tokens, a
    diffuse one many.  On rows of real language models ``scale=1`` keeps 99.97 % of SCED, so that it hardly differs from
    no mask; values from 0.1 to 0.25 change the loss.

    Args:
        scale: finite and positive.
        k_min: fewest tokens of a row, an integer from 1 on.
        k_max: most tokens of a row, an integer from ``k_min`` on; ``None`` means the number of columns.
    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of its range.
    """

    scale: float = 1.0
    k_min: int = 1
    k_max: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, Real):
            raise TypeError(
                f"scale must be a Python float or int; got {self.scale!r} of type {type(self.scale).__name__}"
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be finite and > 0; got {self.scale!r}")
        _check_count("k_min", self.k_min, 1)
        if self.k_max is not None:
            _check_count("k_max", self.k_max, 1)
            if self.k_max < self.k_min:
                raise ValueError(f"k_max must be None or at least k_min = {self.k_min}; got {self.k_max!r}")

    def top_k_spec(self) -> TopKSpec:
        """The policy as operators take it."""
        return TopKSpec(float(self.scale), int(self.k_min), 0 if self.k_max is None else int(self.k_max))


Sparsity = TopK | EntropyTopK


def check_sparsity(sparsity: object) -> None:
    """Raise TypeError unless ``sparsity`` is a policy or ``None``."""
    if sparsity is not None and not isinstance(sparsity, Sparsity):
        raise TypeError(
            f"sparsity must be None, TopK(k) or EntropyTopK(...); got {sparsity!r} of type {type(sparsity).__name__}"
        )


class TopKMask(NamedTuple):
    """The top-k masks of N rows of V columns; constants for autograd."""

    weight: Tensor  # (N, V) w
    num_kept: Tensor  # (N, 1) k
    threshold: Tensor  # (N, 1) tau
    tie_weight: Tensor  # (N, 1) (k - n_gt) / n_eq

    def statistics(self) -> Tensor:
        """(N, 3): what a backward needs to compute the mask again."""
        return torch.cat((self.num_kept, self.threshold, self.tie_weight), -1)


@torch.no_grad()
def row_num_kept(entropy: Tensor, top_k: TopKSpec) -> Tensor:
    """(N, 1) int64: k of each row from its entropy (N, 1) in nats; NaN gives k_min, and the row is NaN anyway.

    ``top_k`` has k_max as a number.
    """
    wanted = (top_k.scale * entropy.double().exp()).ceil()
    wanted = torch.where(wanted >= top_k.k_min, wanted, float(top_k.k_min))  # NaN compares false
    return wanted.clamp_max(top_k.k_max).long()


@torch.no_grad()
def top_k_mask(logits: Tensor, num_kept: Tensor) -> TopKMask:
    """The mask of the ``num_kept`` (N, 1) largest of each row of ``logits`` (N, V), float32 or float64.

    It sorts every row, because this is the reference, not a kernel.  The mask of a row with NaN has no meaning.
    """
    finite = (logits > -math.inf).sum(-1, keepdim=True).clamp_min(1)
    num_kept = torch.minimum(num_kept, finite)
    threshold = logits.sort(-1, descending=True).values.gather(-1, num_kept - 1)
    above = logits > threshold
    equal = logits == threshold
    missing = num_kept - above.sum(-1, keepdim=True)
    tie_weight = missing.to(logits.dtype) / equal.sum(-1, keepdim=True).clamp_min(1)
    weight = torch.where(equal, tie_weight, above.to(logits.dtype))
    return TopKMask(weight, num_kept.to(logits.dtype), threshold, tie_weight)


def _check_count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r} of type {type(value).__name__}")
    if not low <= value <= MOST_TOKENS:
        raise ValueError(f"{name} must be in [{low}, {MOST_TOKENS}]; got {value!r}")
