"""The output head of a model: what may be done to its logits, and the loss that it computes in their place.

A fused head computes the loss inside of its own forward pass, where its weight is whole under FSDP2 and ZeRO-3 as well,
and returns one element instead of the logits (B, T, V).  The element is 0, with the gradient of the loss: a scale, a
softcap or a constant bias keeps 0 and its derivative there, and backward hooks on the output see the gradient pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from caref_kernels import VocabShard, linear_caref_loss

from .passes import ForwardPass, current_pass, is_dtensor, name_of, whole

# Hooks of these packages move parameters or activations and do not change values.
TRUSTED_HOOKS = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.distributed.")
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class WrappedForward:
    """A ``forward`` in the ``__dict__`` of one module, so that copies and pickles of the module have their own.

    ``inner`` is the forward that it calls; ``None`` stands for that of the module's class.
    """

    def __init__(self, module: nn.Module, inner: Callable | None) -> None:
        self.module, self.inner = module, inner

    @classmethod
    def install(cls, module: nn.Module) -> None:
        """Wrap the forward of ``module``, inside of the wrapper that accelerate may have put around it."""
        slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
        inner = vars(module).get(slot)
        if not isinstance(inner, cls):
            vars(module)[slot] = cls(module, inner)

    @classmethod
    def uninstall(cls, module: nn.Module) -> None:
        """Undo :meth:`install`; inside of another wrapper the instance stays, and only calls its inner forward."""
        for slot in ("_old_forward", "forward"):
            installed = vars(module).get(slot)
            if isinstance(installed, cls):
                del vars(module)[slot]
                if installed.inner is not None:
                    vars(module)[slot] = installed.inner

    def called(self, args: tuple) -> tuple[nn.Module, Callable, tuple]:
        """The module that is called, its inner forward, and the other arguments.

        accelerate takes a module's forward for a plain function when it unwraps a model, and binds it a second time.
        """
        module, args = (args[0], args[1:]) if args and isinstance(args[0], nn.Module) else (self.module, args)
        return module, self.inner or type(module).forward.__get__(module), args


class HeadForward(WrappedForward):
    """The ``forward`` of a head, which computes the loss where the current pass fuses this head."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the head's output, or what stands for it while a loss is computed or a model is probed."""
        module, inner, args = self.called(args)
        forward_pass = current_pass()
        if forward_pass is None or forward_pass.head is not module:
            return inner(*args, **kwargs)
        if isinstance(forward_pass, ForwardPass):
            return fused_output(forward_pass, module, *args)
        return forward_pass.observe_head(inner(*args, **kwargs))


def current_head(model: nn.Module) -> nn.Module | None:
    """The module that computes the logits now: PEFT's trained copy of the head, if there is one and it is in use."""
    head = model.get_output_embeddings()
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module")):
        return head
    adapters = head.active_adapters
    return head.modules_to_save[adapters[0]] if adapters and not head.disable_adapters else head.original_module


def all_heads(model: nn.Module) -> list[nn.Module]:
    """The head and every copy of it."""
    head = model.get_output_embeddings()
    return [] if head is None else list(head.modules())


def check_head(head: nn.Module | None) -> None:
    """Raise ValueError, with the reason, if ``head`` does more than multiply by its weight and add its bias."""
    if head is None:
        raise ValueError("the model has no output embeddings, so there is no head to fuse; leave fuse_head False")
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output head must be a torch.nn.Linear to be fused; got {type(head).__qualname__}{_reason(head)} "
            f"leave fuse_head False"
        )
    for hook in (hook for name in _HOOKS for hook in getattr(head, name).values()):
        function = hook
        while hasattr(function, "func"):  # functools.partial
            function = function.func
        module = getattr(function, "__module__", None) or ""
        if not module.startswith(TRUSTED_HOOKS):
            raise ValueError(
                f"the output head has a hook, {module}.{getattr(hook, '__qualname__', type(hook).__name__)}, that "
                f"would see the loss in place of the logits: remove it, or leave fuse_head False"
            )


