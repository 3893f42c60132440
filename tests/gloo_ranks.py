"""The checks of each process of test_vocab_parallel.py: the public functions over gloo, against float64 on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional

from caref_kernels import (
    EntropyTopK,
    VocabShard,
    caref_loss,
    linear_caref_loss,
)
from caref_kernels.testing import check_gradient, check_identity, make_case, oracle

ROWS, COLUMNS, FEATURES = 13, 203, 8
# Shards of very different sizes; with 4 ranks one has no column.
SIZES = {2: [3, 200], 3: [100, 1, 102], 4: [50, 0, 103, 50]}


def run(rank: int, world: int, folder: Path) -> None:
    """Run all checks of one process."""
    first = sum(SIZES[world][:rank])
    columns = slice(first, first + SIZES[world][rank])
    shard = VocabShard.gather(SIZES[world][rank])
    assert shard == VocabShard(None, first, SIZES[world][rank], COLUMNS)
    for dtype in (torch.float32, torch.bfloat16):
        check_logits(columns, shard, dtype)
        check_head(columns, shard, dtype)
    check_counts(columns, shard)
    check_dtensor(world)
    check_same_columns(world)
    check_refusals(columns, shard)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """The collectives that run inside the block, each with its bytes."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        calls.append((str(op).rsplit(".", 1)[-1], tensor.numel() * tensor.element_size()))
        return originals["all_reduce"](tensor, op, group)

    def all_gather(parts, tensor, group=None):
        calls.append(("GATHER", tensor.numel() * tensor.element_size()))
        return originals["all_gather"](parts, tensor, group)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield calls
    finally:
        dist.all_reduce, dist.all_gather = originals["all_reduce"], originals["all_gather"]


def case_of(dtype: torch.dtype):
    case = make_case("lm_like", ROWS, COLUMNS, dtype, seed=1, ignored=3)
    labels = case.labels.clone()
    labels[labels != -100] = torch.tensor([0, 2, 3, 49, 50, 101, 152, 153, 202, 100])  # on every rank
    return case.logits, labels


def check_logits(columns: slice, shard: VocabShard, dtype: torch.dtype) -> None:
    logits, labels = case_of(dtype)
    for options in ({}, {"alpha": 1.5, "beta": 0.5}, {"sparsity": EntropyTopK(scale=0.3, k_max=20)}):
        expected = oracle(logits, labels, ("loss",), **options)
        for reduction, scale in (("sum", 1), ("mean", 10), ("none", 1)):
            local = logits[:, columns].clone().requires_grad_()
            for group in (shard, dist.group.WORLD):
                loss = caref_loss(local, labels, shard=group, reduction=reduction, **options)
                value = expected.terms.loss
                check_identity(loss.detach(), value if reduction == "none" else value.sum() / scale, "float32_terms")
                (gradient,) = torch.autograd.grad(loss.sum(), local)
                whole = expected.gradients["loss"] / scale
                check_part(gradient, whole, columns, f"{options} {reduction}")
    # Terms, a gradient of one of them, three dimensions, and the gradient in place.
    shaped = (logits[:12, columns] * 1).view(3, 4, -1).requires_grad_()
    out = caref_loss(shaped, labels[:12].view(3, 4), shard=shard, return_terms=True, inplace_backward=False)
    expected = oracle(logits[:12], labels[:12])
    rows = (labels[:12] != -100).sum()
    check_identity(out.entropy, expected.terms.entropy.sum() / rows, "float32_terms")
    (gradient,) = torch.autograd.grad(out.sced, shaped)
    check_part(gradient.flatten(0, 1), expected.gradients["sced"] / rows, columns, "sced")
    leaf = logits[:, columns].clone().requires_grad_()
    passing = leaf * 1
    caref_loss(passing, labels, shard=shard, reduction="sum", inplace_backward=True).backward()
    expected = oracle(logits, labels, ("loss",)).gradients["loss"]
    check_part(leaf.grad, expected, columns, "in place")
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with hooks, pytest.raises(RuntimeError, match="inplace_backward=True cannot be used under saved-tensor hooks"):
        caref_loss(leaf * 1, labels, shard=shard, inplace_backward=True)
    negated = logits[:, columns].neg().requires_grad_()
    caref_loss(torch._neg_view(negated), labels, shard=shard, reduction="sum").backward()
    check_part(-negated.grad, expected, columns, "negative bit")


