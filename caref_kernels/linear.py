"""The loss of a linear head without materialising its logits: public function, autograd.Function and operators.

The products and the loss run chunk by chunk of rows, in linear_chunks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import linear_chunks, ops
from .autograd import RefuseSecondDerivative, divided, gradient_of_terms, take
from .checks import check_head, check_label_range, check_labels, check_linear_order, check_token_weights
from .config import CarefConfig, HeadOptions, Reduction
from .distributed.shard import VocabShard, check_shard
from .divisor import divisor_of
from .functional import CarefOutput, name_results, rows_of
from .linear_chunks import Head, NeedsInputGrad
from .objective import accumulation_dtype
from .sparsity import Sparsity

if TYPE_CHECKING:
    import torch.distributed as dist
    from typing_extensions import Unpack

    from .keywords import LinearKeywords


@overload
def linear_caref_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    **options: Unpack[LinearKeywords],
) -> Tensor: ...
@overload
def linear_caref_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_terms: Literal[True],
    **options: Unpack[LinearKeywords],
) -> CarefOutput: ...
@overload
def linear_caref_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_terms: bool,
    **options: Unpack[LinearKeywords],
) -> Tensor | CarefOutput: ...
def linear_caref_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
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
    return_terms: bool = CarefConfig.return_terms,
    logit_scale: float = HeadOptions.logit_scale,
    softcap: float | None = HeadOptions.softcap,
    chunk_rows: int | None = HeadOptions.chunk_rows,
    shard: VocabShard | dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = HeadOptions.reduce_hidden_grad,
) -> Tensor | CarefOutput:
    r"""The CAREF loss of ``logits = logit_scale * (hidden @ weight.T + bias)``, without materialising the logits.

    The value and the gradients are those of :func:`caref_kernels.caref_loss` of these logits, computed chunk by chunk
    of the valid rows.  The gradients of hidden, weight and bias are computed in the same pass.

    Args:
        hidden: ``(..., D)``, float16, bfloat16, float32 or float64, at least 2-D; the same on all ranks of a shard.
        weight: ``(V, D)``, of the dtype and device of ``hidden``, or ``(V_local, D)`` with ``shard``.  A tied weight
            receives the gradients of both its uses.
        labels: ``(...)``, int32 or int64 class indices, on the device of ``hidden``.
        bias: ``(V,)``, or ``(V_local,)`` with ``shard``, or ``None``; a bias that requires no gradient is a constant.
        logit_scale: factor of the logits, finite and > 0 (Cohere's ``logit_scale``, 1 / ``logits_scaling`` of Granite).
        softcap: logits are ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``, finite and > 0;
            ``None`` for none (``final_logit_softcapping`` of Gemma 2).
        chunk_rows: rows of logits that exist at a time, >= 1.  By default it is chosen from the memory that they, and
            the gradient of the weight, take.
        shard: where this rank's rows of the weight lie, as in :func:`caref_kernels.caref_loss`.
        reduce_hidden_grad: with ``shard``, all-reduce the gradient of ``hidden`` in the backward, one SUM of its size
            and dtype.  False leaves each rank its part, for a surrounding layer that adds the parts itself.
        alpha, beta, lambda_sced, lambda_kl, lambda_z, label_smoothing, sparsity, ignore_index, shift, reduction,
            num_items, token_weights, vocab_size, backend, return_terms: as in :func:`caref_kernels.caref_loss`.

    Returns:
        The loss, or :class:`caref_kernels.CarefOutput`; float32 (float64 for float64), in nats.

    Raises:
        IndexError: on the CPU, a label that is neither in [0, V) nor ``ignore_index``; elsewhere its row is NaN.
        TypeError: an argument of a wrong type or dtype, or a DTensor; the message says what to pass instead.
        ValueError: shapes, dtypes or devices that do not fit (each is named), or a weight that is empty.
        NotImplementedError: an explicit backend that cannot run, or a torch.func transform.
        RuntimeError: in the backward of a backward, because a second derivative is not provided.

    Note:
        Precision: the logits of a chunk are rounded to the dtype of ``hidden``, as those of a head are.  Terms,
        statistics and the gradients of weight and bias are accumulated in float32 (float64), so that their error does
        not grow with the number of chunks.  Under autocast the products run in its dtype.  The scale costs no rounding.
        A softcap and its derivative are computed in float32 (float64).  The results are deterministic.

        Memory: one chunk of logits, the gradient of hidden, and float32 for the gradient of the weight; nothing for a
        frozen weight.  With a softcap a chunk exists in its dtype and in float32, three times the memory in 16 bits and
        twice in float32, for which the default takes fewer rows.  ``reduction="none"``, gradients of single terms, and
        a second backward through a retained graph compute the logits a second time.

        Communication with ``shard``: that of :func:`caref_kernels.caref_loss` for every chunk of rows, and the gradient
        of ``hidden``.
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
        return_terms=return_terms,
    )
    options = HeadOptions(
        logit_scale=logit_scale, softcap=softcap, chunk_rows=chunk_rows, reduce_hidden_grad=reduce_hidden_grad
    )
    return linear_from_config((hidden, weight, bias), labels, num_items, config, options, shard, token_weights)


