"""The matrix products of a head and the loss in chunks of rows, without materialising the (N, V) logits.

The logits of a chunk are computed, overwritten with their gradient, and used in the products of the backward before the
next chunk begins.  Rows that are not valid are left out before the product.  Autograd is in linear.py; inside these
functions it is off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import valid_labels
from .config import RowSpec
from .distributed.local_stats import blocks
from .objective import accumulation_dtype, statistics_of, terms_of
from .ops import Rows

# A chunk shorter than this makes the products slow; one up to SMALL_CHUNK_BYTES is not worth splitting further.
LEAST_ROWS = 256
# From here on the products of a chunk take longer than the traffic per chunk, of the weight and its gradient.
GOOD_ROWS = 1024
SMALL_CHUNK_BYTES = 64 * 2**20
ROW_MULTIPLE = 64
# Columns of the gradient of the weight that are upcast together where a product cannot accumulate in float32.
TILE_COLUMNS = 4096
# Elements of a chunk on a device that exist a third time, in float32, where a softcap's derivative is applied.
TILE_ELEMENTS = 2**24


class Head(NamedTuple):
    """hidden (N, D), weight (V, D), bias (V,) or ``None``, of one dtype and device.

    logits = softcap tanh(logit_scale (hidden weight^T + bias) / softcap), or without a softcap its argument times it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def logit_bytes(self) -> int:
        """Bytes of a chunk per logit: with a softcap the product, and the capped logit in float32."""
        size = self.hidden.element_size()
        return size if self.softcap is None else size + accumulation_dtype(self.hidden.dtype).itemsize

    def multiply(self, hidden: Tensor, out: Tensor) -> None:
        """Write rows of logits, or of the argument of the tanh, into ``out`` (n, V), with one rounding."""
        factor = self.logit_scale / (self.softcap or 1.0)
        if self.bias is not None:
            torch.addmm(self.bias, hidden, self.weight.t(), beta=factor, alpha=factor, out=out)
        elif factor != 1:
            torch.addmm(out, hidden, self.weight.t(), beta=0, alpha=factor, out=out)
        else:
            torch.mm(hidden, self.weight.t(), out=out)


class NeedsInputGrad(NamedTuple):
    """The gradients that are needed; nothing is computed or allocated for the others."""

    hidden: bool
    weight: bool
    bias: bool


