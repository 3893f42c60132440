"""The exchanges between the ranks that share a row, over torch.distributed.

torch.distributed is imported inside the functions, because importing it takes as long as the rest of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist

# The corner of a tensor that is compared between ranks, and how many different numbers it must have to identify it.
CORNER, LEAST_DIFFERENT = 64, 32


class Collectives(Protocol):
    """The exchanges that a sharded row takes; every rank gets the same result, bitwise."""

    def maximum(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the ranks."""

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum over the ranks."""

    def gather(self, values: Tensor) -> Tensor:
        """The (N, K) values of all ranks side by side."""


class GroupCollectives(NamedTuple):
    """:class:`Collectives` over a process group; ``values`` may be overwritten."""

    group: dist.ProcessGroup | None

    def maximum(self, values: Tensor) -> Tensor:
        """See :class:`Collectives`."""
        return self._all_reduce(values, "MAX")

    def total(self, values: Tensor) -> Tensor:
        """See :class:`Collectives`."""
        return self._all_reduce(values, "SUM")

    def gather(self, values: Tensor) -> Tensor:
        """See :class:`Collectives`."""
        dist = distributed()
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, values.contiguous(), self.group)
        return torch.cat(parts, -1)

    def _all_reduce(self, values: Tensor, operation: str) -> Tensor:
        dist = distributed()
        values = values.contiguous()
        dist.all_reduce(values, getattr(dist.ReduceOp, operation), self.group)
        return values


def distributed():
    """The module torch.distributed.

    Raises:
        RuntimeError: it is not available or not initialised.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "a sharded vocabulary needs torch.distributed: call torch.distributed.init_process_group first, or leave "
            "shard=None for a vocabulary on one rank"
        )
    return dist


def gather_integers(own: list[int], group: dist.ProcessGroup | None, device: torch.device | str) -> Tensor:
    """(R, len(own)) int64 on the CPU: the integers of every rank, in one all-gather."""
    dist = distributed()
    numbers = torch.tensor(own, device=device)
    ranks = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, numbers, group)
    return torch.stack(ranks).cpu()


def fingerprint(part: Tensor) -> int:
    """An integer that depends on a corner of ``part`` (..., M, N); 0 if it has too few different numbers to tell."""
    corner = part.detach()[(slice(1),) * (part.dim() - 2)][..., :CORNER, :CORNER].resolve_neg()
    bits = corner.to(torch.float32).flatten().view(torch.int32).long()
    if bits.unique().numel() < LEAST_DIFFERENT:
        return 0
    weights = torch.arange(1, 2 * bits.numel(), 2, device=bits.device)
    return int((bits * weights).sum()) or 1
