"""Fused kernels for the CAREF loss: cross-entropy, SCED and KL to uniform in one pass over the logits."""

from .backends import explain
from .config import CarefConfig
from .distributed.shard import VocabShard
from .functional import CarefOutput, caref_loss, fused_sced
from .linear import linear_caref_loss
from .modules import CarefLoss, LinearCarefLoss, SCEDLoss
from .sparsity import EntropyTopK, TopK

__version__ = "0.1.0"

__all__ = [
    "CarefConfig",
    "CarefLoss",
    "CarefOutput",
    "EntropyTopK",
    "LinearCarefLoss",
    "SCEDLoss",
    "TopK",
    "VocabShard",
    "__version__",
    "caref_loss",
    "explain",
    "fused_sced",
    "linear_caref_loss",
]
