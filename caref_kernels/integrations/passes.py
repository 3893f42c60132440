"""The forward passes that are running: what the loss and the head of a model need to know of the call they serve.

Labels, the divisor and the loss of a call belong to the call, never to the model: a copy of a model, a recomputed pass,
a nested model or a second thread has its own, and nothing is left behind when a call ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caref_kernels import CarefConfig, CarefOutput

from .counting import IGNORE_INDEX

TERMS = ("ce", "sced", "kl", "entropy")
_OPTIONS = tuple(field.name for field in dataclasses.fields(CarefConfig) if field.name != "inplace_backward")


def name_of(model: nn.Module) -> str:
    """The name of its class, without the one that ``fully_shard`` puts before it."""
    return next(kind.__name__ for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed"))


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, without importing torch.distributed for it."""
    return type(value).__name__ == "DTensor"


def whole(value: Tensor) -> Tensor:
    """``value`` with the parts of all ranks."""
    return value.full_tensor() if is_dtensor(value) else value


class LogitForm(NamedTuple):
    """What a model makes of its head's output: ``softcap * tanh(scale * (output + bias) / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None
    bias_name: str | None = None  # of a buffer of the model, which it adds to the logits

    def apply(self, output: Tensor, model: nn.Module) -> Tensor:
        """The logits, computed in float64."""
        logits = output.double()
        if self.bias_name is not None:
            logits = logits + getattr(model, self.bias_name).double().reshape(-1)
        logits = self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class LossForm(NamedTuple):
    """How a model makes its loss, as a trial showed it.

    Attributes:
        asks: whether the model calls ``self.loss_function``; otherwise its loss is put into the outputs.
        shift: whether the logits at position i are scored with the label at i + 1.
        logits: what the model makes of its head's output; ``None`` where no head is to be fused.
    """

    asks: bool
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


class Pass:
    """One forward pass of ``model`` with labels."""

    def __init__(self, model: nn.Module, config: CarefConfig, form: LossForm, kwargs: dict[str, Any]) -> None:
        self.model, self.config, self.form = model, config, form
        self.labels: Tensor | None = kwargs.get("labels")
        self.shift_labels: Tensor | None = kwargs.get("shift_labels")
        self.num_items: Tensor | float | None = kwargs.get("num_items_in_batch")
        self.head: nn.Module | None = None  # makes the loss of this pass in place of logits
        self.made: Tensor | None = None  # the loss that the head has made
        self.was_asked = False  # whether the model has asked for its loss

    def targets(self, device: torch.device) -> Tensor:
        """The label of each position (B, T): ``shift_labels`` as they are, or ``labels``, moved by one if need be."""
        if self.shift_labels is not None:
            return self.shift_labels.to(device)
        labels = self.labels.to(device)
        # Moving the labels costs eight bytes a row, moving the logits a copy of them.
        return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if self.form.shift else labels

    def divisor(self, device: torch.device) -> Tensor | float | None:
        """``num_items_in_batch`` on the device of the loss."""
        number = self.num_items
        return number.to(device, non_blocking=True) if isinstance(number, Tensor) else number

    def keywords(self, device: torch.device) -> dict[str, Any]:
        """The options and the divisor of a loss on ``device``, as every function for losses takes them."""
        return {name: getattr(self.config, name) for name in _OPTIONS} | {"num_items": self.divisor(device)}

    def finish(self, out: CarefOutput) -> Tensor:
        """The loss of ``out``, after its terms went to whoever records them.

        An evaluation batch without a label has the loss NaN, as with torch's cross-entropy, so that averages leave it
        out; in training such a step has the loss and the gradient 0.
        """
        loss = out.loss
        number = self.divisor(loss.device)
        if number is not None and not torch.is_grad_enabled():
            is_empty = (
                number == 0 if isinstance(number, Tensor) else torch.full_like(loss, number == 0, dtype=torch.bool)
            )
            loss = torch.where(is_empty, torch.nan, loss)
        if _running.recorders:
            self._record(out, loss, number)
        return loss

    def _record(self, out: CarefOutput, loss: Tensor, number: Tensor | float | None) -> None:
        values = torch.stack([getattr(out, name).detach() for name in TERMS])
        valid = (self.targets(values.device) != IGNORE_INDEX).sum()
        divisor = valid if number is None else number
        correct = torch.full_like(loss, torch.nan) if out.accuracy is None else out.accuracy * divisor
        terms = PassTerms(values, loss.detach(), valid, correct, self.labels.size(0), number is not None)
        for recorder in _running.recorders:
            recorder.append(terms)


class Trial:
    """A forward pass of ``model`` that shows what it does with its labels and with its head's output."""

    def __init__(self, model: nn.Module, head: nn.Module | None = None, replacement: Tensor | None = None) -> None:
        self.model, self.head, self.replacement = model, head, replacement
        self.outputs: list[Tensor] = []  # of the head
        self.losses: list[tuple[Tensor, Tensor]] = []  # logits and loss of every call of the model's loss function

    def observe_head(self, output: Tensor) -> Tensor:
        """Note what the head has made, and pass it on, or the replacement."""
        self.outputs.append(whole(output))
        if self.replacement is None:
            return output
        replacement = self.replacement.expand(output.shape)
        if is_dtensor(output):
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(replacement, output.device_mesh, output.placements)
        return replacement

    def observe_loss(self, original: Any, logits: Tensor, labels: Tensor | None, **kwargs: Any) -> Any:
        """Call the model's own loss function, and note the result."""
        logits = whole(logits)
        loss = original(logits=logits, labels=labels, **kwargs)
        self.losses.append((logits, loss.clone()))  # the model may add a router loss in place
        return loss


class _Running(threading.local):
    def __init__(self) -> None:
        self.passes: list[Any] = []
        self.recorders: list[list[PassTerms]] = []


_running = _Running()


@contextlib.contextmanager
def running(one: Any) -> Iterator[None]:
    """``one`` is the innermost pass of this thread inside the block."""
    _running.passes.append(one)
    try:
        yield
    finally:
        _running.passes.pop()


def innermost() -> Any:
    """The innermost pass of this thread, or ``None``."""
    return _running.passes[-1] if _running.passes else None


@contextlib.contextmanager
def record_terms() -> Iterator[list[PassTerms]]:
    """A list of the terms of every pass that this thread makes inside the block with a model of ``apply_caref``.

        with record_terms() as passes:
            loss = model(**batch).loss
        print(passes[0].values)                # ce, sced, kl and entropy, as reduced as the loss

    Nothing is read back from the device, and nothing outlives the list.  The model may be compiled; the ``with`` may
    not be inside of what is compiled.
    """
    recorder: list[PassTerms] = []
    _running.recorders.append(recorder)
    try:
        yield recorder
    finally:
        # By identity: two empty lists are equal.
        _running.recorders[:] = [other for other in _running.recorders if other is not recorder]
