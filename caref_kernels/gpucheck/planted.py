"""Backends with a planted bug: what the checks must catch before their passes mean anything.

Each is a working backend whose arguments or results are bent in plain torch, so that the same controls run on every
device and backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

_NO_VALUE = object()


class Planted:
    """A backend that hands everything on; the subclasses bend something."""

    def __init__(self, inner: backends.Backend) -> None:
        self._inner = inner

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def forward(self, logits: Tensor, targets: Tensor | None, spec) -> tuple[Tensor, Tensor]:
        """As the backend."""
        return self._inner.forward(logits, targets, spec)

    def backward(self, *arguments) -> None:
        """As the backend: (grad_terms, logits, targets, stats, spec, out)."""
        self._inner.backward(*arguments)


class TailDropped(Planted):
    """The last column is never seen, and gets no gradient."""

    def forward(self, logits, targets, spec):
        return self._inner.forward(_without_last(logits), targets, spec)

    def backward(self, grad_terms, logits, targets, stats, spec, out):
        self._inner.backward(grad_terms, _without_last(logits), targets, stats, spec, out)


class StrayWrite(Planted):
    """One element is written past the end of the gradient."""

    def backward(self, *arguments):
        self._inner.backward(*arguments)
        out = arguments[-1]
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(1)


class Unwritten(Planted):
    """The terms of the last row are left as they were allocated."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        partly = torch.empty(terms.shape, dtype=terms.dtype, device=terms.device)
        partly[:-1] = terms[:-1]
        return partly, stats


class InputChanged(Planted):
    """The logits are moved by their maximum, in place: the loss is the same."""

    def forward(self, logits, targets, spec):
        logits.sub_(logits.amax(-1, keepdim=True))
        return self._inner.forward(logits, targets, spec)


class AuxiliaryDropped(Planted):
    """SCED has no gradient: a hundred thousandth of the gradient of the loss."""

    def backward(self, grad_terms, *rest):
        self._inner.backward(grad_terms * grad_terms.new_tensor([1.0, 0.0, 1.0]), *rest)


class IncomingIgnored(Planted):
    """Rows are scaled by 1, whatever gradient comes in."""

    def backward(self, grad_terms, *rest):
        self._inner.backward((grad_terms != 0).to(grad_terms.dtype), *rest)


class NanSwallowed(Planted):
    """A row without a softmax gets numbers."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        return terms.nan_to_num(), stats


class LabelWrapped(Planted):
    """A label out of range is taken modulo the number of columns."""

    def forward(self, logits, targets, spec):
        return self._inner.forward(logits, _wrapped(targets, logits, spec), spec)

    def backward(self, grad_terms, logits, targets, stats, spec, out):
        self._inner.backward(grad_terms, logits, _wrapped(targets, logits, spec), stats, spec, out)


class StrideAssumed(Planted):
    """Rows are taken to follow one another without a gap."""

    def forward(self, logits, targets, spec):
        packed = torch.empty(logits.shape, device="meta").stride()
        return self._inner.forward(logits.as_strided(logits.shape, packed), targets, spec)


class Offset32(Planted):
    """Offsets of rows wrap where a 32-bit integer does."""

    bits = 32

    def forward(self, logits, targets, spec):
        stride, start = logits.stride(0), logits.storage_offset()
        wrapped = [row * stride % 2**self.bits for row in range(logits.size(0))]
        rows = [logits.as_strided((logits.size(1),), (1,), start + offset) for offset in wrapped]
        return self._inner.forward(torch.stack(rows), targets, spec)


class Noisy(Planted):
    """The last bit of the terms depends on chance."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        return torch.where(torch.rand_like(terms) < 0.5, terms, terms * (1 + torch.finfo(terms.dtype).eps)), stats


class Waiting(Planted):
    """The host reads a result."""

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        return terms + 0 * terms[0, 0].item(), stats


class Remembering(Planted):
    """Every call after the first returns the terms of the first."""

    _first = _NO_VALUE

    def forward(self, logits, targets, spec):
        terms, stats = self._inner.forward(logits, targets, spec)
        if self._first is _NO_VALUE:
            self._first = terms.clone()
        return self._first.clone(), stats


class DefaultStream(Planted):
    """Kernels run on the default stream, whatever the current one is."""

    def forward(self, logits, targets, spec):
        with torch.cuda.stream(torch.cuda.default_stream(logits.device)):
            return self._inner.forward(logits, targets, spec)


class ExtraCopy(Planted):
    """The backward pass copies the logits."""

    def backward(self, grad_terms, logits, *rest):
        self._inner.backward(grad_terms, logits.clone(), *rest)


BUGS: dict[str, type[Planted]] = {
    bug.__name__: bug
    for bug in (
        TailDropped, StrayWrite, Unwritten, InputChanged, AuxiliaryDropped, IncomingIgnored, NanSwallowed, LabelWrapped,
        StrideAssumed, Offset32, Noisy, Waiting, Remembering, DefaultStream, ExtraCopy,
    )
}  # fmt: skip


def plant(backend: str, bug: str) -> str:
    """Enter ``backend`` with ``bug`` among the backends of this process, and return its name."""
    name = f"{backend}-with-{bug}"
    backends._BACKENDS[name] = BUGS[bug](backends.get(backend))
    return name


def _without_last(logits: Tensor) -> Tensor:
    changed = logits.clone()
    changed[..., -1] = float("-inf")
    return changed


def _wrapped(targets: Tensor | None, logits: Tensor, spec) -> Tensor | None:
    if targets is None or targets.dtype == torch.bool:
        return targets
    return torch.where(targets == spec.ignore_index, targets, targets % logits.size(-1))
