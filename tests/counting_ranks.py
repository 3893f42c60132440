"""The checks of each of the two processes of test_count_items.py, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from caref_kernels.integrations import count_items


def run(rank: int, world: int, folder: Path) -> None:
    """Run all checks of one process."""
    check_sums(rank)
    check_one_collective(rank)
    check_groups(rank)
    check_refusals(rank)


def labels_of(rank: int) -> list[torch.Tensor]:
    """Two micro-batches: 3 and 2 labels after the shift on rank 0, none on rank 1."""
    if rank == 1:
        return [torch.full((2, 4), -100), torch.full((1, 2), -100)]
    return [torch.tensor([[5, -100, 0, 7], [9, 1, -100, -100]]), torch.tensor([[1, 2, 3]])]


def check_sums(rank: int) -> None:
    labels = labels_of(rank)
    for shift, number in ((True, 5), (False, 8)):
        for averaged_over in (1, 2, 8):
            items = count_items(labels, shift=shift, averaged_over=averaged_over)
            assert items.item() == number / averaged_over
    assert count_items(labels_of(1)).item() == 0  # no rank has a label
    # Ranks that hold the same batch: all of them are counted, and averaged over.
    assert count_items(labels_of(0), averaged_over=2).item() == 5


def check_one_collective(rank: int) -> None:
    calls = []
    original = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        calls.append((tensor.dtype, tensor.numel()))
        return original(tensor, op, group)

    dist.all_reduce = all_reduce
    try:
        count_items(labels_of(rank))
    finally:
        dist.all_reduce = original
    assert calls == [(torch.int64, 1)], calls


def check_groups(rank: int) -> None:
    both, alone = dist.new_group([0, 1]), [dist.new_group([0]), dist.new_group([1])]
    assert count_items(labels_of(rank), group=both).item() == 5
    assert count_items(labels_of(rank), group=alone[rank]).item() == (5, 0)[rank]
    with pytest.raises(ValueError, match="group must have this process as a member; got one without it"):
        count_items(labels_of(rank), group=alone[1 - rank])


def check_refusals(rank: int) -> None:
    """Wrong calls raise on every rank alike, before anything is exchanged."""
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match=r"group must be a .*ProcessGroup or None; got DeviceMesh: pass mesh.get_group"):
        count_items(labels_of(rank), group=mesh)
    with pytest.raises(TypeError, match="labels must be a plain tensor, .* got a DTensor"):
        count_items(distribute_tensor(labels_of(0)[0], mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="labels must be on a device that the group reduces on, cpu or .*; got meta"):
        count_items(torch.zeros(2, 3, dtype=torch.int64, device="meta"))
