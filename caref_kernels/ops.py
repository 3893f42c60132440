"""The operators that torch sees: schemas, shapes for tracing, and the call of a backend.

They are opaque to torch.compile (they have no decomposition), so that compiled and eager code give bitwise identical
results.  Autograd is in autograd.py; inside the bodies of the operators it is off.  torch.library takes flat numbers,
so this module alone spreads a ``RowSpec`` over arguments: callers pass the specification.

A number that changes between calls of compiled code, as in a schedule, would compile the function anew for every value,
so it is passed as a tensor besides: ``numbers`` (3,) on the CPU replaces alpha, beta and k_scale, ``varying`` (3,) the
weights of the terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import backends, objective
from .checks import valid_rows
from .config import RowSpec
from .objective import MAXIMUM, RESIDUAL, TERMS, accumulation_dtype, per_item, statistics_of, terms_of

NAMESPACE = "caref_kernels"
SPEC_SCHEMA = (
    "float alpha, float beta, int vocab_size, int ignore_index, bool with_sced, "
    "float k_scale, int k_min, int k_max, bool with_z, int smoothed, str backend, Tensor? numbers=None"
)
_library = torch.library.Library(NAMESPACE, "DEF")
_FIELDS = len(RowSpec._fields)
# torch sums up to this many float32 elements in one fixed order; longer sums depend on the number of threads.
_SERIAL_ROWS = 4096


def register(schema: str, implementation: Callable, fake: Callable):
    """Define an operator for every device; ``fake`` returns the shapes of its results."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.caref_kernels, name).default


class Call(NamedTuple):
    """The arguments that every operator ends with."""

    spec: RowSpec
    backend: str
    varying: Tensor | None

    @classmethod
    def of(cls, columns: int, arguments: tuple) -> Call:
        """From the arguments of ``SPEC_SCHEMA``, and ``varying`` if it follows."""
        spec = RowSpec(*arguments[:_FIELDS])
        if len(arguments) > _FIELDS + 1 and arguments[_FIELDS + 1] is not None:
            alpha, beta, k_scale = arguments[_FIELDS + 1].tolist()
            spec = spec._replace(alpha=alpha, beta=beta, k_scale=k_scale)
        varying = arguments[_FIELDS + 2] if len(arguments) > _FIELDS + 2 else None
        return cls(spec.for_columns(columns), arguments[_FIELDS], varying)


def widths(arguments: tuple) -> tuple[int, int]:
    """The numbers of terms and of statistics per row, from the arguments of ``SPEC_SCHEMA``."""
    spec = RowSpec(*arguments[:_FIELDS])
    return len(terms_of(spec)), len(statistics_of(spec))


