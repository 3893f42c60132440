"""Injected faults: backends that do one thing wrong, each of which a test must notice before its passes mean anything.

Each wraps a working backend and changes its arguments or results in plain torch, so that the same faults run on every
backend and device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caref_kernels import backends


def notices(*names: str) -> pytest.MarkDecorator:
    """Run the test as it is, and once with each of these faults, where it must fail."""
    return pytest.mark.parametrize("fault", [None, *names], ids=("correct", *names))


class Fault:
    """A backend that hands everything on; the subclasses change something."""

    def __init__(self, inner: backends.Backend) -> None:
        self._inner = inner
        self.name = inner.name
        self.kept: list[Tensor] = []

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def forward(self, logits: Tensor, targets: Tensor | None, spec) -> tuple[Tensor, Tensor]:
        return self._inner.forward(logits, targets, spec)

    def gradient(self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec, out) -> None:
        self._inner.gradient(grad_terms, logits, targets, stats, spec, out)


class TailDropped(Fault):
    """The last column is never read, and gets no gradient."""

    def forward(self, logits, targets, spec):
        return self._inner.forward(_without_last(logits), targets, spec)

    def gradient(self, grad_terms, logits, targets, stats, spec, out):
        self._inner.gradient(grad_terms, _without_last(logits), targets, stats, spec, out)


class StrayWrite(Fault):
    """One element is written past the end of the gradient."""

    def gradient(self, *arguments):
        self._inner.gradient(*arguments)
        out = arguments[-1]
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(1)


class Unwritten(Fault):
    """The terms of the last row are left as they were allocated."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        partly = torch.empty(terms.shape, dtype=terms.dtype, device=terms.device)
        partly[:-1] = terms[:-1]
        return partly, stats


class InputChanged(Fault):
    """The logits are shifted by their maximum, in place: the loss is the same."""

    def forward(self, logits, targets, spec):
        logits.sub_(logits.amax(-1, keepdim=True))
        return self._inner.forward(logits, targets, spec)


class AuxiliaryDropped(Fault):
    """SCED has no gradient: a hundred thousandth of the gradient of the loss."""

    def gradient(self, grad_terms, *rest):
        self._inner.gradient(grad_terms * grad_terms.new_tensor([1.0, 0.0, 1.0]), *rest)


class IncomingIgnored(Fault):
    """Rows are scaled by 1, whatever gradient comes in."""

    def gradient(self, grad_terms, *rest):
        self._inner.gradient((grad_terms != 0).to(grad_terms.dtype), *rest)


class Offset32(Fault):
    """Offsets of rows wrap where a 32-bit integer does."""

    bits = 32

    def forward(self, logits, targets, spec):
        start, wrapped = logits.storage_offset(), logits.clone(memory_format=torch.contiguous_format)
        for row in range(logits.size(0)):
            offset = row * logits.stride(0)
            if offset >= 2**self.bits:
                wrapped[row] = logits.as_strided((logits.size(1),), (1,), start + offset % 2**self.bits)
        return self._inner.forward(wrapped, targets, spec)


class Noisy(Fault):
    """The last five bits of the terms are random: one bit could be rounded away in the sum of a few rows."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        return terms * (1 + 32 * torch.finfo(terms.dtype).eps * torch.rand_like(terms)), stats


class Waiting(Fault):
    """The host reads a result."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        return terms + 0 * terms[0, 0].item(), stats


class Remembering(Fault):
    """Every call after the first returns the terms of the first."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        self.kept = self.kept or [terms.clone()]
        return self.kept[0].clone(), stats


class SharedStatistics(Fault):
    """All calls write their statistics into the same memory."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        self.kept = self.kept or [stats]
        self.kept[0].data.copy_(stats)
        return terms, self.kept[0]


class DefaultStream(Fault):
    """Kernels run on the default stream, whatever the current one is."""

    def forward(self, logits, targets, spec):
        with torch.cuda.stream(torch.cuda.default_stream(logits.device)):
            return self._inner.forward(logits, targets, spec)


class ExtraCopy(Fault):
    """The backward pass copies the logits."""

    def gradient(self, grad_terms, logits, *rest):
        self._inner.gradient(grad_terms, logits.clone(), *rest)


class Leaking(Fault):
    """A copy of the logits stays allocated after each call."""

    def forward(self, logits, targets, spec):
        self.kept.append(logits.clone())
        return self._inner.forward(logits, targets, spec)


BY_NAME: dict[str, type[Fault]] = {fault.__name__: fault for fault in Fault.__subclasses__()}


def _without_last(logits: Tensor) -> Tensor:
    changed = logits.clone()
    changed[..., -1] = float("-inf")
    return changed
