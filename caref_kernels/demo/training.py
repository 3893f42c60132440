"""One epoch of fine-tuning in a plain PyTorch loop, with the time of the loss taken apart from the rest."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import caref_loss
from .batches import Batch
from .student import Student


@dataclass(frozen=True)
class Recipe:
    """How the arms are trained; the same for all of them."""

    learning_rate: float = 1e-3
    warmup_steps: int = 3
    clip: float = 1.0


@dataclass(frozen=True)
class Timing:
    """What an arm's steps took; medians in seconds.  The first step is left out where there are others."""

    steps: int
    step_seconds: float
    loss_seconds: float
    rows: int  # of the last batch


def train(
    student: Student,
    batches: Sequence[Batch],
    weights: dict[str, float],
    recipe: Recipe,
    after_step: Callable[[int, float], None],
) -> Timing:
    """One pass over ``batches`` from the loaded parameters, minimising :func:`caref_kernels.caref_loss`.

    Args:
        student: reset first, trained in place.
        batches: one per step, in order.
        weights: ``lambda_sced`` and ``lambda_kl``; empty for the defaults of the loss.
        recipe: the optimiser's numbers.
        after_step: called with the number of finished steps and the seconds of this one.
    Returns: the timing.
    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    student.reset()
    student.model.train()
    optimizer = torch.optim.AdamW(student.queries, lr=recipe.learning_rate)
    steps, losses = [], []
    for number, batch in enumerate(batches, 1):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(number, len(batches), recipe.warmup_steps)
        losses.append(_step(student, batch, weights, number))
        torch.nn.utils.clip_grad_norm_(student.queries, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - start)
        after_step(number, steps[-1])
    student.model.eval()
    first = min(1, len(steps) - 1)
    return Timing(
        len(steps), statistics.median(steps[first:]), statistics.median(losses[first:]), batches[-1].labels.numel()
    )


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate in ``step`` (from 1) of ``steps``: up to 1 in ``warmup`` steps, then towards 0."""
    if step <= warmup:
        return step / warmup
    return (steps - step + 1) / (steps - warmup + 1)


def _step(student: Student, batch: Batch, weights: dict[str, float], number: int) -> float:
    """Forward and backward of one step; the seconds spent in the loss.

    The logits are cut out of the graph and their gradient is put back, so that the loss can be timed alone.
    """
    logits = student.rows(batch)
    leaf = logits.detach().requires_grad_()
    start = time.perf_counter()
    loss = caref_loss(leaf, batch.labels, **weights)
    loss.backward()
    seconds = time.perf_counter() - start
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"step {number}: the loss is {loss.item()}")
    logits.backward(leaf.grad)
    return seconds
