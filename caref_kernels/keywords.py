"""The types of keywords that several public signatures share, for type checkers alone.

A test compares their names with those of the signatures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from .config import Reduction
from .sparsity import Sparsity

if TYPE_CHECKING:
    import torch.distributed as dist

    from .distributed.shard import VocabShard


class _RowKeywords(TypedDict, total=False):
    alpha: float
    beta: float
    sparsity: Sparsity | None
    reduction: Reduction
    vocab_size: int | None
    backend: str


class _LabelKeywords(_RowKeywords, total=False):
    lambda_sced: float
    lambda_kl: float
    lambda_z: float
    label_smoothing: float
    ignore_index: int
    shift: bool


class ScedKeywords(_RowKeywords, total=False):
    """Options of ``SCEDLoss``."""

    inplace_backward: bool


class ConfigKeywords(_LabelKeywords, total=False):
    """The fields of ``CarefConfig``."""

    inplace_backward: bool
    return_terms: bool


class _CallKeywords(_LabelKeywords, total=False):
    num_items: float | Tensor | None
    token_weights: Tensor | None
    shard: VocabShard | dist.ProcessGroup | None


class LossKeywords(_CallKeywords, total=False):
    """Keywords of ``caref_loss`` besides ``return_terms``, on which the type of its result depends."""

    inplace_backward: bool


class LinearKeywords(_CallKeywords, total=False):
    """Keywords of ``linear_caref_loss`` besides ``return_terms``, on which the type of its result depends."""

    logit_scale: float
    softcap: float | None
    chunk_rows: int | None
    reduce_hidden_grad: bool
