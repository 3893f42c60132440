"""The public functions of the loss: check the arguments, view the logits as rows, call autograd, name the results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import backends, checks, objective, ops
from .autograd import CarefFunction, LossCall
from .config import CarefConfig, Reduction
from .distributed.shard import ShardedRows, VocabShard, local_logits, resolved_shard
from .divisor import Divisor, divisor_of
from .sparsity import Sparsity

if TYPE_CHECKING:
    import torch.distributed as dist
    from typing_extensions import Unpack

    from .keywords import LossKeywords


class CarefOutput(NamedTuple):
    """The loss and its terms, all reduced alike: shape () for "mean" and "sum", that of the labels for "none".

    ``loss``, ``ce``, ``sced`` and ``kl`` are differentiable, so that a script may weight the terms itself.
    ``entropy`` (nats) equals ``log V - kl``.  ``accuracy`` is 1 where the largest logit, the first of
    several, is that of the label; ``None`` where the vocabulary is sharded.  ``num_kept`` is the number of tokens in
    the top-k mask of a row; ``None`` without ``sparsity``.  ``lse`` is log sum_v exp(z_v) of the row, so that the
    log-probability of any logit z is z - lse.  These four have no gradient and no token weights.  ``z_loss`` is lse^2
    and ``uniform_ce`` the mean of -log p over all columns, differentiable as the other terms; ``None`` where the
    options that need them are 0.
    """

    loss: Tensor
    ce: Tensor
    sced: Tensor
    kl: Tensor
    entropy: Tensor
    accuracy: Tensor | None = None
    num_kept: Tensor | None = None
    lse: Tensor | None = None
    z_loss: Tensor | None = None
    uniform_ce: Tensor | None = None


@overload
def caref_loss(
    logits: Tensor, labels: Tensor, *, return_terms: Literal[False] = False, **options: Unpack[LossKeywords]
) -> Tensor: ...
@overload
def caref_loss(
    logits: Tensor, labels: Tensor, *, return_terms: Literal[True], **options: Unpack[LossKeywords]
) -> CarefOutput: ...
@overload
def caref_loss(
    logits: Tensor, labels: Tensor, *, return_terms: bool, **options: Unpack[LossKeywords]
) -> Tensor | CarefOutput: ...
def caref_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = CarefConfig.alpha,
    beta: float = CarefConfig.beta,
    lambda_sced: float = CarefConfig.lambda_sced,
    lambda_kl: float = CarefConfig.lambda_kl,
    lambda_z: float = CarefConfig.lambda_z,
    label_smoothing: float = CarefConfig.label_smoothing,
    sparsity: Sparsity | None = CarefConfig.sparsity,
    ignore_index: int = CarefConfig.ignore_index,
    shift: bool = CarefConfig.shift,
    reduction: Reduction = CarefConfig.reduction,
    num_items: float | Tensor | None = None,
    token_weights: Tensor | None = None,
    vocab_size: int | None = CarefConfig.vocab_size,
    backend: str = CarefConfig.backend,
    inplace_backward: bool = CarefConfig.inplace_backward,
    return_terms: bool = CarefConfig.return_terms,
    shard: VocabShard | dist.ProcessGroup | None = None,
) -> Tensor | CarefOutput:
    r"""The CAREF loss, CE + lambda_sced * SCED + lambda_kl * KL(p || U), fused over the vocabulary.

    .. math:: \mathrm{SCED} = \sum_v |p_v \log(p_v / U)|^\alpha (1 - p_v)^\beta,  \quad U = 1/V

    The definition is that of arXiv 2605.27835, Eq. 2, with 0 log 0 = 0 and no epsilon inside the logarithm; see
    :mod:`caref_kernels.objective`.

    Args:
        logits: ``(..., V)``, float16, bfloat16, float32 or float64, at least 2-D.  Any strides: they are copied only if
            the last one is not 1, or if more than two leading dimensions do not collapse.  With ``shard``
            ``(..., V_local)``, the columns of this rank.  Or a DTensor whose last dimension alone is sharded, by one
            dimension of the mesh: it needs no ``shard``, and its gradient is sharded alike.
        labels: ``(...)``, int32 or int64 class indices among all V columns, on the device of the logits, the same on
            all ranks of a shard.  Rows whose label is ``ignore_index`` are not valid.
        alpha: exponent of ``|p log(p/U)|``, in [1, 16].
        beta: exponent of ``(1 - p)``, 0 or in [0.1, 16].
        lambda_sced: weight of SCED, finite and >= 0; 0 skips its work.
        lambda_kl: weight of KL, finite and >= 0.
        lambda_z: weight of the z-loss, the square of the row's log-sum-exp, finite and >= 0.
        label_smoothing: share of the uniform distribution over all columns in the target of the cross-entropy, in
            [0, 1], as in torch: (1 - s) CE + s mean_v(-log p_v), which is infinite if a logit is -inf.
        sparsity: the tokens that enter SCED: ``None``, all of them, as in the equation; :class:`caref_kernels.TopK`,
            the k largest logits; :class:`caref_kernels.EntropyTopK`, a number that follows from the entropy of the row.
            Logits that are equal at the k-th place share the weight that is left.  With ``shard`` it takes an
            all-gather of (N, max k) values, two more sums, and max k is read by the host.
        ignore_index: label of the rows that are left out of every term, whatever their logits hold.
        shift: for a causal model: compute the loss of ``logits[..., :-1, :]`` with ``labels[..., 1:]``, without a copy
            of the logits.
        reduction: ``"mean"`` over the valid rows, ``"sum"`` or ``"none"``.
        num_items: divisor that replaces the number of valid rows in ``"mean"``: a number >= 0, or a 0-D tensor, whose
            value is not read from a device.  0 is for a rank or a micro-batch without a valid row: loss and gradient
            are 0.  With valid rows 0 is an error on the CPU; on a device the loss is infinite, with a zero gradient.
        token_weights: ``(...)``, real numbers of any sign on the device of the logits, shifted as the labels are: the
            factor of each row's loss and of its three terms.  ``"mean"`` still divides by the number of valid rows;
            for a weighted mean pass ``num_items=token_weights.sum()`` over them.
        vocab_size: V of U = 1/V, in [1, 10 * columns]; by default the number of columns (of all ranks).
        backend: ``"auto"`` or a name from :func:`caref_kernels.explain`.
        inplace_backward: write the gradient into the memory of ``logits`` (an intermediate result that nothing else
            needs).  Their version counter is raised, so that a later use of their value is an autograd error.  Hooks
            under which another operator saved ``logits`` cannot be seen here and must have copied them.
        return_terms: return :class:`CarefOutput` (loss, ce, sced, kl, entropy, accuracy, num_kept, lse, z_loss,
            uniform_ce).
        shard: where the columns of this rank lie, if several ranks share the vocabulary: a
            :class:`caref_kernels.VocabShard`, or the process group of ranks that hold the columns in their order.  A
            group takes one small exchange of sizes per call; it is an error if every rank then holds the same columns
            and no label is beyond them, as when all have whole logits (this is seen where a corner of 64 by 64 numbers
            has at least 32 different ones).  Every rank calls the function with the same rows, labels and options.

    Returns:
        The loss, or :class:`CarefOutput`; float32 (float64 for float64 logits), in nats; a scalar, or ``(...)`` for
        ``"none"``, with ``shift`` one position shorter.  ``"mean"`` over no row is NaN with a zero gradient.  All ranks
        of a shard get the same loss, bitwise.

    Raises:
        IndexError: on the CPU, a label that is neither in [0, V) nor ``ignore_index``; elsewhere its row is NaN.
        TypeError: an argument of a wrong type or dtype.
        ValueError: a shape or a range that does not fit; the message gives both values.
        NotImplementedError: an explicit backend that cannot run (with its reason), a torch.func transform, or a
            sharded vocabulary inside torch.compile.
        RuntimeError: ``inplace_backward`` under saved-tensor hooks (non-reentrant checkpointing, offloading), or
            ``shard`` where torch.distributed is not initialised.

    Note:
        Precision: accumulation in float32 or better.  The relative error of a term is below 1e-5 and that of the norm
        of a gradient row below 2e-5, also where 1 - p = 1e-12, given the number of kept tokens;
        ceil(scale * exp(H)) itself may differ by one between backends.  Near-uniform rows with alpha near 1 are an
        exception, see the documentation of the accuracy.  The results are deterministic: bitwise identical on every run
        and for any number of threads.

        Compilation: one graph under torch.compile.  Exponents, weights of terms and ``num_items`` may change from call
        to call, as in a warm-up, at the price of one more compilation.

        Memory: the logits and (N, 5) row statistics, (N, 8) with a top-k mask, are saved; the backward allocates the
        gradient, or nothing if in place.

        Communication with ``shard``: per row one MAX of 4 bytes and one SUM of 80 (alpha 2, beta 1; 56 to 152 for alpha
        2 or 4 with beta 0, 1 or 2); for other exponents a SUM of 32 bytes and one of 16.  None in the backward.
    """
    config = CarefConfig(
        alpha=alpha,
        beta=beta,
        lambda_sced=lambda_sced,
        lambda_kl=lambda_kl,
        lambda_z=lambda_z,
        label_smoothing=label_smoothing,
        sparsity=sparsity,
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
        inplace_backward=inplace_backward,
        return_terms=return_terms,
    )
    return caref_from_config(logits, labels, num_items, config, shard, token_weights)


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
    r"""The SCED regulariser alone, fused over the vocabulary.

    .. math:: L = \sum_t \sum_v |p_{tv} \log(p_{tv} / U)|^\alpha (1 - p_{tv})^\beta,  \quad U = 1/V

    Args:
        logits: as in :func:`caref_loss`, with all columns on this rank.
        valid: ``(...)``, bool or integer; a row with 0 contributes nothing and gets a zero gradient, whatever it holds.
        alpha, beta, sparsity, reduction, num_items, vocab_size, backend, inplace_backward: as in :func:`caref_loss`.

    Returns:
        A scalar, or ``(...)`` for ``"none"``; float32 (float64 for float64 logits), in nats**alpha.  ``"mean"`` over no
        row is NaN with a zero gradient.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as in :func:`caref_loss`.

    Note:
        Precision, compilation and memory are as in :func:`caref_loss`.
    """
    config = CarefConfig(
        alpha=alpha,
        beta=beta,
        lambda_sced=1.0,
        sparsity=sparsity,
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
        inplace_backward=inplace_backward,
    )
    return sced_from_config(logits, valid, num_items, config)


def sced_from_config(logits: Tensor, valid: Tensor | None, num_items: float | Tensor | None, config: CarefConfig):
    """:func:`fused_sced` with its options already in a configuration, whose lambdas are not read."""
    checks.check_logits("logits", logits, "fused_sced")
    targets = None if valid is None else checks.check_valid(valid, logits)
    loss, *_ = _run(logits, targets, num_items, config, None)
    return loss.reshape(logits.shape[:-1]) if config.reduction == "none" else loss


def caref_from_config(
    logits: Tensor,
    labels: Tensor,
    num_items: float | Tensor | None,
    config: CarefConfig,
    shard: VocabShard | dist.ProcessGroup | None = None,
    token_weights: Tensor | None = None,
):
    """:func:`caref_loss` with its options already in a configuration."""
    checks.check_order(logits, labels, labels, ("logits", "labels"), "caref_loss takes (logits, labels)")
    logits, shard = local_logits(logits, shard)
    checks.check_logits("logits", logits, "caref_loss", least_columns=1 if shard is None else 0)
    labels = checks.check_labels(labels, logits, config)
    token_weights = checks.check_token_weights(token_weights, logits, labels, config)
    results = _run(logits, labels, num_items, config, shard, token_weights)
    return name_results(*results, labels if shard is None else None, logits.shape[:-1], config)


def name_results(
    loss: Tensor,
    terms: Tensor,
    stats: Tensor,
    divisor: Divisor,
    targets: Tensor | None,
    shape: torch.Size,
    config: CarefConfig,
):
    """The loss, or the loss with its terms, as the configuration asks; without ``targets`` there is no accuracy.

    ``shape`` is that of the rows.
    """

    def named(value: Tensor) -> Tensor:
        if config.reduction != "none":
            return value
        return value.reshape(shape)[..., :-1] if config.shift else value.reshape(shape)

    if not config.return_terms:
        return named(loss)
    columns = dict(zip(objective.STATISTICS + objective.TOP_K_STATISTICS, stats.unbind(-1), strict=False))
    observed = {"entropy": objective.entropy(columns["residual"], columns["mean_shift"])}
    if targets is not None:
        is_correct = (columns["argmax"] == targets) & checks.valid_labels(targets, config.ignore_index)
        observed["accuracy"] = is_correct.to(stats.dtype)
    if config.sparsity is not None:
        observed["num_kept"] = columns["num_kept"]
    observed["lse"] = objective.log_sum_exp(columns["maximum"], columns["residual"])
    if config.reduction != "none":
        observed = {name: divisor.divide(value.sum()) for name, value in observed.items()}
    ce, sced, kl, *extra = terms.unbind(-1)
    weights = config.lambda_z, config.label_smoothing
    for name, value, weight in zip(objective.EXTRA_TERMS, extra, weights, strict=False):
        if weight:
            observed[name] = value
    observed = {name: named(value) for name, value in observed.items()}
    return CarefOutput(*map(named, (loss, ce, sced, kl)), **observed)


def _run(
    logits: Tensor,
    targets: Tensor | None,
    num_items: float | Tensor | None,
    config: CarefConfig,
    shard: VocabShard | dist.ProcessGroup | None,
    token_weights: Tensor | None = None,
):
    """Loss, terms, statistics and divisor; without labels the loss is SCED alone."""
    if shard is None:
        matrix = _as_rows(logits)
    else:  # the sums see a negative bit, but the kernels of the gradient would not
        matrix = logits.resolve_neg().reshape(math.prod(logits.shape[:-1]), logits.size(-1))
    if config.inplace_backward:
        checks.check_inplace(logits, matrix)
    divisor = divisor_of(logits, targets, num_items, config)
    is_sced = targets is None or targets.dtype == torch.bool
    rows, weights, *operands = rows_of(shard, matrix.size(-1), logits, targets, config, matrix, is_sced)
    call = LossCall(rows, weights, config.reduction == "none", divisor.any_items, config.inplace_backward)
    results = CarefFunction.apply(matrix, targets, divisor.value, *operands, token_weights, call)
    return *results, divisor


def rows_of(
    shard: VocabShard | dist.ProcessGroup | None,
    columns: int,
    part: Tensor,
    targets: Tensor | None,
    config: CarefConfig,
    sample: Tensor,
    is_sced: bool = False,
) -> tuple[ops.Rows, tuple[float, ...], Tensor | None, Tensor | None]:
    """(rows, weights, varying, numbers) of a call; ``part`` has the ``columns``, ``sample`` selects the backend.

    ``weights`` are those of the terms, with ``is_sced`` those of SCED alone.
    """
    weights = (0.0, 1.0, 0.0) if is_sced else config.weights()
    if shard is not None:
        shard = resolved_shard(shard, columns, part, targets, config)
        return ShardedRows.of(shard, backends.select(config.backend, sample), config), weights, None, None
    spec, weights, varying, numbers = ops.settled(config.row_spec(columns), weights, sample)
    return ops.WholeRows(backends.select(config.backend, sample, spec), spec), weights, varying, numbers


def _as_rows(logits: Tensor) -> Tensor:
    """(N, V) or (B, T, V) with last stride 1; a copy only where no such view exists."""
    if logits.stride(-1) != 1 and logits.size(-1) > 1:
        logits = logits.contiguous()
    return logits if logits.dim() <= 3 else logits.reshape(-1, logits.size(-1))
