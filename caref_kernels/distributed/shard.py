"""The part of the vocabulary that a rank holds, and the terms and gradients of rows that several ranks share.

A row takes two exchanges: one MAX of the ranks' maxima and one SUM of their sums as seen from the row's maximum
(local_stats.py), packed with the label's logit.  Exponents outside ``config.ONE_PASS_EXPONENTS``, and top-k masks,
need the residual of the whole row first and take one more SUM.  The backward exchanges nothing: all that it needs from
other ranks is in the statistics.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import backends, objective
from ..checks import check_label_range, valid_labels
from ..config import CarefConfig, RowSpec
from ..objective import MAX_COLUMNS, accumulation_dtype, column_grads, extra_terms
from ..sparsity import row_num_kept
from .collectives import Collectives, GroupCollectives, distributed, fingerprint, gather_integers
from .dtensors import is_dtensor, shard_axis
from .local_stats import (
    ARGMAX,
    ELSEWHERE,
    IGNORED,
    LABEL,
    NUM_MAXIMA,
    Columns,
    RowTotals,
    TopKStats,
    blocks,
    moment_columns,
    packed_sums,
)

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The columns of a vocabulary that this rank holds: ``columns`` of ``total``, starting at ``first_column``.

    Args:
        group: process group of the ranks that share the vocabulary; ``None`` is the default group.
        first_column, columns, total: non-negative integers.  The shards of a group cover the vocabulary without gap or
            overlap, in any order of ranks, and may have any size, also 0.
    Raises:
        ValueError: the shard is not inside the vocabulary.
    """

    group: dist.ProcessGroup | None
    first_column: int
    columns: int
    total: int

    def __post_init__(self) -> None:
        end = self.first_column + self.columns
        if not (0 <= self.first_column <= end <= self.total and 0 < self.total <= MAX_COLUMNS):
            raise ValueError(
                f"first_column, columns and total must describe columns inside [0, total), total in "
                f"[1, {MAX_COLUMNS}]; got {self.first_column}, {self.columns} and {self.total}"
            )

    @classmethod
    def gather(cls, columns: int, group: dist.ProcessGroup | None = None, device: str = "cpu") -> VocabShard:
        """The shard of a rank that holds ``columns``, where the ranks hold the vocabulary in their order.

        This takes one small all-gather: make the shard once, when the weight is sharded, and pass it to every call.
        ``device`` is that of the group's tensors ("cuda" for NCCL).  That the ranks hold different columns is not
        checked.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        return cls._of(gather_integers([columns], group, device)[:, 0], group)

    @classmethod
    def of_dtensor(cls, tensor: Tensor, dim: int) -> VocabShard:
        """The shard of a rank whose DTensor has the vocabulary as dimension ``dim``.

        Raises:
            ValueError: not exactly one dimension of the mesh shards that dimension.
        """
        axis, mesh, total = shard_axis(tensor, dim), tensor.device_mesh, tensor.size(dim)
        if axis is None:
            raise ValueError(
                f"dim: exactly one dimension of the mesh must shard dimension {dim} of the DTensor, in plain shards; "
                f"got placements {list(tensor.placements)}"
            )
        width = -(-total // mesh.size(axis))  # as DTensor splits: equal parts, the last ones shorter or empty
        first = min(mesh.get_local_rank(axis) * width, total)
        return cls(mesh.get_group(axis), first, min(width, total - first), total)

    @classmethod
    def _of(cls, sizes: Tensor, group: dist.ProcessGroup | None) -> VocabShard:
        rank = distributed().get_rank(group)
        return cls(group, int(sizes[:rank].sum()), int(sizes[rank]), int(sizes.sum()))


def local_logits(logits: Tensor, shard: object) -> tuple[Tensor, VocabShard | dist.ProcessGroup | None]:
    """``logits`` and ``shard``; for a DTensor sharded over its columns alone, its local part and where that lies.

    Raises:
        TypeError: ``shard`` is of another type, or is given besides a DTensor that has its own.
        NotImplementedError: inside torch.compile.
    """
    is_own = not torch.compiler.is_compiling() and is_dtensor(logits)
    if is_own and shard is not None:
        raise TypeError(f"shard must be None for a DTensor, which has its own; got {shard!r}")
    if is_own and shard_axis(logits, -1) is not None and sum(map(_is_shard, logits.placements)) == 1:
        return logits.to_local(grad_placements=logits.placements), VocabShard.of_dtensor(logits, -1)
    check_shard(shard)
    return logits, shard


def _is_shard(placement: object) -> bool:
    return placement.is_shard()


def check_shard(shard: object) -> None:
    """Raise an error unless ``shard`` is ``None``, or one that can be used here."""
    if shard is None:
        return
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "shard must be None inside torch.compile, which cannot trace the exchanges; call the loss of a sharded "
            "vocabulary outside of the compiled function, or wrap the call in torch.compiler.disable"
        )
    import torch.distributed as dist  # late: importing it takes as long as the rest of the package

    is_group = dist.is_available() and isinstance(shard, dist.ProcessGroup)
    if not (is_group or isinstance(shard, VocabShard)):
        raise TypeError(f"shard must be a VocabShard, a torch.distributed.ProcessGroup or None; got {shard!r}")


def resolved_shard(
    shard: VocabShard | dist.ProcessGroup, columns: int, part: Tensor, labels: Tensor, config: CarefConfig
) -> VocabShard:
    """The shard of this rank, whose ``columns`` are the last dimension of logits or the rows of a weight ``part``.

    Raises:
        ValueError: the shard has another number of columns, or every rank holds the same whole vocabulary.
    """
    if isinstance(shard, VocabShard):
        if shard.columns != columns:
            raise ValueError(f"shard: the VocabShard has {shard.columns} columns, but this rank holds {columns}")
        return shard
    valid = valid_labels(labels, config.ignore_index)
    last = int(labels.masked_fill(~valid, -1).max()) if labels.numel() else -1
    ranks = gather_integers([columns, fingerprint(part), last], shard, part.device)
    if len(ranks) > 1 and bool((ranks == ranks[0]).all()) and ranks[0, 1] and 0 <= last < columns:
        raise ValueError(
            f"every rank holds the same {columns} columns, and no label is beyond them: they look like whole logits "
            f"(or a whole head), which would be taken for {len(ranks)} x {columns} columns: leave shard=None, or pass "
            f"a VocabShard if equal columns are meant"
        )
    return VocabShard._of(ranks[:, 0], shard)


class ShardedRows(NamedTuple):
    """Logits (N, V_local) that are the columns from ``first_column`` on of rows of ``total`` columns.

    ``spec`` has the V of U as a number.  Targets (N,) are labels among all columns.  ``common_columns`` is a number of
    columns that all ranks agree on, from which each derives the same number of rows per chunk.
    """

    collectives: Collectives
    first_column: int
    total: int
    backend: str
    spec: RowSpec
    common_columns: int = 0

    is_twice_differentiable = False

    @classmethod
    def of(cls, shard: VocabShard, backend: str, config: CarefConfig) -> ShardedRows:
        """The rows of ``shard``."""
        spec = config.row_spec(shard.total).for_columns(shard.total)
        common = -(-shard.total // distributed().get_world_size(shard.group))
        return cls(GroupCollectives(shard.group), shard.first_column, shard.total, backend, spec, common)

    def forward(self, logits: Tensor, targets: Tensor, numbers: None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Terms (N, 3), the same on all ranks, and statistics (N, S), whose arg-max is local, -1 elsewhere."""
        labels = self.local_labels(logits, targets)
        dtype = accumulation_dtype(logits.dtype)
        local = backends.sharded(self.backend).sums(logits, labels, self.spec)
        maximum = self.collectives.maximum(local.maximum.nan_to_num(-math.inf, math.inf, -math.inf))
        is_owner = local.maximum == maximum
        sums = self.collectives.total(packed_sums(logits, labels, local, maximum, is_owner, self.spec))
        for _, place in moment_columns(self.spec):  # the maxima of further ranks: 1 in every A_k0, 0 elsewhere
            sums[:, place.start] += sums[:, NUM_MAXIMA] - 1
        row = RowTotals.of(maximum, sums, self.spec, dtype)
        argmax = torch.where(is_owner, local.argmax, -1).to(dtype)
        top_k = self._top_k(logits, labels, row) if self.spec.is_masked else None
        if self.spec.is_one_pass:
            rest, slope_sum = row.from_moments(sums, self.spec)
        elif self.spec.with_sced:
            rest, slope_sum = self._second_pass(logits, labels, argmax, row, sums[:, NUM_MAXIMA], top_k)
        else:
            rest = slope_sum = torch.zeros_like(row.residual)
        terms, stats = row.finish(rest, slope_sum, argmax, sums[:, LABEL], top_k, self.spec)
        if self.spec.is_extended:
            mean_of_shifts = sums[:, -1] / max(self.spec.smoothed, 1) - maximum.double()
            extra = extra_terms(maximum.double(), row.residual, mean_of_shifts)
            terms = torch.cat((terms, torch.stack(extra, -1).to(dtype)), -1)
        out_of_range = valid_labels(targets, self.spec.ignore_index) & ((targets < 0) | (targets >= self.total))
        terms = torch.where(out_of_range[:, None], torch.nan, terms)  # on a device; the CPU has raised
        valid = (labels != IGNORED)[:, None]
        return torch.where(valid | out_of_range[:, None], terms, 0.0), torch.where(valid, stats, 0.0)

    def gradient(
        self,
        grad_terms: Tensor,
        logits: Tensor,
        targets: Tensor,
        stats: Tensor,
        inplace: bool,
        numbers: None = None,  # noqa: ARG002
    ) -> Tensor:
        """The gradient of sum(grad_terms * terms) in these columns, in the memory of the logits if ``inplace``."""
        labels = self.local_labels(logits, targets)
        if self.spec.is_extended:
            grad_terms = column_grads(grad_terms, stats[:, objective.MAXIMUM], stats[:, objective.RESIDUAL], self.spec)
        out = logits.detach() if inplace else torch.empty_like(logits)
        if logits.numel() == 0:
            return out
        if self.backend == "reference" or self.spec.is_masked:
            backends.sharded(self.backend).local_gradient(grad_terms, logits, labels, stats, self.spec, out)
            return out
        spec = self.spec._replace(ignore_index=IGNORED)
        first = torch.empty_like(logits[:, :1])
        backends.sharded(self.backend).local_gradient(grad_terms, logits[:, :1], labels, stats, spec, first)
        # The kernels expect a label and an arg-max in every row.  Where they are on another rank, the kernels get
        # column 0 for both, and that column is computed here.
        here = torch.where(labels == ELSEWHERE, 0, labels)
        local_stats = stats.clone()
        local_stats[:, ARGMAX].clamp_min_(0)
        backends.get(self.backend).gradient(grad_terms, logits, here, local_stats, spec, out)
        is_elsewhere = (labels == ELSEWHERE) | ((stats[:, ARGMAX] < 0) & (labels != IGNORED))
        out[:, :1] = torch.where(is_elsewhere[:, None], first, out[:, :1])
        return out

    def local_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) int64: this rank's column of the label, ``ELSEWHERE`` or ``IGNORED``; IndexError on the CPU."""
        check_label_range(targets, self.total, self.spec.ignore_index)
        label = targets.long() - self.first_column
        label = torch.where((label >= 0) & (label < logits.size(1)), label, ELSEWHERE)
        is_ignored = ~valid_labels(targets, self.spec.ignore_index) | (targets < 0) | (targets >= self.total)
        return torch.where(is_ignored, IGNORED, label)

    def _top_k(self, logits: Tensor, labels: Tensor, row: RowTotals) -> TopKStats:
        """The k-th largest logit of the whole row, among the k largest of every rank; exact, also with ties."""
        wanted = row_num_kept(objective.entropy(row.residual, row.mean_shift)[:, None], self.spec.top_k)
        most = max(int(wanted.max()), 1) if wanted.numel() else 1
        values = torch.where((labels != IGNORED)[:, None], logits.to(row.dtype), 0.0)
        best = values.topk(min(most, logits.size(1)), -1).values
        best = torch.nn.functional.pad(best, (0, most - best.size(1)), value=-math.inf)
        best = self.collectives.gather(best).sort(-1, descending=True).values
        num_kept = torch.minimum(wanted, (best > -math.inf).sum(-1, keepdim=True).clamp_min(1))
        threshold = best.gather(-1, num_kept - 1)
        missing = num_kept - (best > threshold).sum(-1, keepdim=True)
        equal = self.collectives.total((values == threshold).sum(-1, keepdim=True))
        return TopKStats(num_kept.to(row.dtype), threshold, missing.to(row.dtype) / equal.clamp_min(1))

    def _second_pass(self, logits, labels, argmax, row: RowTotals, num_maxima: Tensor, top_k: TopKStats | None):
        """SCED without one maximum, and G, once the residual is known: one more SUM."""
        sums = torch.zeros((logits.size(0), 2), dtype=torch.float64, device=logits.device)
        for rows in blocks(logits):
            part = Columns.of(logits[rows], labels[rows], argmax[rows], row.at(rows))
            density = objective.sced_density(part.p, part.log_ratio, part.q, self.spec.alpha, self.spec.beta)
            for column, values in enumerate((density, part.slopes(self.spec))):
                values = torch.where(part.carries, values, 0.0)
                values = values if top_k is None else values * top_k.weights(logits[rows], rows)
                sums[rows, column] = values.sum(-1, dtype=torch.float64)
        rest, slope_sum = self.collectives.total(sums).unbind(-1)
        top_weight = 1.0
        if top_k is not None:
            top_weight = top_k.weights(row.maximum[:, None], slice(None)).squeeze(-1).double()
        density, slope = row.top(self.spec)
        # The caller adds one maximum, of weight 1: the others, held by other ranks, and the weight are added here.
        rest = rest + (num_maxima * top_weight - 1) * density
        return rest, slope_sum + (num_maxima - 1) * top_weight * slope
