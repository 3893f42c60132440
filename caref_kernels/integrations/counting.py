"""The number of labels of an optimizer step over all its micro-batches and ranks: the divisor of its losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100  # fixed in transformers: its models and its Trainer use no other value


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, without importing torch.distributed.tensor, which is slow."""
    return type(value).__name__ == "DTensor"


def count_items(
    labels: Tensor | Iterable[Tensor],
    *,
    shift: bool = True,
    averaged_over: float = 1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Count the labels of one optimizer step: its ``num_items_in_batch``.

    Every micro-batch of the step gets the same number, so that its loss is its share of the mean over all labels of the
    step.  Accumulation steps and ranks then add up to that mean, however the labels are spread over them::

        items = count_items([batch["labels"] for batch in micro_batches], averaged_over=dist.get_world_size())
        for batch in micro_batches:
            model(**batch, num_items_in_batch=items).loss.backward()

    ``averaged_over`` undoes what the framework does to losses or gradients.  It is the product of

    - the number of ranks, where gradients are averaged over ranks: DistributedDataParallel, FSDP, DeepSpeed, and
      whatever uses one of them (Accelerate, Lightning);
    - the number of accumulation steps, where losses are divided by it: ``Accelerator.backward``, Lightning's automatic
      optimization, ``DeepSpeedEngine.backward``.  A training loop that calls ``loss.backward()`` divides nothing.

    transformers' Trainer counts and scales by itself and does not need this function.  Ranks that are given the same
    batch (tensor parallelism) count its labels once each: leave them out of ``group``, or include their number in
    ``averaged_over``.  Where ranks hold parts of a sequence, pass labels that were shifted before they were split, with
    ``shift=False``.

    Args:
        labels: one tensor (..., T) of integers, or an iterable of them, such as the labels of all micro-batches of the
            step on this rank; -100 where nothing is predicted.  All labels of a rank may be -100.
        shift: True for causal models, which score the label at i + 1 with the logits at i, so that the first label of
            a row is not counted; False for encoder-decoder models and for ``shift_labels``.
        averaged_over: a positive, finite number.
        group: the ranks that share the optimizer step; ``None`` is the default group.  Where torch.distributed is not
            initialised, only this process counts.

    Returns:
        A 0-D float32 tensor on the device of the labels, without gradient; 0 if no rank has a label.  The count itself
        is an exact integer.

    Raises:
        TypeError: ``labels`` has something else than tensors of integers; ``shift``, ``averaged_over`` or ``group`` has
            a wrong type.
        ValueError: ``labels`` is empty, has tensors without a dimension or on several devices, or is on a device that
            the group cannot reduce on; ``averaged_over`` is out of its range; this process is not in ``group``.

    Note:
        Every rank of the group must call the function once per optimizer step.  It takes one pass over the labels, and
        one all-reduce of one int64 if torch.distributed is initialised.  It does not synchronise with the host.
    """
    if not isinstance(shift, bool):
        raise TypeError(f"shift must be True or False; got {shift!r}")
    if isinstance(averaged_over, bool) or not isinstance(averaged_over, Real):
        raise TypeError(f"averaged_over must be a positive number; got {averaged_over!r}")
    if not (math.isfinite(averaged_over) and averaged_over > 0):
        raise ValueError(f"averaged_over must be a positive, finite number; got {averaged_over!r}")
    tensors = _checked_labels(labels)
    must_reduce = _must_reduce(group, tensors[0].device)
    counts = [(part[..., 1:] if shift else part).ne(IGNORE_INDEX).sum() for part in tensors]
    total = torch.stack(counts).sum()
    if must_reduce:
        dist.all_reduce(total, group=group)
    return total.to(torch.float32) / averaged_over


def _checked_labels(labels: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(labels, Iterable) or isinstance(labels, (str, bytes)):
        raise TypeError(f"labels must be a tensor or an iterable of tensors; got {type(labels).__name__}")
    tensors = [labels] if isinstance(labels, Tensor) else list(labels)
    if not tensors:
        raise ValueError(
            "labels must have at least one tensor, got none: on a rank without labels pass a tensor of -100, because "
            "every rank has to take part in the count"
        )
    for index, part in enumerate(tensors):
        name = "labels" if isinstance(labels, Tensor) else f"labels[{index}]"
        if not isinstance(part, Tensor):
            hint = "; of batches pass batch['labels']" if isinstance(part, (dict, str)) else ""
            raise TypeError(f"{name} must be a tensor; got {type(part).__name__}{hint}")
        if is_dtensor(part):
            raise TypeError(f"{name} must be a plain tensor, this rank's part of the batch; got a DTensor")
        if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
            raise TypeError(f"{name} must have an integer dtype; got {part.dtype}")
        if part.dim() == 0:
            raise ValueError(f"{name} must have at least one dimension, (..., T); got a 0-D tensor")
        if part.device != tensors[0].device:
            raise ValueError(f"{name} must be on the device of the first, {tensors[0].device}; got {part.device}")
    return tensors


def _must_reduce(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether torch.distributed is initialised; raise an error if ``group`` cannot reduce a tensor on ``device``."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError(f"group must be None where torch.distributed is not initialised; got {group!r}")
        return False
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must have this process as a member; got one without it")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        hint = ": pass mesh.get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None; got {type(group).__name__}{hint}")
    devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if device.type not in devices:
        raise ValueError(
            f"labels must be on a device that the group reduces on, {' or '.join(devices)}; got {device}: move them "
            f"there first"
        )
    return True