def linear_from_config(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    num_items: float | Tensor | None,
    config: CarefConfig,
    options: HeadOptions,
    shard: VocabShard | dist.ProcessGroup | None = None,
    token_weights: Tensor | None = None,
) -> Tensor | CarefOutput:
    """:func:`linear_caref_loss` of (hidden, weight, bias) with its options already in a configuration."""
    hidden, weight, bias = tensors
    check_linear_order(hidden, weight, labels)
    check_shard(shard)
    dtype = check_head(hidden, weight, bias, least_columns=1 if shard is None else 0)
    labels = check_labels(labels, hidden, config, "hidden")
    token_weights = check_token_weights(token_weights, hidden, labels, config, "hidden")
    if config.inplace_backward:
        raise ValueError("inplace_backward must be False: a fused head has no logits that could be overwritten")
    divisor = divisor_of(hidden, labels, num_items, config)
    hidden_rows = hidden.reshape(-1, hidden.size(-1))
    sample = hidden.new_empty((1, 1), dtype=dtype)
    rows, weights, *operands = rows_of(shard, weight.size(0), weight, labels, config, sample)
    call = LinearCall(
        rows=rows,
        weights=weights,
        per_row=config.reduction == "none",
        any_items=divisor.any_items,
        with_terms=config.return_terms,
        needs_input_grad=NeedsInputGrad(*map(_needs_grad, (hidden_rows, weight, bias))),
        options=options,
        dtype=dtype,
    )
    results = LinearCarefFunction.apply(
        hidden_rows, weight, bias, labels, divisor.value, *operands, token_weights, call
    )
    return name_results(*results, divisor, labels if shard is None else None, hidden.shape[:-1], config)