def forward_of(backend: str, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """Terms and statistics by a backend, which has those of objective.TERMS; the extra terms are added here."""
    terms, stats = backends.get(backend).forward(logits, targets, spec)
    if not spec.is_extended:
        return terms, stats
    maximum, residual = stats[:, MAXIMUM].double(), stats[:, RESIDUAL].double()
    if not spec.smoothed:
        mean_of_shifts = torch.zeros_like(maximum)
    elif terms.size(1) > len(TERMS):
        terms, mean_of_shifts = terms[:, :-1], terms[:, -1].double()
    else:
        mean_of_shifts = logits.sum(-1, dtype=torch.float64).reshape(-1) / spec.smoothed - maximum
    z_loss, uniform_ce = objective.extra_terms(maximum, residual, mean_of_shifts)
    if targets is not None:  # rows that are not valid may hold anything
        valid = valid_rows(targets, spec.ignore_index)
        uniform_ce = torch.where(valid, uniform_ce, 0.0)
    return torch.cat((terms, torch.stack((z_loss, uniform_ce), -1).to(terms.dtype)), -1), stats


def gradient_into(
    out: Tensor,
    grad_terms: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    stats: Tensor,
    spec: RowSpec,
    backend: str,
) -> None:
    """The gradient of sum(grad_terms * terms), written by a backend."""
    if spec.is_extended:
        grad_terms = objective.column_grads(grad_terms, stats[:, MAXIMUM], stats[:, RESIDUAL], spec)
    backends.get(backend).gradient(grad_terms, logits, targets, stats, spec, out)


def _forward(logits, targets, *arguments):
    call = Call.of(logits.size(-1), arguments)
    return forward_of(call.backend, logits, targets, call.spec)


def _forward_fake(logits, targets, *arguments):  # noqa: ARG001
    dtype = accumulation_dtype(logits.dtype)
    rows = logits.size(0) * logits.size(1) if logits.dim() == 3 else logits.size(0)
    return tuple(logits.new_empty((rows, width), dtype=dtype) for width in widths(arguments))


def _backward_into(out, grad_terms, logits, targets, stats, arguments):
    call = Call.of(logits.size(-1), arguments)
    gradient_into(out, grad_terms, logits, targets, stats, call.spec, call.backend)


def _backward(grad_terms, logits, targets, stats, *arguments):
    out = _backward_fake(grad_terms, logits, targets, stats, *arguments)
    _backward_into(out, grad_terms, logits, targets, stats, arguments)
    return out


def _backward_fake(grad_terms, logits, targets, stats, *arguments):  # noqa: ARG001
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward_inplace(grad_terms, logits, targets, stats, *arguments):
    _backward_into(logits, grad_terms, logits, targets, stats, arguments)


def _backward_inplace_fake(grad_terms, logits, targets, stats, *arguments):  # noqa: ARG001
    return None


def _reduce(terms, divisor, weights, per_row, any_items=False, varying=None, token_weights=None):
    """(loss, reduced terms); sums run in float64 and in an order that no number of threads changes.

    ``any_items``: the divisor is a number of items that may be 0, and not the number of rows of a mean.
    """
    terms = terms if token_weights is None else terms * token_weights[:, None]
    reduced = terms.clone() if per_row else _sum_rows(terms)
    if divisor is not None:
        reduced = per_item(reduced, divisor) if any_items else reduced / divisor
    reduced = reduced.to(terms.dtype)
    factors = weights if varying is None else varying.unbind()
    used = _weighted_terms(reduced, weights, varying) if any_items else reduced.unbind(-1)
    first, *rest = (factor * term for factor, term in zip(factors, used, strict=True))
    return sum(rest, start=first), reduced


def _weighted_terms(reduced: Tensor, weights: list[float], varying: Tensor | None):
    """The terms, and 0 for a term of weight 0, which may be infinite where there are no items."""
    if varying is not None:
        return torch.where(varying == 0, 0, reduced).unbind(-1)
    return [
        term if weight else torch.zeros_like(term) for term, weight in zip(reduced.unbind(-1), weights, strict=True)
    ]


def _sum_rows(terms: Tensor) -> Tensor:
    if terms.size(0) <= _SERIAL_ROWS or terms.device.type != "cpu":
        return terms.sum(0, dtype=torch.float64)
    return torch.stack([part.sum(0, dtype=torch.float64) for part in terms.split(_SERIAL_ROWS)]).sum(0)


def _reduce_fake(terms, divisor, weights, per_row, any_items=False, varying=None, token_weights=None):  # noqa: ARG001
    shape = terms.shape if per_row else terms.shape[1:]
    return terms.new_empty(shape[:-1]), terms.new_empty(shape)


_forward_op = register(
    f"forward(Tensor logits, Tensor? targets, {SPEC_SCHEMA}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = register(
    f"backward(Tensor grad_terms, Tensor logits, Tensor? targets, Tensor stats, {SPEC_SCHEMA}) -> Tensor",
    _backward,
    _backward_fake,
)
_backward_inplace_op = register(
    f"backward_(Tensor grad_terms, Tensor(a!) logits, Tensor? targets, Tensor stats, {SPEC_SCHEMA}) -> ()",
    _backward_inplace,
    _backward_inplace_fake,
)
reduce = register(
    "reduce(Tensor terms, Tensor? divisor, float[] weights, bool per_row, bool any_items=False, Tensor? varying=None, "
    "Tensor? token_weights=None) -> (Tensor, Tensor)",
    _reduce,
    _reduce_fake,
)


def forward(
    logits: Tensor, targets: Tensor | None, spec: RowSpec, backend: str, numbers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Terms (N, 3) or (N, 5) and statistics (N, S); see :class:`caref_kernels.backends.Backend`."""
    return _forward_op(logits, targets, *spec, backend, numbers)


def backward(
    grad_terms: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    stats: Tensor,
    spec: RowSpec,
    backend: str,
    numbers: Tensor | None = None,
) -> Tensor:
    """The gradient of sum(grad_terms * terms) with respect to the logits."""
    return _backward_op(grad_terms, logits, targets, stats, *spec, backend, numbers)


def backward_(
    grad_terms: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    stats: Tensor,
    spec: RowSpec,
    backend: str,
    numbers: Tensor | None = None,
) -> None:
    """:func:`backward`, written into the memory of the logits."""
    _backward_inplace_op(grad_terms, logits, targets, stats, *spec, backend, numbers)


def settled(spec: RowSpec, weights: tuple[float, ...], logits: Tensor):
    """(spec, weights, varying, numbers), where a number that changes between calls of compiled code is in a tensor.

    Dynamo takes a number for a constant at first, then for a symbol; an operator that took it as a number would make it
    a constant again.  ``varying`` and ``numbers`` are ``None`` where nothing changes.
    """
    if not torch.compiler.is_compiling():
        return spec, weights, None, None
    varying = changing(weights, accumulation_dtype(logits.dtype), logits.device)
    numbers = changing((spec.alpha, spec.beta, spec.k_scale), torch.float64, torch.device("cpu"))
    if numbers is not None:
        spec = spec._replace(alpha=2.0, beta=1.0, k_scale=1.0)
    return spec, weights if varying is None else (1.0,) * len(weights), varying, numbers


def changing(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """``values`` as a tensor if one of them is no constant to the compiler."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # late: it imports sympy, as the compiler does

    if all(has_static_value(value) for value in values):
        return None
    one = torch.ones((), dtype=dtype, device=device)
    return torch.stack([one * value for value in values])


class Rows(Protocol):
    """The loss of a block of logits (n, V): all columns on this rank, or some of the columns on each of several ranks.

    ``common_columns`` is a number of columns that all ranks agree on, 0 for a single one.
    """

    spec: RowSpec
    common_columns: int
    is_twice_differentiable: bool

    def forward(self, logits: Tensor, targets: Tensor | None, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Terms (n, 3), or (n, 5) with the extra ones, and statistics (n, S)."""

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, inplace: bool,
        numbers: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The gradient of sum(grad_terms * terms), in the memory of the logits if ``inplace``."""


class WholeRows(NamedTuple):
    """:class:`Rows` whose columns are all on this rank."""

    backend: str
    spec: RowSpec
    common_columns: int = 0

    @property
    def is_twice_differentiable(self) -> bool:
        """Whether the gradient can be differentiated again."""
        return self.backend == "reference"

    def forward(self, logits: Tensor, targets: Tensor | None, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        return forward(logits, targets, self.spec, self.backend, numbers)

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, inplace: bool,
        numbers: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See :class:`Rows`."""
        if not inplace:
            return backward(grad_terms, logits, targets, stats, self.spec, self.backend, numbers)
        backward_(grad_terms, logits, targets, stats, self.spec, self.backend, numbers)
        return logits.detach()


class DirectRows(WholeRows):
    """:class:`WholeRows` for the body of another operator, where the dispatcher would only cost time."""

    def forward(self, logits: Tensor, targets: Tensor | None, numbers: None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See :class:`Rows`."""
        return forward_of(self.backend, logits, targets, self.spec)

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, inplace: bool,
        numbers: None = None,  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """See :class:`Rows`."""
        out = logits if inplace else torch.empty_like(logits)
        gradient_into(out, grad_terms, logits, targets, stats, self.spec, self.backend)
        return out
