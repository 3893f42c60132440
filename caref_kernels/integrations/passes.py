"""The forward passes in progress: what the loss and the head of a model need to know of the call that they serve.

Labels, divisor and loss belong to a call, never to the model: copies of a model, recomputed passes, nested models and
threads have their own, and nothing is left behind when a call ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caref_kernels import CarefConfig, CarefOutput

from .counting import IGNORE_INDEX, is_dtensor

TERMS = ("ce", "sced", "kl", "entropy")
_OPTIONS = tuple(field.name for field in dataclasses.fields(CarefConfig) if field.name != "inplace_backward")


def name_of(model: nn.Module) -> str:
    """The name of its class, without the one that ``fully_shard`` puts before it."""
    return next(base.__name__ for base in type(model).__mro__ if not base.__module__.startswith("torch.distributed"))


def whole(value: Tensor) -> Tensor:
    """A plain tensor with the parts of all ranks, which passes a replicated gradient back to a DTensor."""
    return value.full_tensor() if is_dtensor(value) else value


def shifted(labels: Tensor) -> Tensor:
    """The label at i + 1 for each position i of (..., T); nothing is predicted at the last position."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


class LogitForm(NamedTuple):
    """What a model makes of its head's output: ``softcap * tanh(scale * (output + bias) / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None
    bias_name: str | None = None  # a buffer of the model, which it adds to the logits

    def apply(self, output: Tensor, model: nn.Module) -> Tensor:
        """The logits, computed in float64."""
        logits = output.double()
        if self.bias_name is not None:
            logits = logits + getattr(model, self.bias_name).double().reshape(-1)
        logits = self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class LossForm(NamedTuple):
    """How a model computes its loss, as a probe run showed it.

    Attributes:
        calls_loss_function: whether the model calls ``self.loss_function``; otherwise its loss is put into the outputs.
        shift: whether the logits at position i are scored with the label at i + 1.
        logits: what the model makes of its head's output; ``None`` where no head is to be fused.
    """

    calls_loss_function: bool
    shift: bool
    logits: LogitForm | None


class PassTerms(NamedTuple):
    """The terms of the loss of one forward pass, detached.

    Attributes:
        values: (4,), the terms of ``TERMS`` on the device of the loss.
        loss: (), the CAREF loss; a model may add a router loss to it.
        valid: (), the number of valid rows.
        correct: (), the number of valid rows whose largest logit is that of the label; NaN where ranks share a row.
        examples: the number of examples of the batch.
        divided: whether the terms were divided by ``num_items_in_batch``; otherwise they are means over the valid rows.
    """

    values: Tensor
    loss: Tensor
    valid: Tensor
    correct: Tensor
    examples: int
    divided: bool


class ForwardPass:
    """One forward pass of ``model`` with labels."""

    def __init__(self, model: nn.Module, config: CarefConfig, form: LossForm, kwargs: dict[str, Any]) -> None:
        self.model, self.config, self.form = model, config, form
        self.labels: Tensor | None = kwargs.get("labels")
        self.shift_labels: Tensor | None = kwargs.get("shift_labels")
        self.num_items: Tensor | float | None = kwargs.get("num_items_in_batch")
        self.token_weights: Tensor | None = kwargs.get("token_weights")
        self.head: nn.Module | None = None  # the head that computes the loss, if it is fused
        self.head_loss: Tensor | None = None
        self.called_loss_function = False

    def targets(self, device: torch.device) -> Tensor:
        """The label of each position (B, T): ``shift_labels`` as they are, or ``labels``, shifted if need be."""
        if self.shift_labels is not None:
            return self.shift_labels.to(device)
        # Shifting the labels costs eight bytes a row, shifting the logits a copy of them.
        return shifted(self.labels.to(device)) if self.form.shift else self.labels.to(device)

    def weights(self, device: torch.device) -> Tensor | None:
        """``token_weights`` of :meth:`targets`; virtual tokens, which a model puts before the others, have none."""
        if self.token_weights is None:
            return None
        labels = self.labels if self.shift_labels is None else self.shift_labels
        weights = F.pad(self.token_weights.to(device), (max(labels.size(-1) - self.token_weights.size(-1), 0), 0))
        return shifted(weights) if self.form.shift and self.shift_labels is None else weights

    def divisor(self, device: torch.device) -> Tensor | float | None:
        """``num_items_in_batch`` on the device of the loss."""
        number = self.num_items
        return number.to(device, non_blocking=True) if isinstance(number, Tensor) else number

    def loss_options(self, device: torch.device) -> dict[str, Any]:
        """The options, the divisor and the token weights of a loss on ``device``, as keywords of the loss functions."""
        operands = {"num_items": self.divisor(device), "token_weights": self.weights(device)}
        return {name: getattr(self.config, name) for name in _OPTIONS} | operands

    def finish(self, out: CarefOutput) -> Tensor:
        """Record the terms of ``out`` and return its loss.

        An evaluation batch without a label has the loss NaN, as with torch's cross-entropy, so that averages leave it
        out; in training such a step has the loss and the gradient 0.
        """
        loss = out.loss
        number = self.divisor(loss.device)
        if number is not None and not torch.is_grad_enabled():
            is_zero = number == 0
            if not isinstance(number, Tensor):
                is_zero = torch.full_like(loss, is_zero, dtype=torch.bool)
            loss = torch.where(is_zero, torch.nan, loss)
        if _thread.recorders:
            self._record(out, loss, number)
        return loss

    def _record(self, out: CarefOutput, loss: Tensor, number: Tensor | float | None) -> None:
        values = torch.stack([getattr(out, name).detach() for name in TERMS])
        valid = (self.targets(values.device) != IGNORE_INDEX).sum()
        divisor = valid if number is None else number
        correct = torch.full_like(loss, torch.nan) if out.accuracy is None else out.accuracy * divisor
        terms = PassTerms(values, loss.detach(), valid, correct, self.labels.size(0), number is not None)
        for recorder in _thread.recorders:
            recorder.append(terms)


class ProbeRun:
    """A forward pass that shows what ``model`` does with its labels and with the output of ``head``.

    ``replacement`` (V,) takes the place of every row of that output.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None = None, replacement: Tensor | None = None) -> None:
        self.model, self.head, self.replacement = model, head, replacement
        self.outputs: list[Tensor] = []  # of every call of the head
        self.losses: list[tuple[Tensor, Tensor]] = []  # logits and loss of every call of the model's loss function

    def observe_head(self, output: Tensor) -> Tensor:
        """Note the output of the head, and return it or its replacement."""
        self.outputs.append(whole(output))
        if self.replacement is None:
            return output
        replacement = self.replacement.expand(output.shape)
        if is_dtensor(output):
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(replacement, output.device_mesh, output.placements)
        return replacement

    def observe_loss(self, original: Callable, logits: Tensor, labels: Tensor | None, **kwargs: Any) -> Any:
        """Call the model's original loss function, and note its logits and its result."""
        logits = whole(logits)
        loss = original(logits=logits, labels=labels, **kwargs)
        self.losses.append((logits, loss.clone()))  # the model may add a router loss in place
        return loss