def check_part(gradient, whole, columns: slice, label: str) -> None:
    """Check this rank's columns of a gradient within the tolerances of whole rows."""
    rest = whole.clone().to(gradient.dtype)
    rest[:, columns] = gradient
    check_gradient(rest, whole, label=label)


def check_head(columns: slice, shard: VocabShard, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(*size, generator=generator) for size in ((ROWS, FEATURES), (COLUMNS, FEATURES), (COLUMNS,))]
    tensors = [tensor.to(dtype) for tensor in tensors]
    labels = case_of(dtype)[1]
    identity = "float32_gradient" if dtype == torch.float32 else "bfloat16_head"
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    for reduction, scale, cap in (("mean", 1.0, None), ("none", 1.0, None), ("mean", 0.3, None), ("none", 0.3, 2.0)):
        logits = scale * functional.linear(*wide)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        exact = caref_loss(logits, labels, reduction=reduction, backend="reference")
        expected = torch.autograd.grad(exact.sum(), wide)
        for chunk_rows in (None, 4):
            hidden, weight, bias = (tensor.clone() for tensor in tensors)
            local = [t.requires_grad_() for t in (hidden, weight[columns], bias[columns])]
            loss = linear_caref_loss(
                *local[:2], labels, local[2], shard=shard, logit_scale=scale, softcap=cap, reduction=reduction,
                chunk_rows=chunk_rows,
            )  # fmt: skip
            check_identity(loss.detach(), exact.detach(), "float32_terms" if dtype == torch.float32 else identity)
            gradients = torch.autograd.grad(loss.sum(), local)
            check_identity(gradients[0], expected[0], identity, "hidden")
            for gradient, whole in zip(gradients[1:], expected[1:], strict=True):
                rest = whole.to(dtype)
                rest[columns] = gradient
                check_identity(rest, whole, identity, "weight or bias")
    part = linear_caref_loss(local[0], local[1], labels, local[2], shard=shard, reduce_hidden_grad=False)
    (own,) = torch.autograd.grad(part, local[0])
    dist.all_reduce(own)
    exact = caref_loss(functional.linear(*wide), labels, backend="reference")
    check_identity(own, torch.autograd.grad(exact, wide[0])[0], identity, "summed by the caller")


def check_counts(columns: slice, shard: VocabShard) -> None:
    """The forward takes one MAX and one SUM, the backward nothing; a head adds one SUM of the gradient of hidden."""
    logits, labels = case_of(torch.float32)
    local = logits[:, columns].clone().requires_grad_()
    with recorded() as calls:
        loss = caref_loss(local, labels, shard=shard)
        assert calls == [("MAX", 4 * ROWS), ("SUM", 80 * ROWS)], calls
        loss.backward()
        assert len(calls) == 2, calls
    hidden = torch.randn(ROWS, FEATURES, requires_grad=True)
    weight = torch.randn(columns.stop - columns.start, FEATURES)
    with recorded() as calls:
        # 10 of the 13 rows count, so there are chunks of 6 and 4.
        loss = linear_caref_loss(hidden, weight, labels, shard=shard, chunk_rows=6)
        assert calls == [("MAX", 24), ("SUM", 480), ("MAX", 16), ("SUM", 320)], calls
        loss.backward()
        assert calls[4:] == [("SUM", 4 * ROWS * FEATURES)], calls
    with recorded() as calls:
        caref_loss(local, labels, shard=dist.group.WORLD)
        assert [kind for kind, _ in calls] == ["GATHER", "MAX", "SUM"], calls


