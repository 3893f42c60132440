"""The autograd.Function of the loss, for whole rows and for rows of a sharded vocabulary.

It decides what is saved and which gradients are returned; the arithmetic is in the backends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops


class LossCall(NamedTuple):
    """The arguments of one call of the loss that are not tensors."""

    rows: ops.Rows
    weights: tuple[float, ...]  # of the terms in the loss, unless ``varying`` replaces them
    per_row: bool
    any_items: bool  # the divisor is a number of items that may be 0
    inplace_backward: bool


class CarefFunction(torch.autograd.Function):
    """(loss, terms, statistics) of logits (N, V) or (B, T, V); ``varying`` and ``numbers`` as in ops.py.

    ``token_weights`` (N,) are factors of the rows.

    ``loss`` and ``terms`` are differentiable, ``statistics`` are not.  With ``per_row`` they are (N,) and (N, 3),
    otherwise the sums over rows, () and (3,), divided by ``divisor`` if there is one.  Where the vocabulary is sharded,
    the logits are (N, V_local), and the ranks exchange what they need in the forward, nothing in the backward.
    """

    @staticmethod
    def forward(ctx, logits, targets, divisor, varying, numbers, token_weights, call: LossCall):
        terms, stats = call.rows.forward(logits, targets, numbers)
        loss, reduced = ops.reduce(terms, divisor, call.weights, call.per_row, call.any_items, varying, token_weights)
        ctx.save_for_backward(logits, targets, divisor, varying, numbers, token_weights, stats)
        ctx.call, ctx.intact = call, [True]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, reduced, stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None, _grad_stats: None):
        if grad_loss is None and grad_reduced is None:
            return (None,) * 7
        # Dynamo traces this with gradients enabled although it never differentiates it a second time.
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if create_graph and ctx.call.rows.is_twice_differentiable:
            return _differentiable_gradient(ctx, grad_loss, grad_reduced), *(None,) * 6
        with torch.no_grad():
            gradient = _fused_gradient(ctx, grad_loss, grad_reduced)
        if create_graph:
            gradient = RefuseSecondDerivative.apply(gradient, ctx.saved_tensors[0])
        return gradient, *(None,) * 6


class RefuseSecondDerivative(torch.autograd.Function):
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


def gradient_of_terms(
    call,
    grad_loss: Tensor | None,
    grad_reduced: Tensor | None,
    divisor: Tensor | None,
    varying: Tensor | None,
    token_weights: Tensor | None,
) -> Tensor:
    """Gradients of the row terms, (N, 3), or (3,) where they are the same for every row."""
    grad = grad_reduced
    if grad_loss is not None:
        weights = call.weights if varying is None else varying.unbind()
        weighted = torch.stack([grad_loss * weight for weight in weights], -1)
        grad = weighted if grad is None else grad + weighted
    if divisor is not None:
        grad = divided(grad, divisor) if call.any_items else grad / divisor
    return grad if token_weights is None else grad * token_weights[:, None]


def divided(grad_loss: Tensor, divisor: Tensor) -> Tensor:
    """grad_loss / divisor, and 0 where the divisor is 0.

    There the loss is NaN over no row, or infinite over rows that are no items, and an infinite factor would turn the
    zeros of the gradient into NaN.
    """
    divisor = divisor.to(grad_loss.device)
    return torch.where(divisor == 0, 0.0, grad_loss / divisor)


def take(holder: list):
    """The one element of ``holder``, or ``None`` from the second call on, also if two threads call it at once."""
    try:
        return holder.pop()
    except IndexError:
        return None


def _fused_gradient(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> Tensor:
    logits, targets, divisor, varying, numbers, token_weights, stats = ctx.saved_tensors
    call = ctx.call
    grad_terms = gradient_of_terms(call, grad_loss, grad_reduced, divisor, varying, token_weights).to(stats.dtype)
    grad_terms = grad_terms.expand(len(stats), -1)
    if not call.inplace_backward:
        return call.rows.gradient(grad_terms, logits, targets, stats, False, numbers)
    # The version of the logits rises only after the write, too late for a backward pass in another thread.
    if take(ctx.intact) is None:
        raise RuntimeError(
            "inplace_backward=True: another backward pass through the same retained graph is overwriting the logits, "
            "which were needed for gradient computation; leave it False to run several"
        )
    gradient = call.rows.gradient(grad_terms, logits, targets, stats, True, numbers)
    # Autograd does not see the write: with a higher version, every other use of the saved logits is an error.
    torch.autograd.graph.increment_version(logits)
    return gradient


def _differentiable_gradient(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> Tensor:
    logits, targets, divisor, varying, _, token_weights, stats = ctx.saved_tensors
    grad_terms = gradient_of_terms(ctx.call, grad_loss, grad_reduced, divisor, varying, token_weights).to(stats.dtype)
    spec = ctx.call.rows.spec.for_columns(logits.size(-1))
    reference = backends.get("reference")
    return reference.differentiable_gradient(grad_terms.expand(len(stats), -1), logits, targets, spec)
