r"""The mathematics of the CAREF objective (arXiv 2605.27835), once, in plain torch.

One row of logits z over V columns: p = softmax(z), U = 1/V, L = log(p/U), H = -sum p log p, label t.

    CE   = -log p_t
    SCED = sum_v (p_v |L_v|)^alpha (1 - p_v)^beta           Eq. 2, with 0 log 0 = 0 and no epsilon
    KL   = sum_v p_v L_v = log V - H
    loss = CE + lambda_sced * SCED + lambda_kl * KL

Two terms are not of the paper: the z-loss lse^2 with lse = log sum_v e^{z_v}, and, for label smoothing with a share s,
the cross-entropy against the uniform distribution over all columns, CE_u = -(1/V) sum_v log p_v: the loss has
lambda_z lse^2, and (1 - s) CE + s CE_u in place of CE.

**The form that is computed.**  With m = max z, a its first column, y = z - m:

    r = sum_{v != a} e^{y_v}     d = 1 + r     c = log(d / V)     p = e^y / d     L = y - c     1 - p_a = r / d
    CE = log1p(r) - y_t          ybar = sum p y         H = log1p(r) - ybar       KL = ybar - c

The largest column is left out of the sum, and the single number ``lse = m + log d`` is never formed.  When p_a is close
to 1 all the information is in r, and ``d = 1 + r`` has already lost it: with 1 - p_a < 1e-7 every form that starts from
``lse`` or ``d`` in float32 is wrong by 100 %.  Only the arg-max column can have p > 1/2, so only one column needs the
special form.  It must be exactly one column: rows with a tied maximum keep the other tied columns in r.

**The gradient.**  Write f(p) = (p|L|)^alpha (1-p)^beta, f' = df/dp (``sced_slope`` is q f') and
G = sum_{v != a} p_v f'_v.

    dSCED/dz_j = p_j (f'_j - G - p_a f'_a)      j != a
    dSCED/dz_a = p_a (q_a f'_a - G)             q_a = r / d
    dKL/dz_j   = p_j (y_j - ybar)               no log V and no cancellation
    dCE/dz_j   = p_j - [j = t],  and -q_a for j = t = a
    d lse^2/dz_j = 2 lse p_j     and  dCE_u/dz_j = p_j - 1/V

With a top-k mask w (sparsity.py) SCED = sum_v w_v f(p_v), and w_v f'_v takes the place of f'_v everywhere: columns
outside the mask still receive the softmax term.

For beta < 1, f'_a grows like q_a^(beta-1) while p_j shrinks like q_a; the product is formed as
(e_j / r) * (q_a p_a f'_a), whose two factors stay in range.

**What SCED does.**  Its gradient raises a confident arg-max further and flattens undecided rows; for a single dominant
token the switch is at p = 2(L+1)/(3L+2) for alpha = 2, beta = 1 (0.69 at V = 49,152).  It is a barrier around that
point, not a monotone penalty on confidence.

These functions are differentiable twice and run on any device; the fused backends are tested against them in float64.
The row formulas in C++, CUDA and Triton carry the names of their counterparts here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import RowSpec
from .sparsity import TopKMask, row_num_kept, top_k_mask

# Columns of the per-row terms and statistics that every backend returns.
TERMS = ("ce", "sced", "kl")
STATISTICS = ("maximum", "argmax", "residual", "mean_shift", "slope_sum")
MAXIMUM, RESIDUAL = STATISTICS.index("maximum"), STATISTICS.index("residual")
TOP_K_STATISTICS = ("num_kept", "threshold", "tie_weight")  # further columns of rows with a top-k mask
EXTRA_TERMS = ("z_loss", "uniform_ce")  # further columns of the terms with a z-loss or label smoothing

# y is clamped here from below (with a select, so that NaN passes): e^y is 0 there, and y * e^y must be 0, not NaN.
SHIFT_FLOOR = -1.0e4
# Below this residual a row counts as one-hot: SCED is its limit, 0 (or (log V)^alpha for beta = 0), with gradient 0.
ONE_HOT_RESIDUAL = {torch.float32: 1e-37, torch.float64: 1e-290}
# Statistics hold the arg-max column as a float; float32 counts exactly up to here.
MAX_COLUMNS = 2**24


class ShiftedRows(NamedTuple):
    """A block of N rows and V columns, relative to the maxima of the rows."""

    shift: Tensor  # (N, V) y = z - m, clamped at SHIFT_FLOOR
    weight: Tensor  # (N, V) e^y, with 0 in the arg-max column
    is_top: Tensor  # (N, V) bool, True in the arg-max column
    maximum: Tensor  # (N, 1) m; +-inf or NaN marks a row without a softmax
    argmax: Tensor  # (N, 1) int64
    residual: Tensor  # (N, 1) r
    raw_shift: Tensor  # (N, V) y before the clamp, for the cross-entropy of unlikely labels
    top_k: TopKMask | None = None


def statistics_of(spec: RowSpec) -> tuple[str, ...]:
    """The columns of the row statistics for ``spec``."""
    return STATISTICS + TOP_K_STATISTICS if spec.is_masked else STATISTICS


def terms_of(spec: RowSpec) -> tuple[str, ...]:
    """The columns of the row terms for ``spec``."""
    return TERMS + EXTRA_TERMS if spec.is_extended else TERMS


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of terms, statistics and all arithmetic for logits of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shift_rows(logits: Tensor) -> ShiftedRows:
    """``logits`` (N, V), float32 or float64, relative to the maxima of their rows; differentiable."""
    argmax = logits.argmax(-1, keepdim=True)
    maximum = logits.gather(-1, argmax)
    raw_shift = logits - maximum  # not detached: every term is exactly a function of these differences
    shift = torch.where(raw_shift < SHIFT_FLOOR, SHIFT_FLOOR, raw_shift)
    is_top = torch.arange(logits.size(-1), device=logits.device) == argmax
    weight = torch.where(is_top, 0.0, shift.exp())
    residual = weight.sum(-1, keepdim=True)
    residual = torch.where(torch.isfinite(maximum), residual, torch.nan)
    return ShiftedRows(shift, weight, is_top, maximum, argmax, residual, raw_shift)


def with_top_k(rows: ShiftedRows, logits: Tensor, spec: RowSpec) -> ShiftedRows:
    """``rows`` of ``logits`` with the top-k mask of ``spec``; as they are if it has none."""
    if not spec.is_masked:
        return rows
    row_entropy = entropy(rows.residual, _mean_shift(rows)).detach()
    return rows._replace(top_k=top_k_mask(logits.detach(), row_num_kept(row_entropy, spec.top_k)))


def log_ratio_offset(residual: Tensor, vocab_size: int) -> Tensor:
    """c = log((1 + r) / V), so that log(p/U) = y - c."""
    return torch.log((1 + residual) / vocab_size)


def per_item(total: Tensor, items: Tensor) -> Tensor:
    """total / items; for 0 items a total of 0 is 0, any other one infinite."""
    return torch.where(total == 0, total, total / items)


def entropy(residual: Tensor, mean_shift: Tensor) -> Tensor:
    """H = log1p(r) - ybar in nats: two terms of one sign, so accurate down to H = 1e-9."""
    return torch.log1p(residual) - mean_shift


def log_sum_exp(maximum: Tensor, residual: Tensor) -> Tensor:
    """lse = m + log1p(r); for the terms that are about it, never as a step to another one."""
    return maximum + torch.log1p(residual)


def extra_terms(maximum: Tensor, residual: Tensor, mean_of_shifts: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of ``EXTRA_TERMS``: lse^2, and CE_u from the mean over all columns of y, which no p weights."""
    return log_sum_exp(maximum, residual) ** 2, torch.log1p(residual) - mean_of_shifts


