"""The autograd node of the loss: what is saved, what is restored.  The arithmetic is in the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, linear_chunks, ops
from .config import HeadOptions, RowSpec
from .linear_chunks import Head, Needs
from .shards import ShardRows


class Plan(NamedTuple):
    """Everything but tensors that one call of the loss needs."""

    spec: RowSpec
    backend: str
    weights: tuple[float, float, float]  # of CE, SCED and KL in the loss, unless they vary
    per_row: bool
    any_items: bool  # the divisor is a number of items that may be 0
    inplace_backward: bool


class CarefFunction(torch.autograd.Function):
    """(loss, terms, statistics) of logits (N, V) or (B, T, V); ``varying`` and ``numbers`` as in ops.py.

    ``loss`` and ``terms`` are differentiable, ``statistics`` are not.  With ``per_row`` they are (N,) and (N, 3),
    otherwise the sums over rows, () and (3,), divided by ``divisor`` if there is one.
    """

    @staticmethod
    def forward(ctx, logits, targets, divisor, varying, numbers, plan: Plan):  # noqa: PLR0913
        terms, stats = ops.forward(logits, targets, *plan.spec, plan.backend, numbers)
        loss, reduced = ops.reduce(terms, divisor, plan.weights, plan.per_row, plan.any_items, varying)
        ctx.save_for_backward(logits, targets, divisor, varying, numbers, stats)
        ctx.plan, ctx.intact = plan, [True]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, reduced, stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None, _grad_stats: None):
        if grad_loss is None and grad_reduced is None:
            return (None,) * 6
        # Dynamo traces this with gradients enabled although it never differentiates it a second time.
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if create_graph and ctx.plan.backend == "reference":
            return _differentiable_backward(ctx, grad_loss, grad_reduced), *(None,) * 5
        with torch.no_grad():
            gradient = _fused_backward(ctx, grad_loss, grad_reduced)
        if create_graph:
            gradient = _RefuseSecondDerivative.apply(gradient, ctx.saved_tensors[0])
        return gradient, *(None,) * 5


class _RefuseSecondDerivative(torch.autograd.Function):
    """The identity on a gradient that cannot be differentiated: an error later, never a silent constant.

    torch's own ``once_differentiable`` lets the gradient pass for a constant when the incoming gradient is one, as in
    ``torch.autograd.grad(loss, logits, create_graph=True)``.
    """

    @staticmethod
    def forward(ctx, gradient: Tensor, *inputs: Tensor | None) -> Tensor:  # noqa: ARG004
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _grad: Tensor):  # noqa: ARG004
        raise RuntimeError(
            "caref_kernels: double backward (a second derivative) is not supported by the fused backends; "
            "use backend='reference', which is differentiable twice"
        )


def _grad_terms(
    plan, grad_loss: Tensor | None, grad_reduced: Tensor | None, divisor: Tensor | None, varying: Tensor | None
) -> Tensor:
    """Gradients of the row terms, (N, 3), or (3,) where the rows were summed."""
    grad = grad_reduced
    if grad_loss is not None:
        weights = plan.weights if varying is None else varying.unbind()
        weighted = torch.stack([grad_loss * weight for weight in weights], -1)
        grad = weighted if grad is None else grad + weighted
    if divisor is not None:
        grad = _divided(grad, divisor) if plan.any_items else grad / divisor
    return grad


def _fused_backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> Tensor:
    logits, targets, divisor, varying, numbers, stats = ctx.saved_tensors
    plan = ctx.plan
    grad_terms = _grad_terms(plan, grad_loss, grad_reduced, divisor, varying).to(stats.dtype).expand(len(stats), -1)
    if not plan.inplace_backward:
        return ops.backward(grad_terms, logits, targets, stats, *plan.spec, plan.backend, numbers)
    _take_logits(ctx)
    ops.backward_(grad_terms, logits, targets, stats, *plan.spec, plan.backend, numbers)
    # The write is invisible to autograd: raise the version, so that whoever saved these logits gets an error.
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _taken(holder: list):
    """The one element of ``holder``, or ``None`` from the second call on, also if two threads call it at once."""
    try:
        return holder.pop()
    except IndexError:
        return None


def _take_logits(ctx) -> None:
    """Before the logits are overwritten: their version rises only afterwards, too late for a pass in another thread."""
    if _taken(ctx.intact) is None:
        raise RuntimeError(
            "inplace_backward=True: another backward pass through the same retained graph is overwriting the logits, "
            "which were needed for gradient computation; leave it False to run several"
        )


def _differentiable_backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> Tensor:
    logits, targets, divisor, varying, _, stats = ctx.saved_tensors
    grad_terms = _grad_terms(ctx.plan, grad_loss, grad_reduced, divisor, varying).to(stats.dtype).expand(len(stats), -1)
    spec = ctx.plan.spec.for_columns(logits.size(-1))
    return backends.get("reference").gradient(grad_terms, logits, targets, spec)


class LinearPlan(NamedTuple):
    """Everything but tensors that one call of the loss of a head needs."""

    spec: RowSpec
    backend: str
    weights: tuple[float, float, float]
    per_row: bool
    any_items: bool
    with_terms: bool  # whether the terms are differentiable results too
    needs: tuple[bool, bool, bool]  # gradients of hidden, weight and bias
    options: HeadOptions
    dtype: torch.dtype  # of the products: that of the tensors, or autocast's
    shard: ShardRows | None = None  # the columns are spread over several ranks
    reduce_hidden: bool = False  # whether the ranks add their gradients of hidden


class LinearCarefFunction(torch.autograd.Function):
    """(loss, terms, statistics) of hidden (N, D), weight (V, D) and bias (V,), as :class:`CarefFunction`.

    The gradients of a reduced loss are made in the forward pass, where the logits of a chunk are at hand, with the
    weights of the terms alone: divisor and incoming gradient are applied in the backward, in the accumulation dtype, so
    that nothing underflows in 16 bits before a loss scale arrives.  Everything else (per-row losses, gradients of
    single terms, a second backward of a retained graph) computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, divisor, varying, numbers, plan: LinearPlan):  # noqa: PLR0913
        head = _cast_head((hidden, weight, bias), plan)
        is_compiling = torch.compiler.is_compiling()
        # A compiled backward gets gradients of the terms, zeros, even where nothing was done with them.
        later = plan.per_row or (plan.with_terms and is_compiling)
        now = [need and not later for need in plan.needs]
        terms, stats, *gradients = _linear_forward(head, targets, varying, numbers, now, plan)
        loss, reduced = ops.reduce(terms, divisor, plan.weights, plan.per_row, plan.any_items, varying)
        # A compiled backward may run again, so it must not consume anything; an eager one scales in place, once.
        saved = gradients if is_compiling and any(now) else ()
        ctx.save_for_backward(hidden, weight, bias, targets, divisor, varying, numbers, stats, *saved)
        ctx.gradients = [gradients] if any(now) and not is_compiling else []
        ctx.plan = plan
        ctx.mark_non_differentiable(*((stats,) if plan.with_terms else (reduced, stats)))
        ctx.set_materialize_grads(False)
        return loss, reduced, stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None, _grad_stats: None):
        grad_reduced = grad_reduced if ctx.plan.with_terms else None
        if grad_loss is None and grad_reduced is None:
            return (None,) * 8
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            gradients = _linear_gradients(ctx, grad_loss, grad_reduced)
        if create_graph:
            inputs = ctx.saved_tensors[:3]
            gradients = [
                None if gradient is None else _RefuseSecondDerivative.apply(gradient, *inputs) for gradient in gradients
            ]
        return *gradients, *(None,) * 5


