"""The DTensor checks of each process of test_vocab_parallel.py: the advice of every error message works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional

from caref_kernels import (
    VocabShard,
    caref_loss,
    fused_sced,
    linear_caref_loss,
)
from caref_kernels.testing import check_identity, make_case

ROWS, COLUMNS, FEATURES = 8, 50, 6


def run(rank: int, world: int, folder: Path) -> None:
    """Run all checks of one process."""
    if world == 4:
        check_two_dimensions(init_device_mesh("cpu", (2, 2)))
        return
    mesh = init_device_mesh("cpu", (world,))
    check_logits(mesh)
    check_weights(mesh)
    check_hidden(mesh)
    check_rows(mesh)
    check_fully_shard(mesh)


def refused(call: Callable[[], object], name: str, advice: str) -> None:
    """Check that the call is refused with this advice, and that the advice is another call."""
    with pytest.raises(TypeError, match=re.escape(advice)) as caught:
        call()
    assert str(caught.value).startswith(f"{name} is a DTensor, placed [")


def case():
    """Logits, labels, a head that makes other logits, and the float64 losses and gradients of both."""
    logits, labels = make_case("normal_1", ROWS, COLUMNS, seed=1, ignored=2)
    hidden = make_case("normal_1", ROWS, FEATURES, seed=2).logits
    weight = make_case("normal_1", COLUMNS, FEATURES, seed=3).logits
    return logits, labels, hidden, weight


def exact(*leaves: Tensor, labels: Tensor):
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    loss = caref_loss(wide[0] if len(wide) == 1 else functional.linear(*wide), labels, backend="reference")
    return loss.detach(), torch.autograd.grad(loss, wide)


def spread(tensor: Tensor, mesh: DeviceMesh, *placements) -> DTensor:
    return distribute_tensor(tensor, mesh, placements).requires_grad_()


def check(loss: Tensor, leaf: DTensor, expected: Tensor, gradient: Tensor, is_part: bool = False) -> None:
    """Check the loss, summed over the ranks where each has a part, and the whole gradient of a leaf."""
    loss.backward()
    value = loss.detach().clone()
    if is_part:
        dist.all_reduce(value)
    check_identity(value, expected, "float32_terms")
    check_identity(leaf.grad.full_tensor(), gradient, "float32_gradient")


def own(rows: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of this rank."""
    return rows.chunk(mesh.size())[mesh.get_local_rank()]


def check_logits(mesh: DeviceMesh) -> None:
    logits, labels, *_ = case()
    expected, (gradient,) = exact(logits, labels=labels)
    items = int((labels != -100).sum())

    z = spread(logits, mesh, Shard(1))
    check(caref_loss(z, labels), z, expected, gradient)
    refused(lambda: fused_sced(z), "logits", "pass logits.full_tensor()")
    assert torch.isfinite(fused_sced(z.full_tensor()))

    z = spread(logits, mesh, Replicate())
    refused(lambda: caref_loss(z, labels), "logits", "every rank holds all of it: pass logits.to_local()")
    check(caref_loss(z.to_local(), labels), z, expected, gradient)

    z = spread(logits, mesh, Shard(0))
    advice = (
        "whole rows: pass logits.to_local() and the labels (or valid) of its rows; the number of items of all ranks"
    )
    refused(lambda: caref_loss(z, labels), "logits", advice)
    refused(lambda: fused_sced(z), "logits", advice)
    check(caref_loss(z.to_local(), own(labels, mesh), num_items=items), z, expected, gradient, is_part=True)

    z = DTensor.from_local(logits / mesh.size(), mesh, [Partial()])
    refused(lambda: caref_loss(z, labels), "logits", "pass logits.full_tensor()")
    check_identity(caref_loss(z.full_tensor(), labels), expected, "float32_terms")


def check_weights(mesh: DeviceMesh) -> None:
    _, labels, hidden, weight = case()
    expected, (_, gradient) = exact(hidden, weight, labels=labels)

    w = spread(weight, mesh, Shard(0))
    for advice in (
        "pass weight.to_local() and shard=VocabShard.of_dtensor(weight, 0)",
        "if fully_shard (FSDP2) shards it",
    ):
        refused(lambda: linear_caref_loss(hidden, w, labels), "weight", advice)
    loss = linear_caref_loss(hidden, w.to_local(), labels, shard=VocabShard.of_dtensor(w, 0))
    check(loss, w, expected, gradient)

    w = spread(weight, mesh, Replicate())
    advice = "every rank holds all of it: pass weight.to_local()"
    refused(lambda: linear_caref_loss(hidden, w, labels), "weight", advice)
    check(linear_caref_loss(hidden, w.to_local(), labels), w, expected, gradient)

    w = spread(weight, mesh, Shard(1))
    refused(lambda: linear_caref_loss(hidden, w, labels), "weight", "pass weight.full_tensor()")
    check(linear_caref_loss(hidden, w.full_tensor(), labels), w, expected, gradient)
    with pytest.raises(ValueError, match="dim: exactly one dimension of the mesh must shard dimension 0"):
        VocabShard.of_dtensor(w, 0)

    b = spread(torch.zeros(COLUMNS), mesh, Replicate())
    refused(lambda: linear_caref_loss(hidden, weight, labels, b), "bias", "every rank holds all of it")
    check_identity(linear_caref_loss(hidden, weight, labels, b.to_local()).detach(), expected, "float32_terms")


