"""nn.Module forms of the public functions, each with a frozen configuration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .config import CarefConfig, HeadOptions, check_options
from .distributed.shard import VocabShard
from .functional import CarefOutput, caref_from_config, sced_from_config
from .linear import linear_from_config

if TYPE_CHECKING:
    import torch.distributed as dist
    from typing_extensions import Unpack

    from .keywords import ConfigKeywords, ScedKeywords


class _ConfiguredLoss(nn.Module):
    config: CarefConfig
    _OPTIONS = tuple(field.name for field in dataclasses.fields(CarefConfig))  # and what else the module has

    def __init__(self, config: CarefConfig | None = None, **options: Unpack[ConfigKeywords]) -> None:
        super().__init__()
        check_options(type(self).__name__, options, self._OPTIONS)
        if config is not None and options:
            raise TypeError(f"give either a CarefConfig or options, not both; got {sorted(options)} besides the config")
        if config is not None and not isinstance(config, CarefConfig):
            raise TypeError(f"config must be a CarefConfig; got {config!r}")
        self.config = CarefConfig(**options) if config is None else config

    def extra_repr(self) -> str:
        return repr(self.config)


class CarefLoss(_ConfiguredLoss):
    """:func:`caref_kernels.caref_loss` as a module: ``CarefLoss(lambda_sced=0.05)(logits, labels)``.

    Args:
        config: a :class:`CarefConfig`, or give its fields as keywords.

    Raises:
        TypeError, ValueError: as :class:`CarefConfig`; the call raises as :func:`caref_loss`.
    """

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        num_items: float | Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        shard: VocabShard | dist.ProcessGroup | None = None,
    ) -> Tensor | CarefOutput:
        """See :func:`caref_kernels.caref_loss` for shapes, dtypes, errors, precision and memory."""
        return caref_from_config(logits, labels, num_items, self.config, shard, token_weights)


class LinearCarefLoss(_ConfiguredLoss):
    """:func:`caref_kernels.linear_caref_loss` as a module: ``LinearCarefLoss()(hidden, lm_head.weight, labels)``.

    Args:
        config: a :class:`CarefConfig`, or give its fields as keywords.
        logit_scale, softcap, chunk_rows, reduce_hidden_grad: as in :func:`linear_caref_loss`.

    Raises:
        TypeError, ValueError: as :class:`CarefConfig`; the call raises as :func:`linear_caref_loss`.
    """

    _OPTIONS = (*_ConfiguredLoss._OPTIONS, *(field.name for field in dataclasses.fields(HeadOptions)))

    def __init__(
        self,
        config: CarefConfig | None = None,
        *,
        logit_scale: float = HeadOptions.logit_scale,
        softcap: float | None = HeadOptions.softcap,
        chunk_rows: int | None = HeadOptions.chunk_rows,
        reduce_hidden_grad: bool = HeadOptions.reduce_hidden_grad,
        **options: Unpack[ConfigKeywords],
    ) -> None:
        super().__init__(config, **options)
        self.head = HeadOptions(
            logit_scale=logit_scale, softcap=softcap, chunk_rows=chunk_rows, reduce_hidden_grad=reduce_hidden_grad
        )

    def extra_repr(self) -> str:
        """The configuration and the options of the head."""
        return f"{self.config!r}, {self.head!r}"

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        shard: VocabShard | dist.ProcessGroup | None = None,
    ) -> Tensor | CarefOutput:
        """See :func:`caref_kernels.linear_caref_loss` for shapes, dtypes, errors, precision and memory."""
        return linear_from_config(
            (hidden, weight, bias), labels, num_items, self.config, self.head, shard, token_weights
        )


class SCEDLoss(_ConfiguredLoss):
    """:func:`caref_kernels.fused_sced` as a module: ``SCEDLoss(alpha=2.0)(logits, valid)``.

    Args:
        config: a :class:`CarefConfig` (what needs labels or has another term has no effect), or its fields.

    Raises:
        TypeError, ValueError: as :class:`CarefConfig`, and for an option that this term does not have.
    """

    _FIXED = ("lambda_sced", "lambda_kl", "lambda_z", "label_smoothing", "ignore_index", "shift", "return_terms")

    def __init__(self, config: CarefConfig | None = None, **options: Unpack[ScedKeywords]) -> None:
        fixed = [name for name in self._FIXED if name in options]
        if fixed:
            raise TypeError(f"SCEDLoss has no option {fixed[0]!r}; it is the SCED term alone, with weight 1")
        check_options("SCEDLoss", options, (name for name in self._OPTIONS if name not in self._FIXED))
        super().__init__(config, **options)
        others = {"lambda_kl": 0.0, "lambda_z": 0.0, "label_smoothing": 0.0}
        self.config = dataclasses.replace(self.config, lambda_sced=1.0, **others)

    def forward(self, logits: Tensor, valid: Tensor | None = None, num_items: float | Tensor | None = None) -> Tensor:
        """See :func:`caref_kernels.fused_sced` for shapes, dtypes, errors, precision and memory."""
        return sced_from_config(logits, valid, num_items, self.config)
