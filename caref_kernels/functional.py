"""The public functions: check the arguments, see the logits as rows, call the autograd node, name the results."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, dtensors, objective
from .autograd import CarefFunction, Plan
from .backends.reference import labelled
from .checks import check_inplace, check_labels, check_logits, check_order, check_valid, describe
from .config import CarefConfig, Reduction, RowSpec
from .sparsity import Sparsity

_POSITIVE = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}


class CarefOutput(NamedTuple):
    """The loss and its terms, all reduced alike; shapes () for "mean" and "sum", those of the labels for "none".

    ``loss``, ``ce``, ``sced`` and ``kl`` are differentiable, so that a script may weigh the terms itself;
    ``entropy`` (nats) is not: it is ``log V - kl``.  ``accuracy`` is 1 where the largest logit, the first of several,
    is that of the label; ``None`` where ranks share the row.  ``support`` is k_t, the number of tokens in a row's mask;
    ``None`` without ``sparsity``.
    """

    loss: Tensor
    ce: Tensor
    sced: Tensor
    kl: Tensor
    entropy: Tensor
    accuracy: Tensor | None = None
    support: Tensor | None = None


def fused_sced(
    logits: Tensor,
    *,
    valid: Tensor | None = None,
    alpha: float = CarefConfig.alpha,
    beta: float = CarefConfig.beta,
    sparsity: Sparsity | None = CarefConfig.sparsity,
    reduction: Reduction = CarefConfig.reduction,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = CarefConfig.vocab_size,
    backend: str = CarefConfig.backend,
    inplace_backward: bool = CarefConfig.inplace_backward,
) -> Tensor:
    r"""SCED regulariser of the CAREF objective, fused over the vocabulary.

    .. math:: L = \sum_t \sum_v |p_{tv} \log(p_{tv} / U)|^\alpha (1 - p_{tv})^\beta,  \quad U = 1/V

    (arXiv 2605.27835, Eq. 2, exactly: 0 log 0 = 0 and no epsilon inside the logarithm.)

    Args:
        logits: ``(..., V)``, float16, bfloat16, float32 or float64, at least 2-D.  Any strides: copied only if the last
            one is not 1, or if more than two leading dimensions do not collapse.
        valid: ``(...)``, bool or integer; rows with 0 contribute nothing and get a zero gradient, whatever they hold.
        alpha: in [1, 16].
        beta: 0, or in [0.1, 16].
        sparsity: the tokens that count: ``None``, all of them, as in the equation; :class:`caref_kernels.TopK`, the k
            largest logits; :class:`caref_kernels.EntropyTopK`, as many as the row's entropy asks for.  Tied logits at
            the k-th place share what is left of k.
        reduction: ``"mean"`` over the valid rows, ``"sum"`` or ``"none"``.
        num_items: divisor that replaces the number of valid rows in ``"mean"``: a number >= 0, or a 0-D tensor, whose
            value is not read from a device.  0 is for a rank or a micro-batch without a valid row: loss and gradient
            are 0.  With valid rows 0 is an error on the CPU; on a device the loss is infinite, with a zero gradient.
        vocab_size: V of U = 1/V, in [1, 10 * columns]; by default the number of columns.
        backend: ``"auto"`` or a name from :func:`caref_kernels.explain`.
        inplace_backward: write the gradient into the memory of ``logits`` (an intermediate result that nothing else
            needs); its version counter is raised, so that a later use of its value is an autograd error.  Hooks under
            which another operator saved ``logits`` cannot be seen here and must have copied them.
    Returns:
        A scalar, or ``(...)`` for ``"none"``; float32 (float64 for float64 logits), in nats**alpha.  ``"mean"`` over no
        row is NaN with a zero gradient.
    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a shape or a range mismatch; the message gives both values.
        NotImplementedError: an explicit backend that cannot run (with its reason), or a torch.func transform.
        RuntimeError: ``inplace_backward`` under saved-tensor hooks (non-reentrant checkpointing, offloading).
    Precision: accumulates in float32 or better; relative error below 1e-5, gradient row norms below 2e-5, also where
        1 - p = 1e-12, given k_t; ceil(scale * exp(H)) itself may differ by one from one backend to another.
        Deterministic: the same bits on every run and for any number of threads.
    Compilation: one graph under torch.compile; exponents, weights of terms and ``num_items`` may change from call to
        call, as in a warm-up, at the price of one compilation more.
    Memory: saves the logits and (N, 5) row statistics, (N, 8) with a mask; the backward makes the gradient, or nothing
        if in place.
    """
    config = CarefConfig(
        alpha=alpha,
        beta=beta,
        lambda_sced=1.0,
        lambda_kl=0.0,
        sparsity=sparsity,
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
        inplace_backward=inplace_backward,
    )
    return sced_from_config(logits, valid, num_items, config)


def caref_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = CarefConfig.alpha,
    beta: float = CarefConfig.beta,
    lambda_sced: float = CarefConfig.lambda_sced,
    lambda_kl: float = CarefConfig.lambda_kl,
    sparsity: Sparsity | None = CarefConfig.sparsity,
    ignore_index: int = CarefConfig.ignore_index,
    reduction: Reduction = CarefConfig.reduction,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = CarefConfig.vocab_size,
    backend: str = CarefConfig.backend,
    inplace_backward: bool = CarefConfig.inplace_backward,
    return_terms: bool = CarefConfig.return_terms,
) -> Tensor | CarefOutput:
    r"""The CAREF objective, CE + lambda_sced * SCED + lambda_kl * KL(p || U), in one pass over the logits.

    arXiv 2605.27835; the terms are defined in :mod:`caref_kernels.objective`.  Rows are not shifted: for a causal model
    pass labels already moved by one position.

    Args:
        logits: as in :func:`fused_sced`.
        labels: ``(...)``, int32 or int64 class indices, on the device of the logits.
        lambda_sced: weight of SCED, finite and >= 0; 0 skips its work.
        lambda_kl: weight of KL, finite and >= 0.
        ignore_index: label of the rows that are left out of every term.
        return_terms: return :class:`CarefOutput` (loss, ce, sced, kl, entropy, accuracy, support).
        alpha, beta, sparsity, reduction, num_items, vocab_size, backend, inplace_backward: as in :func:`fused_sced`.
    Returns:
        The loss, or :class:`CarefOutput`; float32 (float64 for float64 logits), in nats.
    Raises:
        IndexError: on the CPU, a label that is neither in [0, V) nor ``ignore_index``; elsewhere such a row is NaN.
        TypeError, ValueError, NotImplementedError: as in :func:`fused_sced`.
    Precision, Compilation, Memory: as in :func:`fused_sced`.
    """
    config = CarefConfig(
        alpha=alpha,
        beta=beta,
        lambda_sced=lambda_sced,
        lambda_kl=lambda_kl,
        sparsity=sparsity,
        ignore_index=ignore_index,
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
        inplace_backward=inplace_backward,
        return_terms=return_terms,
    )
    return caref_from_config(logits, labels, num_items, config)


def sced_from_config(logits: Tensor, valid: Tensor | None, num_items: float | Tensor | None, config: CarefConfig):
    """:func:`fused_sced` with its options already in a configuration (the lambdas are not read)."""
    check_logits("logits", logits, "fused_sced")
    mask = None if valid is None else check_valid(valid, logits)
    loss, *_ = _run(logits, mask, num_items, config, (0.0, 1.0, 0.0))
    return loss


def caref_from_config(logits: Tensor, labels: Tensor, num_items: float | Tensor | None, config: CarefConfig):
    """:func:`caref_loss` with its options already in a configuration."""
    check_order(logits, labels, labels, ("logits", "labels"), "caref_loss takes (logits, labels)")
    check_logits("logits", logits, "caref_loss")
    labels = check_labels(labels, logits)
    weights = (1.0, float(config.lambda_sced), float(config.lambda_kl))
    return name_results(*_run(logits, labels, num_items, config, weights), labels, config)


def name_results(  # noqa: PLR0913
    loss: Tensor, terms: Tensor, stats: Tensor, divisor: Divisor, targets: Tensor | None, config: CarefConfig
):
    """The loss, or the loss with its terms, as the configuration asks; without ``targets`` there is no accuracy."""
    if not config.return_terms:
        return loss
    shape = loss.shape
    residual, mean_shift, argmax = (
        stats[:, objective.STATISTICS.index(name)] for name in ("residual", "mean_shift", "argmax")
    )
    observed = {"entropy": objective.entropy(residual, mean_shift)}
    if targets is not None:
        is_correct = (argmax == targets) & labelled(targets, config.ignore_index)
        observed["accuracy"] = is_correct.to(stats.dtype)
    if config.sparsity is not None:
        observed["support"] = stats[:, len(objective.STATISTICS) + objective.MASK_STATISTICS.index("support")]
    if config.reduction != "none":
        observed = {name: divisor.divide(value.sum()) for name, value in observed.items()}
    observed = {name: value.reshape(shape) for name, value in observed.items()}
    return CarefOutput(loss, *(value.reshape(shape) for value in terms.unbind(-1)), **observed)


def _run(logits: Tensor, targets: Tensor | None, num_items: float | Tensor | None, config: CarefConfig, weights):
    rows = _as_rows(logits)
    spec, weights, *operands = settled(config.row_spec(rows.size(-1)), weights, logits)
    name = backends.select(config.backend, rows, spec)
    if config.inplace_backward:
        check_inplace(logits, rows)
    divisor = divisor_of(logits, targets, num_items, config)
    per_row = config.reduction == "none"
    plan = Plan(spec, name, weights, per_row, divisor.any_items, config.inplace_backward)
    loss, terms, stats = CarefFunction.apply(rows, targets, divisor.value, *operands, plan)
    return loss.reshape(logits.shape[:-1]) if per_row else loss, terms, stats, divisor


def settled(spec: RowSpec, weights: tuple[float, float, float], logits: Tensor):
    """(spec, weights, varying, numbers): what compiled code gets as a number that changes between calls as a tensor.

    Dynamo takes such a number for a constant at first, then for one that changes; an operator that took it as a number
    would make it a constant again, and every new value would compile the function anew.  ``varying`` and ``numbers``
    are those of ops.py, or ``None``.
    """
    if not torch.compiler.is_compiling():
        return spec, weights, None, None
    varying = _changing(weights, objective.accumulation_dtype(logits.dtype), logits.device)
    numbers = _changing((spec.alpha, spec.beta, spec.k_scale), torch.float64, torch.device("cpu"))
    if numbers is not None:
        spec = spec._replace(alpha=2.0, beta=1.0, k_scale=1.0)
    return spec, weights if varying is None else (1.0, 1.0, 1.0), varying, numbers


def _changing(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """``values`` as a tensor if one of them is no constant to the compiler."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # late: it imports sympy, as the compiler does

    if all(has_static_value(value) for value in values):
        return None
    one = torch.ones((), dtype=dtype, device=device)
    return torch.stack([one * value for value in values])


