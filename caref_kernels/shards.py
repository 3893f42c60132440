"""The loss of rows whose columns are spread over several ranks: what they tell one another, and when.

A row takes two exchanges: one MAX of the ranks' maxima, one SUM of their sums as seen from it (partial_rows.py), packed
with the label's logit.  Other exponents than those of ``ONE_PASS``, and masks, need the r of the whole row first and
take one more SUM.  The backward takes none: all that it needs of other ranks is in the statistics.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from . import backends, objective
from .backends.reference import check_labels, labelled
from .config import RowSpec
from .objective import accumulation_dtype
from .partial_rows import (
    ARGMAX,
    COUNT,
    ELSEWHERE,
    IGNORED,
    LABEL,
    Columns,
    Mask,
    Row,
    blocks,
    column_gradient,
    groups,
    is_one_pass,
    local_sums,
    packed_sums,
)
from .sparsity import row_support

if TYPE_CHECKING:
    import torch.distributed as dist


class Exchange(Protocol):
    """What the ranks tell one another; every rank gets the same result, bit for bit."""

    def maximum(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the ranks."""

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum over the ranks."""

    def gather(self, values: Tensor) -> Tensor:
        """The (N, K) of all ranks side by side."""


# A corner of a tensor tells it from that of another rank if it has as many different numbers: not where all are 0.
CORNER, LEAST_DIFFERENT = 64, 32


def fingerprint(part: Tensor) -> int:
    """A number of what ``part`` (..., M, N) holds, the same for the same numbers; 0 if they are too few to tell."""
    corner = part.detach()[(slice(1),) * (part.dim() - 2)][..., :CORNER, :CORNER].resolve_neg()
    bits = corner.to(torch.float32).flatten().view(torch.int32).long()
    if bits.unique().numel() < LEAST_DIFFERENT:
        return 0
    weights = torch.arange(1, 2 * bits.numel(), 2, device=bits.device)
    return int((bits * weights).sum()) or 1


class GroupExchange(NamedTuple):
    """:class:`Exchange` over a process group; ``values`` may be overwritten."""

    group: dist.ProcessGroup | None

    def maximum(self, values: Tensor) -> Tensor:
        """See :class:`Exchange`."""
        return self._all_reduce(values, "MAX")

    def total(self, values: Tensor) -> Tensor:
        """See :class:`Exchange`."""
        return self._all_reduce(values, "SUM")

    def gather(self, values: Tensor) -> Tensor:
        """See :class:`Exchange`."""
        import torch.distributed as dist  # late: importing it takes as long as the rest of the package

        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, values.contiguous(), self.group)
        return torch.cat(parts, -1)

    def _all_reduce(self, values: Tensor, operation: str) -> Tensor:
        import torch.distributed as dist

        values = values.contiguous()
        dist.all_reduce(values, getattr(dist.ReduceOp, operation), self.group)
        return values


class ShardRows(NamedTuple):
    """:class:`caref_kernels.linear_chunks.Rows` of logits (N, V_local): columns ``first_column`` and on of ``total``.

    ``spec`` has the V of U as a number.  Targets (N,) are labels among all columns.
    """

    exchange: Exchange
    first_column: int
    total: int
    backend: str
    spec: RowSpec
    common_columns: int = 0

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Terms (N, 3), the same on all ranks, and statistics (N, S), whose arg-max is local, -1 elsewhere."""
        labels = self.local_labels(logits, targets)
        dtype = accumulation_dtype(logits.dtype)
        local = local_sums(logits, labels, self.spec)
        maximum = self.exchange.maximum(local.maximum.nan_to_num(-math.inf, math.inf, -math.inf))
        is_owner = local.maximum == maximum
        packed = packed_sums(logits, labels, local, maximum, is_owner, self.spec)
        sums = self.exchange.total(packed)
        for _, place in groups(self.spec):  # the maxima of further ranks: 1 in every A_k0, 0 elsewhere
            sums[:, place.start] += sums[:, COUNT] - 1
        row = Row.of(maximum, sums, self.spec, dtype)
        argmax = torch.where(is_owner, local.argmax, -1).to(dtype)
        mask = self._mask(logits, labels, row) if self.spec.is_masked else None
        if is_one_pass(self.spec):
            rest, slope_sum = row.from_moments(sums, self.spec)
        elif self.spec.with_sced:
            rest, slope_sum = self._second_pass(logits, labels, argmax, row, sums[:, COUNT], mask)
        else:
            rest = slope_sum = torch.zeros_like(row.residual)
        terms, stats = row.finish(rest, slope_sum, argmax, sums[:, LABEL], mask, self.spec)
        out_of_range = labelled(targets, self.spec.ignore_index) & ((targets < 0) | (targets >= self.total))
        terms = torch.where(out_of_range[:, None], torch.nan, terms)  # on a device; the CPU has raised
        counts = (labels != IGNORED)[:, None]
        return torch.where(counts | out_of_range[:, None], terms, 0.0), torch.where(counts, stats, 0.0)

    def backward(self, grad_terms: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, out: Tensor) -> None:
        """Write this rank's columns of the gradient of sum(grad_terms * terms) into ``out``, perhaps the logits."""
        labels = self.local_labels(logits, targets)
        if logits.numel() == 0:
            return
        if self.backend == "reference" or self.spec.is_masked:
            for rows in blocks(logits):
                out[rows] = column_gradient(logits[rows], labels[rows], grad_terms[rows], stats[rows], self.spec)
            return
        spec = self.spec._replace(ignore_index=IGNORED)
        first = column_gradient(logits[:, :1], labels, grad_terms, stats, spec)
        # The kernels want a label and an arg-max in every row: both elsewhere means column 0, which is made here.
        here = torch.where(labels == ELSEWHERE, 0, labels)
        local_stats = stats.clone()
        local_stats[:, ARGMAX].clamp_min_(0)
        backends.get(self.backend).backward(grad_terms, logits, here, local_stats, spec, out)
        is_elsewhere = (labels == ELSEWHERE) | ((stats[:, ARGMAX] < 0) & (labels != IGNORED))
        out[:, :1] = torch.where(is_elsewhere[:, None], first, out[:, :1])

    def local_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) int64: this rank's column of the label, ``ELSEWHERE`` or ``IGNORED``; IndexError on the CPU."""
        if targets.device.type == "cpu":
            check_labels(targets, self.total, self.spec.ignore_index)
        label = targets.long() - self.first_column
        label = torch.where((label >= 0) & (label < logits.size(1)), label, ELSEWHERE)
        is_left_out = ~labelled(targets, self.spec.ignore_index) | (targets < 0) | (targets >= self.total)
        return torch.where(is_left_out, IGNORED, label)

    def _mask(self, logits: Tensor, labels: Tensor, row: Row) -> Mask:
        """The k-th largest of the whole row, among the k largest of every rank; exact, also with ties."""
        wanted = row_support(objective.entropy(row.residual, row.mean_shift)[:, None], self.spec.budget)
        most = max(int(wanted.max()), 1) if wanted.numel() else 1
        values = torch.where((labels != IGNORED)[:, None], logits.to(row.dtype), 0.0)
        best = values.topk(min(most, logits.size(1)), -1).values
        best = torch.nn.functional.pad(best, (0, most - best.size(1)), value=-math.inf)
        best = self.exchange.gather(best).sort(-1, descending=True).values
        support = torch.minimum(wanted, (best > -math.inf).sum(-1, keepdim=True).clamp_min(1))
        threshold = best.gather(-1, support - 1)
        missing = support - (best > threshold).sum(-1, keepdim=True)
        equal = self.exchange.total((values == threshold).sum(-1, keepdim=True))
        return Mask(support.to(row.dtype), threshold, missing.to(row.dtype) / equal.clamp_min(1))

    def _second_pass(self, logits, labels, argmax, row: Row, count: Tensor, mask: Mask | None):  # noqa: PLR0913
        """SCED without one maximum, and G, once r is known: one more SUM."""
        sums = torch.zeros((logits.size(0), 2), dtype=torch.float64, device=logits.device)
        for rows in blocks(logits):
            part = Columns.of(logits[rows], labels[rows], argmax[rows], row.at(rows))
            density = objective.sced_density(part.p, part.log_ratio, part.q, self.spec.alpha, self.spec.beta)
            for column, values in enumerate((density, part.slopes(self.spec))):
                values = torch.where(part.carries, values, 0.0)
                values = values if mask is None else values * mask.weights(logits[rows], rows)
                sums[rows, column] = values.sum(-1, dtype=torch.float64)
        rest, slope_sum = self.exchange.total(sums).unbind(-1)
        top_weight = 1.0 if mask is None else mask.weights(row.maximum[:, None], slice(None)).squeeze(-1).double()
        density, slope = row.top(self.spec)
        # The caller adds one maximum, of weight 1: the others, held by other ranks, and the weight are added here.
        return rest + (count * top_weight - 1) * density, slope_sum + (count - 1) * top_weight * slope
