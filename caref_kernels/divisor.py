"""The divisor of a sum over rows: the number of valid rows of a mean, or the caller's number of items."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import describe, valid_rows
from .config import CarefConfig
from .distributed import dtensors
from .objective import accumulation_dtype, per_item

_POSITIVE = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}


class Divisor(NamedTuple):
    """The divisor of the sums over rows: a 0-D tensor, ``None`` for "sum" and "none".

    A mean over no row is NaN.  With ``any_items`` the value is a number of items that the host has not read: if it is
    0, the loss is 0 where no row is valid, and infinite elsewhere.
    """

    value: Tensor | None
    any_items: bool = False

    def divide(self, total: Tensor) -> Tensor:
        """A sum over rows, divided."""
        if self.value is None:
            return total
        return per_item(total, self.value) if self.any_items else total / self.value


def divisor_of(logits: Tensor, targets: Tensor | None, num_items, config: CarefConfig) -> Divisor:
    """The divisor, made on the device without reading anything back."""
    if num_items is None and config.reduction != "mean":
        return Divisor(None)
    dtype = accumulation_dtype(logits.dtype)
    if num_items is None:
        return Divisor(_count(logits, targets, config, dtype))
    if config.reduction != "mean":
        raise ValueError(f"num_items replaces the divisor of reduction='mean'; got reduction={config.reduction!r}")
    value, known = _check_num_items(num_items, logits, dtype)
    if known != 0:
        return Divisor(value, any_items=known is None)
    if torch.compiler.is_compiling() or (logits if targets is None else targets).device.type != "cpu":
        return Divisor(value, any_items=True)
    rows = int(_count(logits, targets, config, torch.int64))
    if rows:
        raise ValueError(f"num_items must be > 0 where there are valid rows; got {num_items!r} for {rows} valid rows")
    return Divisor(torch.ones_like(value))


def _count(logits: Tensor, targets: Tensor | None, config: CarefConfig, dtype: torch.dtype) -> Tensor:
    """The number of valid rows."""
    if targets is None:
        return torch.full((), math.prod(logits.shape[:-1]), dtype=dtype, device=logits.device)
    counts = valid_rows(targets, config.ignore_index)
    return counts.sum().to(dtype)


def _check_num_items(num_items, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, float | None]:
    """The number of items as a tensor, and as a number if it is known without a synchronisation."""
    if isinstance(num_items, Tensor):
        if dtensors.is_dtensor(num_items):
            dtensors.refuse("num_items", num_items, "")
        if num_items.dim() != 0 or num_items.dtype.is_complex or num_items.dtype == torch.bool:
            raise ValueError(f"num_items: expected a real 0-D tensor; got {describe(num_items)}")
        if num_items.device.type != "cpu" and num_items.device != logits.device:
            raise ValueError(f"num_items: on {num_items.device}, but logits are on {logits.device}")
        readable = num_items.device.type == "cpu" and not torch.compiler.is_compiling()
        return num_items.detach().to(dtype), _known(num_items.item(), dtype) if readable else None
    if isinstance(num_items, bool) or not isinstance(num_items, Real):
        raise TypeError(f"num_items: expected a number or a 0-D tensor; got {describe(num_items)}")
    known = _known(num_items, dtype)
    changed = ops.changing((num_items,), dtype, logits.device) if torch.compiler.is_compiling() else None
    if changed is not None:
        return changed.squeeze(0), known
    return torch.full((), float(known), dtype=dtype, device=logits.device), known


def _known(num_items: float, dtype: torch.dtype) -> float:
    low, high = _POSITIVE[dtype]
    if not (num_items == 0 or low <= num_items <= high):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"num_items must be 0, or finite and > 0 in {name}; got {num_items!r}")
    return num_items