def column_grads(grad_terms: Tensor, maximum: Tensor, residual: Tensor, spec: RowSpec) -> Tensor:
    """What the gradient of a row takes in place of ``grad_terms`` (N, 5), which has the extra terms.

    (N, 5): the gradients of CE, SCED and KL, the factor of p_v, and a constant of every column.
    """
    grad_ce, grad_sced, grad_kl, grad_z, grad_uniform = grad_terms.unbind(-1)
    factor = 2 * log_sum_exp(maximum, residual) * grad_z + grad_uniform
    return torch.stack((grad_ce, grad_sced, grad_kl, factor, -grad_uniform / max(spec.smoothed, 1)), -1)


def sced_density(p: Tensor, log_ratio: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    """f = (p |L|)^alpha q^beta with q = 1 - p."""
    density = (p * log_ratio.abs()) ** alpha
    return density if beta == 0 else density * q**beta


def sced_slope(p: Tensor, log_ratio: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    """q f' = (p|L|)^(alpha-1) q^beta [alpha sgn(L) (L+1) q - beta p |L|], with f' = df/dp and sgn(0) = 0.

    The factor q keeps the power of q at beta instead of beta - 1, so the value is finite on confident rows.
    """
    t = p * log_ratio.abs()
    slope = alpha * torch.sign(log_ratio) * (log_ratio + 1) * q - beta * t
    if alpha != 1:
        slope = t ** (alpha - 1) * slope
    return slope if beta == 0 else slope * q**beta


def row_statistics(rows: ShiftedRows, spec: RowSpec) -> Tensor:
    """(N, S): what the backward needs, in the order of :func:`statistics_of`."""
    mean_shift = _mean_shift(rows)
    slope_sum = _slope_sum(rows, spec) if spec.with_sced else torch.zeros_like(mean_shift)
    columns = (rows.maximum, rows.argmax.to(rows.shift.dtype), rows.residual, mean_shift, slope_sum)
    if rows.top_k is not None:
        columns = (*columns, torch.where(rows.residual.isnan(), torch.nan, rows.top_k.statistics()))
    return torch.cat(columns, -1)


def row_terms(rows: ShiftedRows, labels: Tensor | None, spec: RowSpec) -> Tensor:
    """(N, 3): CE, SCED and KL of each row; CE is 0 without labels.  ``labels`` (N,) int64, inside [0, V)."""
    offset = log_ratio_offset(rows.residual, spec.vocab_size)
    kl = _mean_shift(rows) - offset
    if labels is None:
        ce = torch.zeros_like(kl)
    else:
        ce = torch.log1p(rows.residual) - rows.raw_shift.gather(-1, labels[:, None])
    sced = _sced(rows, offset, spec) if spec.with_sced else torch.zeros_like(kl)
    return torch.cat((ce, sced, kl), -1)


def row_gradient(rows: ShiftedRows, labels: Tensor | None, grad_terms: Tensor, spec: RowSpec) -> Tensor:
    """(N, V): gradient of sum(grad_terms * row_terms) with respect to the logits, in closed form.

    ``grad_terms`` (N, 3), or (N, 5) of :func:`column_grads`.  Differentiable again, for a second derivative by the
    reference, and more accurate than differentiating ``row_terms``, whose KL gradient would cancel near uniform.
    """
    grad_ce, grad_sced, grad_kl, *extra = grad_terms.unsqueeze(1).unbind(-1)
    p = _probability(rows)
    gradient = grad_kl * p * (rows.shift - _mean_shift(rows))
    if labels is not None:
        q_top = rows.residual / (1 + rows.residual)
        is_label = torch.arange(p.size(-1), device=p.device) == labels[:, None]
        ce_slope = torch.where(is_label, torch.where(rows.is_top, -q_top, p - 1), p)
        gradient = gradient + grad_ce * ce_slope
    if spec.with_sced:
        gradient = gradient + grad_sced * _sced_gradient(rows, p, spec)
    return gradient + (extra[0] * p + extra[1]) if extra else gradient


def one_hot_rows(residual: Tensor) -> Tensor:
    """True for the rows whose residual is too small to carry a derivative."""
    return residual < ONE_HOT_RESIDUAL[residual.dtype]


def _probability(rows: ShiftedRows) -> Tensor:
    weight = torch.where(rows.is_top, 1.0, rows.weight)
    return weight / (1 + rows.residual)


def _mean_shift(rows: ShiftedRows) -> Tensor:
    return (rows.weight * rows.shift).sum(-1, keepdim=True) / (1 + rows.residual)


def _rest(rows: ShiftedRows, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """p and L of the columns that carry weight, and which those are; the arg-max column does not.

    The others get harmless values: an unused branch of a select must be finite for its derivatives to vanish.
    """
    carries = rows.weight > 0
    p = rows.weight / (1 + rows.residual)
    log_ratio = rows.shift - log_ratio_offset(rows.residual, spec.vocab_size)
    return torch.where(carries, p, 0.5), torch.where(carries, log_ratio, 1.0), carries


def _top(rows: ShiftedRows, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, L and 1 - p of the arg-max column, and which rows are one-hot (their 1 - p is replaced by 1/2)."""
    one_hot = one_hot_rows(rows.residual)
    residual = torch.where(one_hot, 1.0, rows.residual)  # keeps the unused branch of the select finite
    q = residual / (1 + residual)
    return 1 / (1 + rows.residual), -log_ratio_offset(rows.residual, spec.vocab_size), q, one_hot


def _masked(rows: ShiftedRows, values: Tensor) -> Tensor:
    """w times ``values`` (N, V)."""
    return values if rows.top_k is None else rows.top_k.weight * values


def _masked_top(rows: ShiftedRows, values: Tensor) -> Tensor:
    """w of the arg-max column times ``values`` (N, 1)."""
    return values if rows.top_k is None else rows.top_k.weight.gather(-1, rows.argmax) * values


def _sced(rows: ShiftedRows, offset: Tensor, spec: RowSpec) -> Tensor:
    p, log_ratio, carries = _rest(rows, spec)
    density = sced_density(p, log_ratio, 1 - p, spec.alpha, spec.beta)
    rest = _masked(rows, torch.where(carries, density, 0.0)).sum(-1, keepdim=True)
    p_top, log_ratio_top, q_top, one_hot = _top(rows, spec)
    top = _masked_top(rows, sced_density(p_top, log_ratio_top, q_top, spec.alpha, spec.beta))
    limit = (-offset).abs() ** spec.alpha if spec.beta == 0 else torch.zeros_like(top)
    return torch.where(one_hot, limit, rest + top)


def _slopes(rows: ShiftedRows, spec: RowSpec) -> Tensor:
    p, log_ratio, carries = _rest(rows, spec)
    q = 1 - p
    slope = sced_slope(p, log_ratio, q, spec.alpha, spec.beta)
    return _masked(rows, torch.where(carries, p * slope / q, 0.0))


def _slope_sum(rows: ShiftedRows, spec: RowSpec) -> Tensor:
    return torch.where(one_hot_rows(rows.residual), 0.0, _slopes(rows, spec).sum(-1, keepdim=True))


def _sced_gradient(rows: ShiftedRows, p: Tensor, spec: RowSpec) -> Tensor:
    slopes = _slopes(rows, spec)
    slope_sum = slopes.sum(-1, keepdim=True)
    p_top, log_ratio_top, q_top, one_hot = _top(rows, spec)
    top_slope = _masked_top(rows, p_top * sced_slope(p_top, log_ratio_top, q_top, spec.alpha, spec.beta))
    share = rows.weight / torch.where(one_hot, 1.0, rows.residual)
    rest = slopes - p * slope_sum - share * top_slope
    gradient = torch.where(rows.is_top, top_slope - p * slope_sum, rest)
    return torch.where(one_hot, 0.0, gradient)
