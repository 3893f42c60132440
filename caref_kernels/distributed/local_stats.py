"""The statistics of the columns that one rank holds, their combination to those of the whole row, and the gradient.

Seen from any maximum m, a row is described by a few sums, A_kj = sum over v != a of e^(k y) y^j with y = z - m:
r = A_10, the mean shift A_11 / (1 + r), and, for the exponents of ``config.ONE_PASS_EXPONENTS``, SCED and the
constant G of its gradient.  csrc/cpu/forward.cpp and csrc/row_math.h have the same algebra for whole rows.

Every rank leaves the column of its own first maximum out of its sums.  Where several ranks hold the row's maximum, all
but one of those columns must be added again: they are counted, and each adds e^0 0^j.

This is plain torch for any device, in blocks of rows that stay in the cache: elements in float32 (float64 for float64
logits), sums in float64.  It is the reference backend's `sums`, and the counterpart of any kernel that takes its place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import objective
from ..config import RowSpec
from ..objective import SHIFT_FLOOR, accumulation_dtype

# Elements of a block of rows: about a megabyte on a CPU; on a device enough to occupy it.
BLOCK_ELEMENTS = {"cpu": 2**18}
DEVICE_BLOCK_ELEMENTS = 2**26
# Labels as a rank sees them: the row is not valid, or it is valid and its label is a column of another rank.
IGNORED, ELSEWHERE = -1, -2
# Columns of the packed sums: how many ranks hold the maximum, the label's shift, then the A_kj.
NUM_MAXIMA, LABEL, RESIDUAL, FIRST_MOMENT, MOMENTS = range(5)
ARGMAX = objective.STATISTICS.index("argmax")


def moment_columns(spec: RowSpec) -> list[tuple[int, slice]]:
    """For each power k of e^y: k, and the columns of A_k0, A_k1, ... in the packed sums."""
    columns = [(1, slice(RESIDUAL, FIRST_MOMENT + 1))]
    if spec.is_one_pass:
        alpha, beta = int(spec.alpha), int(spec.beta)
        starts = (MOMENTS + b * (alpha + 1) for b in range(beta + 1))
        columns += [(alpha + b, slice(start, start + alpha + 1)) for b, start in enumerate(starts)]
    return columns


def packed_columns(spec: RowSpec) -> int:
    """Number of float64 values per row in the SUM; with label smoothing the last is the sum of the logits."""
    return moment_columns(spec)[-1][1].stop + bool(spec.smoothed)


def blocks(logits: Tensor, device_elements: int = DEVICE_BLOCK_ELEMENTS):
    """Slices of rows, each a block."""
    limit = BLOCK_ELEMENTS.get(logits.device.type, device_elements)
    size = max(1, limit // max(logits.size(1), 1))
    return [slice(start, start + size) for start in range(0, logits.size(0), size)]


class LocalStats(NamedTuple):
    """The statistics of the columns of N rows that one rank holds."""

    maximum: Tensor  # (N,) of this rank's columns; NaN or -inf if they have none
    argmax: Tensor  # (N,) int64
    sums: Tensor  # (N, packed_columns) float64, seen from the own maximum


def local_sums(logits: Tensor, labels: Tensor, spec: RowSpec) -> LocalStats:
    """The sums of ``logits`` (N, V_local); rows whose label is ``IGNORED`` may hold anything."""
    dtype, (rows, columns) = accumulation_dtype(logits.dtype), logits.shape
    maximum = torch.full((rows,), -math.inf, dtype=dtype, device=logits.device)
    argmax = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    sums = torch.zeros((rows, packed_columns(spec)), dtype=torch.float64, device=logits.device)
    for block in blocks(logits) if columns else []:
        # A row that is not valid may hold anything.
        values = torch.where((labels[block] == IGNORED)[:, None], 0.0, logits[block].to(dtype))
        maximum[block], argmax[block] = values.max(-1)
        if spec.smoothed:
            sums[block, -1] = values.sum(-1, dtype=torch.float64)
        origin = maximum[block].nan_to_num(math.nan, 0.0, 0.0)
        shift = values - origin[:, None]
        shift = torch.where(shift < SHIFT_FLOOR, SHIFT_FLOOR, shift)
        weight = shift.exp().scatter_(-1, argmax[block, None], 0.0)
        power, reached = weight, 1
        for exponent, place in moment_columns(spec):
            for _ in range(exponent - reached):
                power = power * weight
            reached, term = exponent, power
            for column in range(place.start, place.stop):
                term = term if column == place.start else term * shift
                sums[block, column] = term.sum(-1, dtype=torch.float64)
    return LocalStats(maximum, argmax, sums)


def packed_sums(
    logits: Tensor, labels: Tensor, local: LocalStats, maximum: Tensor, is_owner: Tensor, spec: RowSpec
) -> Tensor:
    """What a rank adds to the SUM: its sums as seen from the row's maximum, and the label's shift if it is here."""
    delta = (local.maximum.double() - maximum.double()).nan_to_num(math.nan, SHIFT_FLOOR, SHIFT_FLOOR)
    sums = local.sums.clone()
    for exponent, place in moment_columns(spec):
        moments = sums[:, place]
        moments[:, 0] += ~is_owner  # seen from a larger maximum, the own maximum is an ordinary column
        sums[:, place] = _moved(moments, exponent, delta)
    sums[:, NUM_MAXIMA] = is_owner
    if logits.size(1):
        label = logits.gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1).double() - maximum.double()
        sums[:, LABEL] = torch.where(labels >= 0, label, 0.0)
    return sums


def _moved(moments: Tensor, exponent: int, delta: Tensor) -> Tensor:
    """A_k0, A_k1, ... (N, P) when every y becomes y + delta."""
    powers = [torch.ones_like(delta)]
    for _ in range(moments.size(1) - 1):
        powers.append(powers[-1] * delta)
    columns = [
        sum(math.comb(j, i) * powers[j - i] * moments[:, i] for i in range(j + 1)) for j in range(moments.size(1))
    ]
    return torch.stack(columns, -1) * (exponent * delta).exp()[:, None]


class TopKStats(NamedTuple):
    """The three columns of objective.TOP_K_STATISTICS, (N, 1) each."""

    num_kept: Tensor
    threshold: Tensor
    tie_weight: Tensor

    def weights(self, logits: Tensor, rows: slice) -> Tensor:
        """w of each element of ``logits``, which are the ``rows``."""
        values, threshold = logits.to(self.threshold.dtype), self.threshold[rows]
        above = (values > threshold).to(values.dtype)
        return torch.where(values == threshold, self.tie_weight[rows], above)


class RowTotals(NamedTuple):
    """The totals over all columns of N rows, in float64."""

    maximum: Tensor  # (N,) in the accumulation dtype
    residual: Tensor  # NaN for a row without a softmax
    mean_shift: Tensor
    offset: Tensor  # c
    stored: Tensor  # r as the backward will find it, and the c that follows
    stored_offset: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, maximum: Tensor, sums: Tensor, spec: RowSpec, dtype: torch.dtype) -> RowTotals:
        """From the total sums."""
        residual = torch.where(torch.isfinite(maximum), sums[:, RESIDUAL], torch.nan)
        mean_shift = sums[:, FIRST_MOMENT] / (1 + residual)
        stored = residual.to(dtype).double()
        offset, stored_offset = (objective.log_ratio_offset(r, spec.vocab_size) for r in (residual, stored))
        return cls(maximum, residual, mean_shift, offset, stored, stored_offset.to(dtype).double(), dtype)

    def at(self, rows: slice) -> RowTotals:
        """Some of the rows."""
        return RowTotals(*(value[rows] for value in self[:-1]), self.dtype)

    def top(self, spec: RowSpec) -> tuple[Tensor, Tensor]:
        """f and p f' of a column at the maximum."""
        d = 1 + self.residual
        density = objective.sced_density(1 / d, -self.offset, self.residual / d, spec.alpha, spec.beta)
        slope = objective.sced_slope(1 / d, -self.offset, self.residual / d, spec.alpha, spec.beta)
        return density, slope / self.residual

    def from_moments(self, sums: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
        """SCED without the maximum, and G."""
        alpha, beta = int(spec.alpha), int(spec.beta)
        sced = slope_sum = torch.zeros_like(self.residual)
        for b, (exponent, place) in enumerate(moment_columns(spec)[1:]):
            factor = (-1) ** b * math.comb(beta, b)
            moments = sums[:, place]
            sced = sced + factor * _centred(moments, exponent, alpha, self.offset, self.residual)
            slope = exponent * _centred(moments, exponent, alpha, self.stored_offset, self.stored)
            slope = slope + alpha * _centred(moments, exponent, alpha - 1, self.stored_offset, self.stored)
            slope_sum = slope_sum + factor * slope
        return sced, slope_sum

    def finish(
        self,
        rest: Tensor,
        slope_sum: Tensor,
        argmax: Tensor,
        label_shift: Tensor,
        top_k: TopKStats | None,
        spec: RowSpec,
    ) -> tuple[Tensor, Tensor]:
        """Terms (N, 3) and statistics (N, S)."""
        ce = torch.log1p(self.residual) - label_shift
        kl = self.mean_shift - self.offset
        one_hot = objective.one_hot_rows(self.stored.to(self.dtype))
        sced = torch.zeros_like(kl)
        if spec.with_sced:
            limit = self.offset.abs() ** spec.alpha if spec.beta == 0 else sced
            sced = torch.where(one_hot, limit, rest + self.top(spec)[0])
        sced = torch.where(self.residual.isnan() & spec.with_sced, torch.nan, sced)
        slope_sum = torch.where(one_hot, 0.0, slope_sum)
        terms = torch.stack((ce, sced, kl), -1).to(self.dtype)
        columns = (self.maximum, argmax, self.residual, self.mean_shift, slope_sum)
        stats = torch.stack([column.to(self.dtype) for column in columns], -1)
        if top_k is not None:
            top_k_stats = torch.where(self.residual.isnan()[:, None], torch.nan, torch.cat(top_k, -1))
            stats = torch.cat((stats, top_k_stats), -1)
        return terms, stats


def _centred(moments: Tensor, exponent: int, power: int, offset: Tensor, residual: Tensor) -> Tensor:
    """sum p^k L^j from A_k0 .. A_kj, for p = e^y / (1 + r) and L = y - c."""
    terms = (math.comb(power, i) * (-offset) ** (power - i) * moments[:, i] for i in range(power + 1))
    return sum(terms) / (1 + residual) ** exponent


class Columns(NamedTuple):
    """A block of this rank's columns, seen from the whole row; (n, V_local) each, in the accumulation dtype."""

    shift: Tensor
    weight: Tensor  # e^y, 0 in the arg-max column
    is_top: Tensor
    p: Tensor  # 0 in the arg-max column
    log_ratio: Tensor
    q: Tensor
    carries: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, argmax: Tensor, row: RowTotals) -> Columns:
        """From the totals of the rows; a row that is not valid reads as 0."""
        values = torch.where((labels == IGNORED)[:, None], 0.0, logits.to(row.dtype))
        shift = values - row.maximum[:, None]
        shift = torch.where(shift < SHIFT_FLOOR, SHIFT_FLOOR, shift)
        is_top = torch.arange(values.size(1), device=values.device) == argmax[:, None]
        weight = torch.where(is_top, 0.0, shift.exp())
        residual, offset = (value.to(row.dtype)[:, None] for value in (row.stored, row.stored_offset))
        carries = weight > 0
        p = weight / (1 + residual)
        # Where a column carries no weight, any finite value will do.
        log_ratio = torch.where(carries, shift - offset, 1.0)
        return cls(shift, weight, is_top, p, log_ratio, 1 - p, carries)

    def slopes(self, spec: RowSpec) -> Tensor:
        """p f' of every column but the arg-max."""
        slope = objective.sced_slope(self.p, self.log_ratio, self.q, spec.alpha, spec.beta)
        return torch.where(self.carries, self.p * slope / self.q, 0.0)


