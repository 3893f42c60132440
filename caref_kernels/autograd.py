"""The autograd node of the loss: what is saved, what is restored.  The arithmetic is in the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .config import RowSpec


class Plan(NamedTuple):
    """Everything but tensors that one call of the loss needs."""

    spec: RowSpec
    backend: str
    weights: tuple[float, float, float]  # of CE, SCED and KL in the loss
    per_row: bool
    inplace_backward: bool


class CarefFunction(torch.autograd.Function):
    """(loss, terms, statistics) of logits (N, V) or (B, T, V).

    ``loss`` and ``terms`` are differentiable, ``statistics`` are not.  With ``per_row`` they are (N,) and (N, 3),
    otherwise the sums over rows, () and (3,), divided by ``divisor`` if there is one.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor | None, divisor: Tensor | None, plan: Plan):
        terms, stats = ops.forward(logits, targets, *plan.spec, plan.backend)
        loss, reduced = ops.reduce(terms, divisor, plan.weights, plan.per_row)
        ctx.save_for_backward(logits, targets, divisor, stats)
        ctx.plan = plan
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, reduced, stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None, _grad_stats: None):
        if grad_loss is None and grad_reduced is None:
            return None, None, None, None
        # Dynamo traces this with gradients enabled although it never differentiates it a second time.
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if create_graph and ctx.plan.backend == "reference":
            return _differentiable_backward(ctx, grad_loss, grad_reduced), None, None, None
        with torch.no_grad():
            gradient = _fused_backward(ctx, grad_loss, grad_reduced)
        if create_graph:
            gradient = _RefuseSecondDerivative.apply(gradient, ctx.saved_tensors[0])
        return gradient, None, None, None


class _RefuseSecondDerivative(torch.autograd.Function):
    """The identity on a gradient that cannot be differentiated: an error later, never a silent constant.

    torch's own ``once_differentiable`` lets the gradient pass for a constant when the incoming gradient is one, as in
    ``torch.autograd.grad(loss, logits, create_graph=True)``.
    """

    @staticmethod
    def forward(ctx, gradient: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _grad: Tensor):  # noqa: ARG004
        raise RuntimeError(
            "caref_kernels: double backward (a second derivative) is not supported by the fused backends; "
            "use backend='reference', which is differentiable twice"
        )


def _grad_terms(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None, divisor: Tensor | None, rows: int):
    """(N, 3) gradients of the row terms, expanded without a copy when the rows were summed."""
    grad = grad_reduced
    if grad_loss is not None:
        weighted = torch.stack([grad_loss * weight for weight in ctx.plan.weights], -1)
        grad = weighted if grad is None else grad + weighted
    if divisor is not None:
        grad = grad / divisor
    return grad if ctx.plan.per_row else grad.expand(rows, -1)


def _fused_backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> Tensor:
    logits, targets, divisor, stats = ctx.saved_tensors
    grad_terms = _grad_terms(ctx, grad_loss, grad_reduced, divisor, stats.size(0)).to(stats.dtype)
    plan = ctx.plan
    if not plan.inplace_backward:
        return ops.backward(grad_terms, logits, targets, stats, *plan.spec, plan.backend)
    ops.backward_(grad_terms, logits, targets, stats, *plan.spec, plan.backend)
    # The write is invisible to autograd: raise the version, so that whoever saved these logits gets an error.
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _differentiable_backward(ctx, grad_loss: Tensor | None, grad_reduced: Tensor | None) -> Tensor:
    logits, targets, divisor, stats = ctx.saved_tensors
    grad_terms = _grad_terms(ctx, grad_loss, grad_reduced, divisor, stats.size(0)).to(stats.dtype)
    spec = ctx.plan.spec.for_columns(logits.size(-1))
    return backends.get("reference").gradient(grad_terms, logits, targets, spec)