def _cast_head(tensors: tuple[Tensor | None, ...], plan: LinearPlan) -> Head:
    tensors = (None if value is None else value.to(plan.dtype) for value in tensors)
    return Head(*tensors, plan.options.logit_scale, plan.options.softcap)


def _linear_gradients(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> list[Tensor | None]:
    hidden, weight, bias, targets, divisor, varying, numbers, stats, *saved = ctx.saved_tensors
    plan = ctx.plan
    factor = plan.options.logit_scale  # of every gradient; where the logits are, it would underflow in float16
    ready = saved if torch.compiler.is_compiling() else saved or _taken(ctx.gradients)
    if ready and grad_reduced is None:
        scale = grad_loss if divisor is None else _divided(grad_loss, divisor)
        scale = scale * factor if factor != 1 else scale
        gradients = [_scaled(gradient, scale, may_overwrite=not saved) for gradient in ready]
    else:
        grad_terms = _grad_terms(plan, grad_loss, grad_reduced, divisor, varying).to(stats.dtype)
        grad_terms = grad_terms * factor if factor != 1 else grad_terms
        head = _cast_head((hidden, weight, bias), plan)
        gradients = _linear_backward(grad_terms.expand(len(stats), -1), head, targets, stats, numbers, plan)
    inputs = (hidden, weight, bias)
    gradients = [
        gradient.to(value.dtype) if need else None
        for gradient, value, need in zip(gradients, inputs, plan.needs, strict=True)
    ]
    if plan.reduce_hidden and plan.needs[0]:
        gradients[0] = plan.shard.exchange.total(gradients[0])
    return gradients


def _linear_forward(head: Head, targets, varying, numbers, needs: list[bool], plan: LinearPlan):  # noqa: PLR0913
    chunk_rows = plan.options.chunk_rows or 0
    if plan.shard is None:
        return ops.linear_forward(
            *head, targets, plan.weights, needs, chunk_rows, *plan.spec, plan.backend, numbers, varying
        )
    with torch.autocast(head[0].device.type, enabled=False):
        return linear_chunks.forward(head, targets, plan.shard, plan.spec, plan.weights, Needs(*needs), chunk_rows)


def _linear_backward(grad_terms: Tensor, head: Head, targets, stats, numbers, plan: LinearPlan):  # noqa: PLR0913
    chunk_rows = plan.options.chunk_rows or 0
    if plan.shard is None:
        return ops.linear_backward(
            grad_terms, *head, targets, stats, plan.needs, chunk_rows, *plan.spec, plan.backend, numbers
        )
    with torch.autocast(head[0].device.type, enabled=False):
        return linear_chunks.backward(
            grad_terms, head, targets, stats, plan.shard, plan.spec, Needs(*plan.needs), chunk_rows
        )


def _divided(grad_loss: Tensor, divisor: Tensor) -> Tensor:
    """grad_loss / divisor; 0 where that is 0: the loss is NaN over no row, infinite over rows that are no items, and an
    infinite factor would make NaN of the gradient's zeros.
    """
    divisor = divisor.to(grad_loss.device)
    return torch.where(divisor == 0, 0.0, grad_loss / divisor)


def _scaled(gradient: Tensor, scale: Tensor, may_overwrite: bool) -> Tensor:
    """gradient * scale in the dtype of ``scale``."""
    if gradient.dtype != scale.dtype:
        return gradient.to(scale.dtype) * scale
    return gradient.mul_(scale) if may_overwrite else gradient * scale


class ShardPlan(NamedTuple):
    """Everything but tensors that one call of the loss of a rank's columns needs."""

    rows: ShardRows
    weights: tuple[float, float, float]
    per_row: bool
    any_items: bool
    inplace_backward: bool


class ShardFunction(torch.autograd.Function):
    """(loss, terms, statistics) of this rank's columns (N, V_local), as :class:`CarefFunction`; the ranks exchange
    what they need in the forward, nothing in the backward.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, divisor: Tensor | None, plan: ShardPlan):
        terms, stats = plan.rows.forward(logits, targets)
        loss, reduced = ops.reduce(terms, divisor, plan.weights, plan.per_row, plan.any_items)
        ctx.save_for_backward(logits, targets, divisor, stats)
        ctx.plan, ctx.intact = plan, [True]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, reduced, stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None, _grad_stats: None):
        if grad_loss is None and grad_reduced is None:
            return (None,) * 4
        create_graph = torch.is_grad_enabled()
        local, targets, divisor, stats = ctx.saved_tensors
        plan = ctx.plan
        with torch.no_grad():
            grad_terms = _grad_terms(plan, grad_loss, grad_reduced, divisor, None).to(stats.dtype)
            if plan.inplace_backward:
                _take_logits(ctx)
            gradient = local.detach() if plan.inplace_backward else torch.empty_like(local)
            plan.rows.backward(grad_terms.expand(len(stats), -1), local, targets, stats, gradient)
            if plan.inplace_backward:
                torch.autograd.graph.increment_version(local)
        if create_graph:
            gradient = _RefuseSecondDerivative.apply(gradient, local)
        return gradient, None, None, None