def check_hidden(mesh: DeviceMesh) -> None:
    _, labels, hidden, weight = case()
    expected, (gradient, _) = exact(hidden, weight, labels=labels)
    items = int((labels != -100).sum())
    part = own(weight, mesh)
    h = spread(hidden, mesh, Replicate())
    for matrix, shard in ((weight, None), (part, mesh.get_group())):
        advice = "every rank holds all of it: pass hidden.to_local()"
        refused(lambda: linear_caref_loss(h, matrix, labels, shard=shard), "hidden", advice)  # noqa: B023
        h.grad = None
        check(linear_caref_loss(h.to_local(), matrix, labels, shard=shard), h, expected, gradient)

    h = spread(hidden, mesh, Shard(0))
    refused(lambda: linear_caref_loss(h, weight, labels), "hidden", "pass hidden.to_local() and the labels of its rows")
    loss = linear_caref_loss(h.to_local(), weight, own(labels, mesh), num_items=items)
    check(loss, h, expected, gradient, is_part=True)
    h = spread(hidden, mesh, Shard(0))
    loss = linear_caref_loss(h.full_tensor(), part, labels, shard=mesh.get_group())
    check(loss, h, expected, gradient)

    h = spread(hidden, mesh, Shard(1))
    refused(lambda: linear_caref_loss(h, weight, labels), "hidden", "pass hidden.full_tensor()")
    check(linear_caref_loss(h.full_tensor(), weight, labels), h, expected, gradient)


def check_rows(mesh: DeviceMesh) -> None:
    """Check labels, valid masks and numbers of items that are DTensors."""
    logits, labels, hidden, weight = case()
    expected, _ = exact(logits, labels=labels)
    whole, parts = (distribute_tensor(labels, mesh, [placement]) for placement in (Replicate(), Shard(0)))
    advice = "pass labels.to_local() for the rows of this rank, or labels.full_tensor() for all"
    for rows, text in ((whole, "every rank holds all of it: pass labels.to_local()"), (parts, advice)):
        refused(lambda: caref_loss(logits, rows), "labels", text)  # noqa: B023
        refused(lambda: linear_caref_loss(hidden, weight, rows), "labels", text)  # noqa: B023
    check_identity(caref_loss(logits, whole.to_local()), expected, "float32_terms")
    check_identity(caref_loss(logits, parts.full_tensor()), expected, "float32_terms")
    refused(lambda: fused_sced(logits, valid=whole != -100), "valid", "pass valid.to_local()")
    count = (parts != -100).sum()
    refused(lambda: caref_loss(logits, labels, num_items=count), "num_items", "pass num_items.full_tensor()")
    check_identity(caref_loss(logits, labels, num_items=count.full_tensor()), expected, "float32_terms")


class Head(nn.Module):
    """A head whose loss is made where fully_shard has gathered its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor, labels: Tensor, items: int) -> Tensor:
        return linear_caref_loss(hidden, self.weight, labels, num_items=items)


def check_fully_shard(mesh: DeviceMesh) -> None:
    _, labels, hidden, weight = case()
    expected, (_, gradient) = exact(hidden, weight, labels=labels)
    head = Head(weight)
    fully_shard(head, mesh=mesh)
    rows, targets, items = own(hidden, mesh), own(labels, mesh), int((labels != -100).sum())
    for advice in (
        "no sharded vocabulary: compute the loss inside of the module's forward",
        "caref_kernels.integrations.transformers.apply_caref(model, fuse_head=True)",
    ):
        refused(lambda: linear_caref_loss(rows, head.weight, targets), "weight", advice)
    loss = head(rows, targets, items)
    (loss * mesh.size()).backward()  # FSDP averages
    value = loss.detach().clone()
    dist.all_reduce(value)
    check_identity(value, expected, "float32_terms")
    check_identity(head.weight.grad.full_tensor(), gradient, "float32_gradient")


def check_two_dimensions(mesh: DeviceMesh) -> None:
    """Check a mesh with rows over its first dimension and columns over its second."""
    logits, labels, hidden, weight = case()
    expected, (gradient,) = exact(logits, labels=labels)
    items = int((labels != -100).sum())
    z = spread(logits, mesh, Shard(0), Shard(1))
    advice = "pass logits.to_local(), the labels of its rows, and shard=VocabShard.of_dtensor(logits, -1)"
    refused(lambda: caref_loss(z, labels), "logits", advice)
    targets = labels.chunk(2)[mesh.get_local_rank(0)]
    loss = caref_loss(z.to_local(), targets, shard=VocabShard.of_dtensor(z, -1), num_items=items)
    loss.backward()
    value = loss.detach().clone()
    dist.all_reduce(value, group=mesh.get_group(0))
    check_identity(value, expected, "float32_terms")
    check_identity(z.grad.full_tensor(), gradient, "float32_gradient")

    for placements in ((Replicate(), Shard(1)), (Shard(1), Replicate())):
        both = spread(logits, mesh, *placements)
        check(caref_loss(both, labels), both, expected, gradient)

    w = spread(weight, mesh, Replicate(), Shard(0))
    advice = "pass weight.to_local() and shard=VocabShard.of_dtensor(weight, 0)"
    refused(lambda: linear_caref_loss(hidden, w, labels), "weight", advice)
    loss = linear_caref_loss(hidden, w.to_local(), labels, shard=VocabShard.of_dtensor(w, 0))
    expected, (_, gradient) = exact(hidden, weight, labels=labels)
    check(loss, w, expected, gradient)
    w = spread(weight, mesh, Shard(0), Shard(0))
    refused(lambda: linear_caref_loss(hidden, w, labels), "weight", "pass weight.full_tensor()")
    check(linear_caref_loss(hidden, w.full_tensor(), labels), w, expected, gradient)