class _Thread(threading.local):
    def __init__(self) -> None:
        self.passes: list[ForwardPass | ProbeRun] = []
        self.recorders: list[list[PassTerms]] = []


_thread = _Thread()


@contextlib.contextmanager
def _appended(items: list, item: Any) -> Iterator[Any]:
    items.append(item)
    try:
        yield item
    finally:
        items[:] = [other for other in items if other is not item]  # two empty lists are equal


def running(forward_pass: ForwardPass | ProbeRun) -> AbstractContextManager:
    """Make ``forward_pass`` the current pass of this thread inside of the block."""
    return _appended(_thread.passes, forward_pass)


def current_pass() -> ForwardPass | ProbeRun | None:
    """The innermost pass of this thread, or ``None``."""
    return _thread.passes[-1] if _thread.passes else None


def record_terms() -> AbstractContextManager[list[PassTerms]]:
    """Record the terms of every pass that this thread makes inside the block with a model of ``apply_caref``.

        with record_terms() as passes:
            loss = model(**batch).loss
        print(passes[0].values)                # ce, sced, kl and entropy, as reduced as the loss

    Nothing is read back from the device, and only the list keeps the terms.  The model may be compiled; the ``with``
    statement may not be part of what is compiled.

    Returns:
        A context manager of a list, to which each pass appends its :class:`PassTerms`.
    """
    return _appended(_thread.recorders, [])
