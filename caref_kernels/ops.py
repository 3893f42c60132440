"""The operators that torch sees: schemas, shapes for tracing, and the hand-over to a backend.

Opaque to torch.compile (no decomposition), so that compiled and eager code give the same bits.  Autograd lives in
autograd.py; inside these bodies it is off.

Numbers that compiled code gets from outside, a schedule say, come as tensors besides: as floats each new value would
compile anew.  ``numbers`` (3,) on the CPU replaces alpha, beta and k_scale, ``varying`` (3,) the weights of the terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, linear_chunks
from .config import RowSpec
from .linear_chunks import BackendRows, Head, Needs
from .objective import NUM_TERMS, accumulation_dtype, per_item, statistics_of

NAMESPACE = "caref_kernels"
_SPEC = (
    "float alpha, float beta, int vocab_size, int ignore_index, bool with_sced, "
    "float k_scale, int k_min, int k_max, str backend, Tensor? numbers=None"
)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"forward(Tensor logits, Tensor? targets, {_SPEC}) -> (Tensor, Tensor)")
_library.define(f"backward(Tensor grad_terms, Tensor logits, Tensor? targets, Tensor stats, {_SPEC}) -> Tensor")
_library.define(f"backward_(Tensor grad_terms, Tensor(a!) logits, Tensor? targets, Tensor stats, {_SPEC}) -> ()")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float? softcap, Tensor? targets"
_library.define(
    f"linear_forward({_HEAD}, float[] weights, bool[] needs, int chunk_rows, {_SPEC}, Tensor? varying=None)"
    f" -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_backward(Tensor grad_terms, {_HEAD}, Tensor stats, bool[] needs, int chunk_rows, {_SPEC})"
    f" -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "reduce(Tensor terms, Tensor? divisor, float[] weights, bool per_row, bool any_items=False, Tensor? varying=None)"
    " -> (Tensor, Tensor)"
)

# One C++ float32 sum over more elements than this would be split by the number of threads; smaller ones never are.
_SERIAL_ROWS = 4096


def _num_rows(logits: Tensor) -> int:
    rows = logits.size(0)
    return rows * logits.size(1) if logits.dim() == 3 else rows


class _Call(NamedTuple):
    """The arguments that every operator ends with."""

    spec: RowSpec
    backend: str
    varying: Tensor | None

    @classmethod
    def of(cls, columns: int, arguments: tuple) -> _Call:
        spec = RowSpec(*arguments[:_FIELDS])
        if len(arguments) > _FIELDS + 1 and arguments[_FIELDS + 1] is not None:
            alpha, beta, k_scale = arguments[_FIELDS + 1].tolist()
            spec = spec._replace(alpha=alpha, beta=beta, k_scale=k_scale)
        varying = arguments[_FIELDS + 2] if len(arguments) > _FIELDS + 2 else None
        return cls(spec.for_columns(columns), arguments[_FIELDS], varying)


_FIELDS = len(RowSpec._fields)


def _forward(logits, targets, *arguments):
    call = _Call.of(logits.size(-1), arguments)
    return backends.get(call.backend).forward(logits, targets, call.spec)


def _forward_fake(logits, targets, *arguments):  # noqa: ARG001
    dtype = accumulation_dtype(logits.dtype)
    rows, columns = _num_rows(logits), _num_statistics(arguments)
    return logits.new_empty((rows, NUM_TERMS), dtype=dtype), logits.new_empty((rows, columns), dtype=dtype)


def _num_statistics(arguments: tuple) -> int:
    return len(statistics_of(RowSpec(*arguments[:_FIELDS])))


def _backward_into(out, grad_terms, logits, targets, stats, arguments):  # noqa: PLR0913
    call = _Call.of(logits.size(-1), arguments)
    backends.get(call.backend).backward(grad_terms, logits, targets, stats, call.spec, out)


def _backward(grad_terms, logits, targets, stats, *arguments):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_into(out, grad_terms, logits, targets, stats, arguments)
    return out


def _backward_fake(grad_terms, logits, targets, stats, *arguments):  # noqa: ARG001
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward_inplace(grad_terms, logits, targets, stats, *arguments):
    _backward_into(logits, grad_terms, logits, targets, stats, arguments)


def _backward_inplace_fake(grad_terms, logits, targets, stats, *arguments):  # noqa: ARG001
    return None


def _reduce(terms, divisor, weights, per_row, any_items=False, varying=None):  # noqa: PLR0913
    """(loss, reduced terms); sums run in float64 and in an order that no number of threads changes.

    ``any_items``: the divisor is a number of items that may be 0, and not the number of rows of a mean.
    """
    reduced = terms.clone() if per_row else _sum_rows(terms)
    if divisor is not None:
        reduced = per_item(reduced, divisor) if any_items else reduced / divisor
    reduced = reduced.to(terms.dtype)
    w_ce, w_sced, w_kl = weights if varying is None else varying.unbind()
    ce, sced, kl = _weighted_terms(reduced, weights, varying) if any_items else reduced.unbind(-1)
    return w_ce * ce + w_sced * sced + w_kl * kl, reduced


def _weighted_terms(reduced: Tensor, weights: list[float], varying: Tensor | None):
    """The terms, and 0 for those of weight 0, which may be infinite where there are no items."""
    if varying is not None:
        return torch.where(varying == 0, 0, reduced).unbind(-1)
    return [
        term if weight else torch.zeros_like(term) for term, weight in zip(reduced.unbind(-1), weights, strict=True)
    ]


def _sum_rows(terms: Tensor) -> Tensor:
    if terms.size(0) <= _SERIAL_ROWS or terms.device.type != "cpu":
        return terms.sum(0, dtype=torch.float64)
    return torch.stack([part.sum(0, dtype=torch.float64) for part in terms.split(_SERIAL_ROWS)]).sum(0)


def _reduce_fake(terms, divisor, weights, per_row, any_items=False, varying=None):  # noqa: ARG001, PLR0913
    shape = terms.shape if per_row else terms.shape[1:]
    return terms.new_empty(shape[:-1]), terms.new_empty(shape)


def _linear_forward(*arguments):
    head, (targets, weights, needs, chunk_rows, *rest) = _head(arguments)
    spec, backend, varying = _Call.of(head.weight.size(0), rest)
    weights = weights if varying is None else varying
    rows = BackendRows(backend, spec)
    with torch.autocast(head.hidden.device.type, enabled=False):
        if targets is not None:
            linear_chunks.check_targets(targets, head.weight.size(0), spec)
        return linear_chunks.forward(head, targets, rows, spec, weights, Needs(*needs), chunk_rows)


def _head(arguments: tuple) -> tuple[Head, tuple]:
    """The arguments that the operators of a head begin with, and the others."""
    count = len(Head._fields)
    return Head(*arguments[:count]), arguments[count:]


def _linear_forward_fake(*arguments):
    head, (_, _, needs, _, *rest) = _head(arguments)
    dtype = accumulation_dtype(head.hidden.dtype)
    rows, columns = head.hidden.size(0), _num_statistics(rest)
    terms = head.hidden.new_empty((rows, NUM_TERMS), dtype=dtype)
    stats = head.hidden.new_empty((rows, columns), dtype=dtype)
    return terms, stats, *_fake_gradients(head, needs)


def _fake_gradients(head: Head, needs):
    dtype = accumulation_dtype(head.hidden.dtype)
    columns = head.weight.shape[:1]
    shapes = (head.hidden.shape, head.hidden.dtype), (head.weight.shape, dtype), (columns, dtype)
    return tuple(
        head.hidden.new_empty(shape, dtype=kind) if need else head.hidden.new_empty(0)
        for (shape, kind), need in zip(shapes, needs, strict=True)
    )


def _linear_backward(grad_terms, *arguments):
    head, (targets, stats, needs, chunk_rows, *rest) = _head(arguments)
    spec, backend, _ = _Call.of(head.weight.size(0), rest)
    rows = BackendRows(backend, spec)
    with torch.autocast(head.hidden.device.type, enabled=False):
        return linear_chunks.backward(grad_terms, head, targets, stats, rows, spec, Needs(*needs), chunk_rows)


def _linear_backward_fake(grad_terms, *arguments):  # noqa: ARG001
    head, (_, _, needs, *_) = _head(arguments)
    return _fake_gradients(head, needs)


_IMPLEMENTATIONS = {
    "forward": (_forward, _forward_fake),
    "backward": (_backward, _backward_fake),
    "backward_": (_backward_inplace, _backward_inplace_fake),
    "reduce": (_reduce, _reduce_fake),
    "linear_forward": (_linear_forward, _linear_forward_fake),
    "linear_backward": (_linear_backward, _linear_backward_fake),
}
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

forward = torch.ops.caref_kernels.forward.default
backward = torch.ops.caref_kernels.backward.default
backward_ = torch.ops.caref_kernels.backward_.default
reduce = torch.ops.caref_kernels.reduce.default
linear_forward = torch.ops.caref_kernels.linear_forward.default
linear_backward = torch.ops.caref_kernels.linear_backward.default
