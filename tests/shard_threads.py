"""Ranks as threads, which exchange values through a list, so that a split needs no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from caref_kernels import CarefConfig
from caref_kernels.distributed.shard import ShardedRows

# Triton's interpreter has global state; a backward exchanges nothing, so it may run alone.
_ONE_AT_A_TIME = threading.Lock()


class Meeting:
    """Where the threads put their values; :meth:`rank` makes the exchange of one of them."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Tensor | None] = [None] * size
        self.calls: list[tuple[str, int]] = []  # of rank 0: what was exchanged, in bytes

    def swap(self, rank: int, kind: str, values: Tensor) -> list[Tensor]:
        """The values of all ranks."""
        if rank == 0:
            self.calls.append((kind, values.numel() * values.element_size()))
        self.values[rank] = values.clone()
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class ThreadCollectives:
    """See caref_kernels.distributed.collectives.Collectives."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def maximum(self, values: Tensor) -> Tensor:
        return torch.stack(self.meeting.swap(self.rank, "MAX", values)).amax(0)

    def total(self, values: Tensor) -> Tensor:
        return torch.stack(self.meeting.swap(self.rank, "SUM", values)).sum(0)

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat(self.meeting.swap(self.rank, "GATHER", values), -1)


def in_threads(size: int, function: Callable[[int], Any]) -> list[Any]:
    """``function(rank)`` of every rank, each in a thread; the first error is raised."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def evaluate_split(logits: Tensor, labels: Tensor, cuts: list[int], backend: str, parts: list[list[float]], **options):
    """(terms of rank 0, gradients of all columns for each weighting in ``parts``, the collectives of the forward)."""
    config = CarefConfig(**{"return_terms": True} | options)
    spec = config.row_spec(logits.size(1)).for_columns(logits.size(1))
    shards, starts = logits.tensor_split(cuts, 1), [0, *cuts]
    meeting = Meeting(len(shards))

    def one(rank: int):
        collectives = ThreadCollectives(meeting, rank)
        rows = ShardedRows(collectives, starts[rank], logits.size(1), backend, spec)
        local = shards[rank].contiguous()
        terms, stats = rows.forward(local, labels)
        forward_calls = list(meeting.calls)
        gradients = []
        for weights in parts:
            grad_terms = stats.new_tensor([weights]).expand(len(labels), -1)
            with _ONE_AT_A_TIME:
                gradients.append(rows.gradient(grad_terms, local.clone(), labels, stats, inplace=True))
        if rank == 0:
            assert meeting.calls == forward_calls, "the backward exchanges nothing"
        return terms, gradients, forward_calls

    results = in_threads(len(shards), one)
    for terms, _, _ in results[1:]:
        assert torch.equal(terms.nan_to_num(7), results[0][0].nan_to_num(7)), "ranks disagree"
    gradients = [torch.cat([result[1][index] for result in results], 1) for index in range(len(parts))]
    return results[0][0], gradients, results[0][2]