def check_dtensor(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for columns in (COLUMNS, 5):  # 5 columns leave the fourth of four ranks none
        case = make_case("normal_1", 6, columns, seed=3)
        logits = distribute_tensor(case.logits, mesh, [Shard(1)]).requires_grad_()
        loss = caref_loss(logits, case.labels)
        loss.backward()
        expected = oracle(*case, ("loss",))
        check_identity(loss.detach(), expected.terms.loss.mean(), "float32_terms")
        assert logits.grad.placements == (Shard(1),)
        check_identity(logits.grad.full_tensor(), expected.gradients["loss"] / 6, "float32_gradient")
        with pytest.raises(TypeError, match=r"shard must be None for a DTensor"):
            caref_loss(logits, case.labels, shard=dist.group.WORLD)


def check_same_columns(world: int) -> None:
    """Whole logits, or a whole head, on every rank are an error on all ranks, without a further exchange."""
    logits, labels = case_of(torch.float32)
    for whole in (logits, logits.bfloat16(), logits.view(1, *logits.shape)):
        with recorded() as calls, pytest.raises(ValueError, match=f"taken for {world} x {COLUMNS} columns"):
            caref_loss(whole, labels.view(whole.shape[:-1]), shard=dist.group.WORLD)
        assert calls == [("GATHER", 24)]
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(size, FEATURES, generator=generator) for size in (ROWS, COLUMNS))
    with pytest.raises(ValueError, match=r"look like whole logits \(or a whole head\).*pass a VocabShard"):
        linear_caref_loss(hidden, weight, labels, shard=dist.group.WORLD)
    # These are no such mistake: a VocabShard, a label beyond the columns, constant or ignored rows, different values.
    meant = VocabShard.gather(COLUMNS)
    beyond = torch.where(labels == 202, 203, labels)
    for part, targets, group in (
        (logits, labels, meant),
        (logits, beyond, dist.group.WORLD),
        (torch.zeros_like(logits), labels, dist.group.WORLD),
        (logits, torch.full_like(labels, -100), dist.group.WORLD),
        (logits + dist.get_rank(), labels, dist.group.WORLD),
    ):
        loss = caref_loss(part, targets, shard=group, reduction="sum")
        every = [torch.empty_like(part) for _ in range(world)]
        dist.all_gather(every, part)
        expected = caref_loss(torch.cat(every, -1).double(), targets, reduction="sum", backend="reference")
        check_identity(loss, expected, "float32_terms")


def check_refusals(columns: slice, shard: VocabShard) -> None:
    """Wrong calls raise on every rank alike, before anything is exchanged."""
    logits, labels = case_of(torch.float32)
    local, wrong = logits[:, columns], labels.clone()
    wrong[0] = COLUMNS
    with recorded() as calls:
        with pytest.raises(IndexError, match="target 203 at row 0"):
            caref_loss(local, wrong, shard=shard)
        with pytest.raises(ValueError, match="alpha must be in"):
            caref_loss(local, labels, shard=shard, alpha=0.5)
        with pytest.raises(ValueError, match=r"VocabShard has \d+ columns, but this rank holds 7"):
            caref_loss(logits[:, :7], labels, shard=shard)
        with pytest.raises(TypeError, match="shard must be a VocabShard, a torch.distributed.ProcessGroup or None"):
            caref_loss(local, labels, shard="tensor-parallel")
        with pytest.raises(TypeError, match="reduce_hidden_grad must be True or False; got 1"):
            linear_caref_loss(logits, local, labels, shard=shard, reduce_hidden_grad=1)
        with pytest.raises(
            ValueError, match="num_items must be > 0 where there are valid rows; got 0 for 10 valid rows"
        ):
            caref_loss(local, labels, shard=shard, num_items=0)
    assert calls == []
    nothing = torch.full_like(labels, -100)
    for leaf, loss_of in (
        (local.clone(), lambda leaf: caref_loss(leaf, nothing, shard=shard, num_items=0)),
        (logits[:, :5].clone(), lambda leaf: linear_caref_loss(
            leaf, torch.ones(local.size(1), 5), nothing, shard=shard, num_items=torch.tensor(0)
        )),
    ):  # fmt: skip
        loss = loss_of(leaf.requires_grad_())
        loss.backward()
        assert loss.item() == torch.count_nonzero(leaf.grad) == 0
    leaf = local.clone().requires_grad_()
    loss = caref_loss(leaf, labels, shard=shard)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), leaf)