def _needs_grad(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


class LinearCall(NamedTuple):
    """The arguments of one call of the loss of a head that are not tensors."""

    rows: ops.Rows
    weights: tuple[float, ...]
    per_row: bool
    any_items: bool
    with_terms: bool  # the terms are differentiable results too
    needs_input_grad: NeedsInputGrad
    options: HeadOptions
    dtype: torch.dtype  # of the products: that of the tensors, or autocast's

    @property
    def is_sharded(self) -> bool:
        """Whether the columns are spread over several ranks, whose exchanges no operator may contain."""
        return not isinstance(self.rows, ops.WholeRows)


class LinearCarefFunction(torch.autograd.Function):
    """(loss, terms, statistics) of hidden (N, D), weight (V, D) and bias (V,), as :class:`CarefFunction`.

    The gradients of a reduced loss are computed in the forward pass, where the logits of a chunk are at hand, with the
    weights of the terms alone: divisor and incoming gradient are applied in the backward, in the accumulation dtype, so
    that nothing underflows in 16 bits before a loss scale arrives.  Everything else (per-row losses, gradients of
    single terms, a second backward of a retained graph) computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, divisor, varying, numbers, token_weights, call: LinearCall):
        head = _cast_head((hidden, weight, bias), call)
        is_compiling = torch.compiler.is_compiling()
        # A compiled backward gets gradients of the terms, zeros, even where nothing was done with them.
        later = call.per_row or (call.with_terms and is_compiling)
        now = NeedsInputGrad(*(need and not later for need in call.needs_input_grad))
        factors = varying if token_weights is None else _row_weights(call, varying, token_weights)
        terms, stats, *gradients = _linear_forward(head, targets, factors, numbers, now, call)
        loss, reduced = ops.reduce(terms, divisor, call.weights, call.per_row, call.any_items, varying, token_weights)
        # A compiled backward may run again, so it must not consume anything; an eager one scales in place, once.
        saved = gradients if is_compiling and any(now) else ()
        ctx.save_for_backward(hidden, weight, bias, targets, divisor, varying, numbers, token_weights, stats, *saved)
        ctx.gradients = [gradients] if any(now) and not is_compiling else []
        ctx.call = call
        ctx.mark_non_differentiable(*((stats,) if call.with_terms else (reduced, stats)))
        ctx.set_materialize_grads(False)
        return loss, reduced, stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None, _grad_stats: None):
        grad_reduced = grad_reduced if ctx.call.with_terms else None
        if grad_loss is None and grad_reduced is None:
            return (None,) * 9
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            gradients = _linear_gradients(ctx, grad_loss, grad_reduced)
        if create_graph:
            inputs = ctx.saved_tensors[:3]
            gradients = [
                None if gradient is None else RefuseSecondDerivative.apply(gradient, *inputs) for gradient in gradients
            ]
        return *gradients, *(None,) * 6


def _cast_head(tensors: tuple[Tensor | None, ...], call: LinearCall) -> Head:
    tensors = (None if value is None else value.to(call.dtype) for value in tensors)
    return Head(*tensors, call.options.logit_scale, call.options.softcap)


def _row_weights(call: LinearCall, varying: Tensor | None, token_weights: Tensor) -> Tensor:
    """The weights of the terms of each row, (N, 3)."""
    weights = token_weights.new_tensor(call.weights) if varying is None else varying
    return token_weights[:, None] * weights


def _linear_gradients(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> list[Tensor | None]:
    hidden, weight, bias, targets, divisor, varying, numbers, token_weights, stats, *saved = ctx.saved_tensors
    call = ctx.call
    factor = call.options.logit_scale  # of every gradient; where the logits are, it would underflow in float16
    ready = saved if torch.compiler.is_compiling() else saved or take(ctx.gradients)
    if ready and grad_reduced is None:
        scale = grad_loss if divisor is None else divided(grad_loss, divisor)
        scale = scale * factor if factor != 1 else scale
        gradients = [_scaled(gradient, scale, may_overwrite=not saved) for gradient in ready]
    else:
        grad_terms = gradient_of_terms(call, grad_loss, grad_reduced, divisor, varying, token_weights).to(stats.dtype)
        grad_terms = grad_terms * factor if factor != 1 else grad_terms
        head = _cast_head((hidden, weight, bias), call)
        gradients = _linear_backward(grad_terms.expand(len(stats), -1), head, targets, stats, numbers, call)
    inputs = (hidden, weight, bias)
    gradients = [
        gradient.to(value.dtype) if need else None
        for gradient, value, need in zip(gradients, inputs, call.needs_input_grad, strict=True)
    ]
    if call.is_sharded and call.options.reduce_hidden_grad and call.needs_input_grad.hidden:
        gradients[0] = call.rows.collectives.total(gradients[0])
    return gradients


def _scaled(gradient: Tensor, scale: Tensor, may_overwrite: bool) -> Tensor:
    """gradient * scale in the dtype of ``scale``."""
    if gradient.dtype != scale.dtype:
        return gradient.to(scale.dtype) * scale
    return gradient.mul_(scale) if may_overwrite else gradient * scale


def _linear_forward(head: Head, targets, varying, numbers, needs_input_grad: NeedsInputGrad, call: LinearCall):
    chunk_rows, rows = call.options.chunk_rows or 0, call.rows
    if not call.is_sharded:
        return _forward_op(
            *head, targets, call.weights, needs_input_grad, chunk_rows, *rows.spec, rows.backend, numbers, varying
        )
    weights = call.weights if varying is None else varying
    with torch.autocast(head.hidden.device.type, enabled=False):
        return linear_chunks.forward(head, targets, rows, weights, needs_input_grad, chunk_rows)


def _linear_backward(grad_terms: Tensor, head: Head, targets, stats, numbers, call: LinearCall):
    chunk_rows, rows = call.options.chunk_rows or 0, call.rows
    if not call.is_sharded:
        return _backward_op(
            grad_terms, *head, targets, stats, call.needs_input_grad, chunk_rows, *rows.spec, rows.backend, numbers
        )
    with torch.autocast(head.hidden.device.type, enabled=False):
        return linear_chunks.backward(grad_terms, head, targets, stats, rows, call.needs_input_grad, chunk_rows)


def _forward_implementation(*arguments):
    head, (targets, weights, needs_input_grad, chunk_rows, *rest) = _head(arguments)
    spec, backend, varying = ops.Call.of(head.weight.size(0), rest)
    weights = weights if varying is None else varying
    rows = ops.DirectRows(backend, spec)
    with torch.autocast(head.hidden.device.type, enabled=False):
        if targets is not None:
            check_label_range(targets, head.weight.size(0), spec.ignore_index)
        return linear_chunks.forward(head, targets, rows, weights, NeedsInputGrad(*needs_input_grad), chunk_rows)


def _forward_fake(*arguments):
    head, (_, _, needs_input_grad, _, *rest) = _head(arguments)
    dtype = accumulation_dtype(head.hidden.dtype)
    results = (head.hidden.new_empty((head.hidden.size(0), width), dtype=dtype) for width in ops.widths(rest))
    return *results, *_fake_gradients(head, needs_input_grad)


def _backward_implementation(grad_terms, *arguments):
    head, (targets, stats, needs_input_grad, chunk_rows, *rest) = _head(arguments)
    spec, backend, _ = ops.Call.of(head.weight.size(0), rest)
    rows, needs_input_grad = ops.DirectRows(backend, spec), NeedsInputGrad(*needs_input_grad)
    with torch.autocast(head.hidden.device.type, enabled=False):
        return linear_chunks.backward(grad_terms, head, targets, stats, rows, needs_input_grad, chunk_rows)


def _backward_fake(grad_terms, *arguments):  # noqa: ARG001
    head, (_, _, needs_input_grad, *_) = _head(arguments)
    return _fake_gradients(head, needs_input_grad)


def _fake_gradients(head: Head, needs_input_grad):
    dtype = accumulation_dtype(head.hidden.dtype)
    columns = head.weight.shape[:1]
    shapes = (head.hidden.shape, head.hidden.dtype), (head.weight.shape, dtype), (columns, dtype)
    return tuple(
        head.hidden.new_empty(shape, dtype=kind) if need else head.hidden.new_empty(0)
        for (shape, kind), need in zip(shapes, needs_input_grad, strict=True)
    )


def _head(arguments: tuple) -> tuple[Head, tuple]:
    """The arguments that the operators of a head begin with, and the others."""
    count = len(Head._fields)
    return Head(*arguments[:count]), arguments[count:]


_HEAD_SCHEMA = "Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float? softcap, Tensor? targets"
_forward_op = ops.register(
    f"linear_forward({_HEAD_SCHEMA}, float[] weights, bool[] needs_input_grad, int chunk_rows, {ops.SPEC_SCHEMA}, "
    f"Tensor? varying=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward_op = ops.register(
    f"linear_backward(Tensor grad_terms, {_HEAD_SCHEMA}, Tensor stats, bool[] needs_input_grad, int chunk_rows, "
    f"{ops.SPEC_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)