def _reason(head: nn.Module) -> str:
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        return (
            ", an adapter on the head: its logits are the sum of two products, whose merged weight would take as much "
            "memory as the logits and lose the adapter's part to rounding in 16 bits; leave the head out of "
            "target_modules, train a copy of it with modules_to_save, or"
        )
    if hasattr(head, "token_adapter"):
        return (
            ": trainable_token_indices replaces rows of the tied head in every pass, which takes a copy of the weight;"
        )
    if "bitsandbytes" in type(head).__module__ or "quant" in type(head).__module__:
        return ", a quantised layer, whose weight is not that of its product;"
    return ";"


class _GradientOf(torch.autograd.Function):
    """Zeros that pass their gradient on to ``value``, also if that is infinite."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:  # noqa: ARG004
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


def fused_output(forward_pass: ForwardPass, head: nn.Module, hidden: Tensor) -> Tensor:
    """Compute the loss from the input of the head; returns zeros (1, 1, n) that carry its gradient."""
    if forward_pass.head_loss is not None:
        raise RuntimeError(
            f"{name_of(forward_pass.model)} calls its output head twice in one forward pass, so that its loss cannot "
            f"be made there; leave fuse_head False"
        )
    form, weight, bias, shard = forward_pass.form.logits, head.weight, head.bias, None
    if form.bias_name is not None:
        constant = getattr(forward_pass.model, form.bias_name).reshape(-1).to(weight)
        bias = constant if bias is None else bias + constant
    if is_dtensor(weight):
        weight, bias, shard = _local_part(weight, bias)
        hidden = whole(hidden)
    elif weight.numel() == 0 or weight.dim() != 2 or weight.device.type == "meta":
        raise ValueError(
            f"the weight of the output head is not here in its own forward pass: shape {tuple(weight.shape)} on "
            f"{weight.device}; leave fuse_head False"
        )
    options = forward_pass.loss_options(hidden.device) | {"logit_scale": form.scale, "softcap": form.softcap}
    out = linear_caref_loss(hidden, weight, forward_pass.targets(hidden.device), bias, shard=shard, **options)
    forward_pass.head_loss = forward_pass.finish(out)
    zeros = _GradientOf.apply(forward_pass.head_loss).reshape(1, 1, 1)
    if not is_dtensor(head.weight):
        return zeros
    from torch.distributed.tensor import DTensor, Replicate

    # One column for each rank, so that every rank has one whatever the layer does to the placement of its output.
    mesh = head.weight.device_mesh
    return DTensor.from_local(zeros.expand(1, 1, mesh.size()), mesh, [Replicate()], run_check=False)


def _local_part(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """The rows of the weight and the bias that this rank holds under tensor parallelism, and which ones they are."""
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise ValueError(
            f"the weight of the output head must be sharded over the vocabulary on a 1-D mesh, [Shard(0)], to be "
            f"fused; got {list(placements)} on a {mesh.ndim}-D mesh; leave fuse_head False"
        )
    local = weight.to_local(grad_placements=placements)
    shard = VocabShard.of_dtensor(weight, 0) if placements[0].is_shard(0) else None
    if bias is not None and is_dtensor(bias):
        bias = bias.to_local(grad_placements=bias.placements)
    if shard is not None and bias is not None and bias.numel() != local.size(0):
        bias = bias[shard.first_column : shard.first_column + shard.columns]
    return local, bias, shard


def loss_of_head(forward_pass: ForwardPass, logits: Tensor) -> Tensor:
    """The loss that the head has computed, with its gradient by way of what the model took for the ``logits``."""
    logits, loss = whole(logits), forward_pass.head_loss
    if torch.finfo(logits.dtype).bits < torch.finfo(loss.dtype).bits:
        raise RuntimeError(
            f"the output of the head was cast to {logits.dtype}, in which the gradient of the loss would be rounded "
            f"(an output_dtype of the mixed precision of the head by itself?): set it on the root module alone, or "
            f"leave fuse_head False"
        )
    zero = logits.flatten()[0].to(loss.dtype)
    return loss.detach() + (zero - zero.detach()) / forward_pass.form.logits.scale