def auto_chunk_rows(rows: int, head: Head, trains_weight: bool, columns: int = 0) -> int:
    """Rows per chunk for ``rows`` valid rows; ``columns`` replaces V where ranks hold different numbers of them.

    The peak is ``a * chunk * V + b * V * D``: a the bytes of a logit, b those of an element of the weight's gradient,
    which no chunking makes smaller.  Every chunk reads the weight, and reads and writes its gradient, once more, so a
    chunk is as long as memory allows: both parts together a quarter of the logits; or, where the second part alone is
    more than that, the chunk as much as the second part (for a frozen head: as the weight), and at most a quarter.
    Under a softcap an element of a chunk takes ``Head.logit_bytes``, and a chunk of the same memory has fewer rows.
    """
    columns, features = columns or head.weight.size(0), head.weight.size(1)
    a = head.hidden.element_size()
    b = accumulation_dtype(head.hidden.dtype).itemsize if trains_weight else head.weight.element_size()
    weight_rows = math.ceil(b * features / a)  # V * D elements of b bytes, in rows of logits
    quarter = rows // 4 - rows * features // columns  # without the gradient of hidden
    wanted = quarter - weight_rows
    if wanted < LEAST_ROWS or not trains_weight:
        wanted = min(max(weight_rows, GOOD_ROWS), rows // 4 if trains_weight else quarter)
    wanted = wanted * a // head.logit_bytes
    wanted = max(wanted, min(SMALL_CHUNK_BYTES // (head.logit_bytes * columns), rows // 2), LEAST_ROWS)
    return min(rows, wanted // ROW_MULTIPLE * ROW_MULTIPLE)


def forward(
    head: Head,
    targets: Tensor | None,
    rows: Rows,
    weights: list[float] | Tensor,
    needs_input_grad: NeedsInputGrad,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Terms (N, 3), statistics (N, S), and the gradients of sum(weights * terms) / logit_scale that are needed.

    ``weights`` are those of CE, SCED and KL: numbers, a tensor (3,), or (N, 3) for weights of each row.  The gradient
    of hidden has its dtype, those of weight and bias the accumulation dtype; what is not needed is empty.
    ``chunk_rows`` 0 chooses.
    """
    dtype = accumulation_dtype(head.hidden.dtype)
    terms = head.hidden.new_zeros((head.hidden.size(0), len(terms_of(rows.spec))), dtype=dtype)
    stats = head.hidden.new_zeros((head.hidden.size(0), len(statistics_of(rows.spec))), dtype=dtype)
    grad_terms = weights if isinstance(weights, Tensor) else terms.new_tensor(weights)
    gradients = _Gradients(head, needs_input_grad)
    for chunk in _chunks(head, targets, rows, needs_input_grad, chunk_rows):
        terms[chunk.rows], chunk_stats = rows.forward(chunk.logits, chunk.targets)
        stats[chunk.rows] = chunk_stats
        if any(needs_input_grad):
            chunk_grad = grad_terms[chunk.rows] if grad_terms.dim() == 2 else grad_terms.expand(len(chunk.hidden), -1)
            rows.gradient(chunk_grad, chunk.logits, chunk.targets, chunk_stats, inplace=True)
            gradients.add(chunk)
    return terms, stats, *gradients.take()


def backward(
    grad_terms: Tensor,
    head: Head,
    targets: Tensor | None,
    stats: Tensor,
    rows: Rows,
    needs_input_grad: NeedsInputGrad,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum(grad_terms * terms) / logit_scale, with the logits computed again; as in :func:`forward`."""
    gradients = _Gradients(head, needs_input_grad)
    for chunk in _chunks(head, targets, rows, needs_input_grad, chunk_rows):
        rows.gradient(grad_terms[chunk.rows], chunk.logits, chunk.targets, stats[chunk.rows], inplace=True)
        gradients.add(chunk)
    return gradients.take()


class _Chunk(NamedTuple):
    rows: slice | Tensor  # which of the N rows
    hidden: Tensor  # (n, D)
    targets: Tensor | None  # (n,)
    logits: Tensor  # (n, V), in a buffer that the next chunk uses again
    product: Tensor  # (n, V) in the dtype of the head, likewise: the argument of the tanh; the logits without a softcap

    def gradient(self) -> Tensor:
        """(n, V) in the dtype of the head, once the logits are overwritten with their gradient; may be called once.

        tanh'(x) = 1 / cosh(x)^2, which keeps its digits where 1 - tanh(x)^2 is the rounding of a 1.
        """
        if self.product is self.logits:
            return self.logits
        if self.product.dtype == self.logits.dtype:
            return torch.div(self.logits, self.product.cosh_().square_(), out=self.product)
        for rows in blocks(self.product, TILE_ELEMENTS):
            slope = self.product[rows].to(self.logits.dtype).cosh_().square_()
            self.product[rows] = torch.div(self.logits[rows], slope, out=slope)
        return self.product


def _capped(product: Tensor, softcap: float, out: Tensor) -> Tensor:
    """softcap tanh(product) into ``out``, whose dtype the arithmetic has."""
    return out.copy_(product).tanh_().mul_(softcap)


def _chunks(
    head: Head, targets: Tensor | None, rows: Rows, needs_input_grad: NeedsInputGrad, chunk_rows: int
) -> Iterator[_Chunk]:
    valid = _valid_rows(targets, rows.spec)
    count = head.hidden.size(0) if valid is None else valid.numel()
    if count == 0:
        return
    size = min(count, chunk_rows or auto_chunk_rows(count, head, needs_input_grad.weight, rows.common_columns))
    buffer = head.hidden.new_empty((size, head.weight.size(0)))
    capped = buffer if head.softcap is None else torch.empty_like(buffer, dtype=accumulation_dtype(buffer.dtype))
    for start in range(0, count, size):
        where = slice(start, min(start + size, count))
        chosen = where if valid is None else valid[where]
        hidden = head.hidden[chosen]
        if _is_capturing(targets):  # rows that are not valid may hold anything, and are multiplied all the same
            hidden = torch.where(valid_labels(targets[chosen], rows.spec.ignore_index)[:, None], hidden, 0)
        logits = product = buffer[: len(hidden)]
        head.multiply(hidden, product)
        if head.softcap is not None:
            logits = _capped(product, head.softcap, capped[: len(hidden)])
        yield _Chunk(chosen, hidden, None if targets is None else targets[chosen], logits, product)


def _valid_rows(targets: Tensor | None, spec: RowSpec) -> Tensor | None:
    """Indices of the valid rows, or ``None`` for all.

    On a GPU this synchronises once, to read the labels, which costs less than the products of the other rows.  A graph
    that is being captured cannot synchronise, so it takes all rows.
    """
    if targets is None or _is_capturing(targets):
        return None
    valid = valid_labels(targets, spec.ignore_index).nonzero().squeeze(1)
    return None if valid.numel() == targets.numel() else valid


def _is_capturing(targets: Tensor | None) -> bool:
    return targets is not None and targets.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Gradients:
    """Sums over the chunks; the first chunk is written, so that the memory need not be zeroed before."""

    def __init__(self, head: Head, needs_input_grad: NeedsInputGrad) -> None:
        self.head, self.needs_input_grad = head, needs_input_grad
        dtype = accumulation_dtype(head.hidden.dtype)
        columns, features = head.weight.shape
        self.hidden = head.hidden.new_zeros(head.hidden.shape if needs_input_grad.hidden else 0)
        self.weight = head.hidden.new_empty((columns, features) if needs_input_grad.weight else 0, dtype=dtype)
        self.bias = head.hidden.new_zeros(columns if needs_input_grad.bias else 0, dtype=dtype)
        self.is_first = True

    def add(self, chunk: _Chunk) -> None:
        """Add the products of a chunk whose logits have been overwritten with their gradient."""
        gradient = chunk.gradient()
        if self.needs_input_grad.hidden:
            self._add_hidden(chunk.rows, gradient)
        if self.needs_input_grad.weight:
            _accumulate(self.weight, gradient, chunk.hidden, self.is_first)
        if self.needs_input_grad.bias:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        self.is_first = False

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias; empty where not needed."""
        if self.is_first and self.needs_input_grad.weight:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias

    def _add_hidden(self, rows: slice | Tensor, gradient: Tensor) -> None:
        if isinstance(rows, slice):
            torch.mm(gradient, self.head.weight, out=self.hidden[rows])
        else:
            self.hidden[rows] = torch.mm(gradient, self.head.weight)


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor, is_first: bool) -> None:
    """total (V, D) += gradient^T hidden, in the dtype of ``total`` whatever the dtype of the factors."""
    if total.dtype == gradient.dtype:
        _add_product(total, gradient.t(), hidden, is_first)
    elif total.device.type == "cuda" and _adds_in_float32(total.device, gradient.dtype):
        options = {"out_dtype": total.dtype, "out": total}
        if is_first:
            torch.mm(gradient.t(), hidden, **options)
        else:
            torch.addmm(total, gradient.t(), hidden, **options)
    else:  # rounding every chunk's product to 16 bits would grow with the number of chunks
        wide = hidden.to(total.dtype)
        for start in range(0, total.size(0), TILE_COLUMNS):
            columns = slice(start, start + TILE_COLUMNS)
            _add_product(total[columns], gradient[:, columns].to(total.dtype).t(), wide, is_first)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    if is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit factors to a float32 matrix; earlier ones want a 16-bit summand."""
    factor = torch.ones((16, 16), dtype=dtype, device=device)
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True