def _as_rows(logits: Tensor) -> Tensor:
    """(N, V) or (B, T, V) with last stride 1; a copy only where no such view exists."""
    if logits.stride(-1) != 1 and logits.size(-1) > 1:
        logits = logits.contiguous()
    return logits if logits.dim() <= 3 else logits.reshape(-1, logits.size(-1))


class Divisor(NamedTuple):
    """What the sums over rows are divided by: a 0-D tensor, ``None`` for "sum" and "none".

    A mean over no row is NaN.  With ``any_items`` the value is a number of items that nobody has read: if it is 0, the
    loss is 0 where no row counts, and infinite elsewhere.
    """

    value: Tensor | None
    any_items: bool = False

    def divide(self, total: Tensor) -> Tensor:
        """A sum over rows, divided."""
        if self.value is None:
            return total
        return objective.per_item(total, self.value) if self.any_items else total / self.value


def divisor_of(logits: Tensor, targets: Tensor | None, num_items, config: CarefConfig) -> Divisor:
    """The divisor, made on the device without reading anything back."""
    if num_items is None and config.reduction != "mean":
        return Divisor(None)
    dtype = objective.accumulation_dtype(logits.dtype)
    if num_items is None:
        return Divisor(_count(logits, targets, config, dtype))
    if config.reduction != "mean":
        raise ValueError(f"num_items replaces the divisor of reduction='mean'; got reduction={config.reduction!r}")
    value, known = _check_num_items(num_items, logits, dtype)
    if known != 0:
        return Divisor(value, any_items=known is None)
    if torch.compiler.is_compiling() or (logits if targets is None else targets).device.type != "cpu":
        return Divisor(value, any_items=True)
    rows = int(_count(logits, targets, config, torch.int64))
    if rows:
        raise ValueError(f"num_items must be > 0 where rows count; got {num_items!r} for {rows} rows that count")
    return Divisor(torch.ones_like(value))