def column_gradient(logits: Tensor, labels: Tensor, grad_terms: Tensor, stats: Tensor, spec: RowSpec) -> Tensor:
    """Counterpart of objective.row_gradient for some of a row's columns, with the sums from the statistics."""
    maximum, argmax, residual, mean_shift, slope_sum = stats[:, : len(objective.STATISTICS)].unbind(-1)
    offset = objective.log_ratio_offset(residual.double(), spec.vocab_size).to(stats.dtype).double()
    row = RowTotals(maximum, residual.double(), mean_shift, offset, residual, offset, stats.dtype)
    part = Columns.of(logits, labels, argmax, row)
    grad_ce, grad_sced, grad_kl, *extra = grad_terms.unsqueeze(1).unbind(-1)
    p = torch.where(part.is_top, 1 / (1 + residual[:, None]), part.p)
    q_top = (residual / (1 + residual))[:, None]
    is_label = torch.arange(p.size(1), device=p.device) == labels[:, None]
    ce_slope = torch.where(is_label, torch.where(part.is_top, -q_top, p - 1), p)
    gradient = grad_kl * p * (part.shift - mean_shift[:, None]) + grad_ce * ce_slope
    if spec.with_sced:
        top_slope, slopes = (row.top(spec)[1] * residual / (1 + residual)).to(stats.dtype)[:, None], part.slopes(spec)
        if spec.is_masked:
            top_k = TopKStats(*(column[:, None] for column in stats[:, len(objective.STATISTICS) :].unbind(-1)))
            slopes = slopes * top_k.weights(logits, slice(None))
            top_slope = top_slope * top_k.weights(maximum[:, None], slice(None))
        one_hot = objective.one_hot_rows(residual)[:, None]
        rest = slopes - part.weight / torch.where(one_hot, 1.0, residual[:, None]) * top_slope
        sced = torch.where(part.is_top, top_slope, rest) - p * slope_sum[:, None]
        gradient = gradient + grad_sced * torch.where(one_hot, 0.0, sced)
    gradient = gradient + (extra[0] * p + extra[1]) if extra else gradient
    return torch.where((labels == IGNORED)[:, None], 0.0, gradient).to(logits.dtype)