def _count(logits: Tensor, targets: Tensor | None, config: CarefConfig, dtype: torch.dtype) -> Tensor:
    """The number of rows that count."""
    if targets is None:
        return torch.full((), math.prod(logits.shape[:-1]), dtype=dtype, device=logits.device)
    counts = targets if targets.dtype == torch.bool else labelled(targets, config.ignore_index)
    return counts.sum().to(dtype)


def _check_num_items(num_items, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, float | None]:
    """The number of items as a tensor, and as a number if it is known without a synchronisation."""
    if isinstance(num_items, Tensor):
        if dtensors.is_dtensor(num_items):
            dtensors.refuse("num_items", num_items, "")
        if num_items.dim() != 0 or num_items.dtype.is_complex or num_items.dtype == torch.bool:
            raise ValueError(f"num_items: expected a real 0-D tensor; got {describe(num_items)}")
        if num_items.device.type != "cpu" and num_items.device != logits.device:
            raise ValueError(f"num_items: on {num_items.device}, but logits are on {logits.device}")
        readable = num_items.device.type == "cpu" and not torch.compiler.is_compiling()
        return num_items.detach().to(dtype), _known(num_items.item(), dtype) if readable else None
    if isinstance(num_items, bool) or not isinstance(num_items, Real):
        raise TypeError(f"num_items: expected a number or a 0-D tensor; got {describe(num_items)}")
    known = _known(num_items, dtype)
    changed = _changing((num_items,), dtype, logits.device) if torch.compiler.is_compiling() else None
    if changed is not None:
        return changed.squeeze(0), known
    return torch.full((), float(known), dtype=dtype, device=logits.device), known


def _known(num_items: float, dtype: torch.dtype) -> float:
    low, high = _POSITIVE[dtype]
    if not (num_items == 0 or low <= num_items <= high):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"num_items must be 0, or finite and > 0 in {name}; got {num_items!r}")
    return num_items
