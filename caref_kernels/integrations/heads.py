"""The output head of a model: what may be done to its logits, and the loss that it makes in their place.

A fused head computes the loss inside of its own forward pass, where its weight is whole under FSDP2 and ZeRO-3 as well,
and returns one element instead of the logits (B, T, V).  The element is 0, with the gradient of the loss: what the
model does to its logits afterwards (a scale, a softcap, a constant bias) leaves 0 and its derivative there alone, and
the backward hooks that a wrapper puts on the head's output see the gradient pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caref_kernels import VocabShard, linear_caref_loss

from .passes import Pass, innermost, is_dtensor, name_of

# Hooks of these packages move parameters or activations and leave the values alone.
TRUSTED_HOOKS = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.distributed.")


class HeadForward:
    """The ``forward`` of one head: that of its class, or the loss where the pass that is running asks for it.

    Kept in the module's ``__dict__``, so that copies and pickles of the module have their own.
    """

    def __init__(self, module: nn.Module, inner: Any) -> None:
        self.module, self.inner = module, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :class:`HeadForward`."""
        module, args = rebound(self.module, args)
        inner = self.inner or type(module).forward.__get__(module)
        one = innermost()
        if one is None or one.head is not module:
            return inner(*args, **kwargs)
        if isinstance(one, Pass):
            return fused_output(one, module, *args)
        return one.observe_head(inner(*args, **kwargs))


def rebound(module: nn.Module, args: tuple) -> tuple[nn.Module, tuple]:
    """The module that is called, and the other arguments.

    accelerate takes a module's forward for a plain function when it unwraps a model, and binds it a second time.
    """
    return (args[0], args[1:]) if args and isinstance(args[0], nn.Module) else (module, args)


def install(module: nn.Module, kind: type) -> None:
    """Let the forward of ``module`` be a ``kind``, inside of the one that accelerate may have put around it."""
    slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
    inner = vars(module).get(slot)
    if not isinstance(inner, kind):
        vars(module)[slot] = kind(module, inner)


def uninstall(module: nn.Module, kind: type) -> None:
    """Undo :func:`install`.  Where another wrapper lies around it, it stays and only calls what it was put around."""
    for slot in ("_old_forward", "forward"):
        installed = vars(module).get(slot)
        if isinstance(installed, kind):
            if installed.inner is None:
                del vars(module)[slot]
            else:
                vars(module)[slot] = installed.inner


def current_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits now: PEFT's trained copy of the head, if there is one and it is in use."""
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
    """Raise ValueError, with the reason, unless ``head`` is its weight and bias and nothing else."""
    if head is None:
        raise ValueError("the model has no output embeddings, so there is no head to fuse; leave fuse_head False")
    kind = type(head)
    if not isinstance(head, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise ValueError(
            f"the output head must be a torch.nn.Linear to be fused; got {kind.__qualname__}{_reason(head)}"
        )
    hooks = [hook for name in _HOOKS for hook in getattr(head, name).values()]
    unknown = [hook for hook in hooks if not _module_of(hook).startswith(TRUSTED_HOOKS)]
    if unknown:
        raise ValueError(
            f"the output head has a hook, {_name_of(unknown[0])}, that would see the loss in place of the logits: "
            f"remove it, or leave fuse_head False"
        )


_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def _module_of(hook: Any) -> str:
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return getattr(hook, "__module__", None) or ""


def _name_of(hook: Any) -> str:
    return f"{_module_of(hook)}.{getattr(hook, '__qualname__', type(hook).__name__)}"


def _reason(head: nn.Module) -> str:
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        return (
            ", an adapter on the head: its logits are the sum of two products, whose merged weight would take as much "
            "memory as the logits and lose the adapter's part to rounding in 16 bits; leave the head out of "
            "target_modules, train a copy of it with modules_to_save, or leave fuse_head False"
        )
    if hasattr(head, "token_adapter"):
        return (
            ": trainable_token_indices replaces rows of the tied head in every pass, which takes a copy of the weight; "
            "leave fuse_head False"
        )
    if "bitsandbytes" in type(head).__module__ or "quant" in type(head).__module__:
        return ", a quantised layer, whose weight is not that of its product; leave fuse_head False"
    return "; leave fuse_head False"


class _GradientOf(torch.autograd.Function):
    """Zeros that pass their gradient on to the value, also if that is infinite."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:  # noqa: ARG004
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


def fused_output(one: Pass, head: nn.Module, hidden: Tensor) -> Tensor:
    """The loss of ``one`` from the input of its head, noted in it; returns its gradient as (1, 1, n) zeros."""
    if one.made is not None:
        raise RuntimeError(
            f"{name_of(one.model)} calls its output head twice in one forward pass, so that its loss cannot be "
            f"made there; leave fuse_head False"
        )
    form = one.form.logits
    bias = head.bias
    if form.bias_name is not None:
        constant = getattr(one.model, form.bias_name).reshape(-1).to(head.weight)
        bias = constant if bias is None else bias + constant
    options = one.keywords(hidden.device) | {"logit_scale": form.scale, "softcap": form.softcap}
    if is_dtensor(head.weight):
        return _sharded_output(one, (hidden, head.weight, bias), options)
    check_weight(head.weight)
    out = linear_caref_loss(hidden, head.weight, one.targets(hidden.device), bias, **options)
    one.made = one.finish(out)
    return _GradientOf.apply(one.made).reshape(1, 1, 1)


def check_weight(weight: Tensor) -> None:
    """Raise ValueError unless ``weight`` is here and whole."""
    if weight.numel() == 0 or weight.dim() != 2 or weight.device.type == "meta":
        raise ValueError(
            f"the weight of the output head is not here in its own forward pass: shape {tuple(weight.shape)} on "
            f"{weight.device}; leave fuse_head False"
        )


def _sharded_output(one: Pass, tensors: tuple[Tensor, Tensor, Tensor | None], options: dict[str, Any]) -> Tensor:
    """:func:`fused_output` where tensor parallelism shards the rows of the weight; (1, 1, ranks), a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    hidden, weight, bias = tensors
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise ValueError(
            f"the weight of the output head must be sharded over the vocabulary on a 1-D mesh, [Shard(0)], to be "
            f"fused; got {list(placements)} on a {mesh.ndim}-D mesh; leave fuse_head False"
        )
    if is_dtensor(hidden):
        hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
    if bias is not None and is_dtensor(bias):
        bias = bias.to_local(grad_placements=bias.placements)
    local = weight.to_local(grad_placements=placements)
    labels = one.targets(hidden.device)
    shard = VocabShard.of_dtensor(weight, 0) if placements[0].is_shard(0) else None
    if shard is not None and bias is not None and bias.numel() != local.size(0):
        bias = bias[shard.first_column : shard.first_column + shard.columns]
    one.made = one.finish(linear_caref_loss(hidden, local, labels, bias, shard=shard, **options))
    # A column for each rank, so that every rank finds one whatever the layer does to its output's placement.
    zeros = _GradientOf.apply(one.made).reshape(1, 1, 1).expand(1, 1, mesh.size())
    return DTensor.from_local(zeros, mesh, [Replicate()], run_check=False)


def joined(one: Pass, logits: Tensor) -> Tensor:
    """The loss that the head has made, with its gradient by way of what the model took for the ``logits``."""
    if is_dtensor(logits):
        from torch.distributed.tensor import Replicate

        logits = logits.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
    if torch.finfo(logits.dtype).bits < torch.finfo(one.made.dtype).bits:
        raise RuntimeError(
            f"the output of the head was cast to {logits.dtype}, in which the gradient of the loss would be rounded "
            f"(an output_dtype of the mixed precision of the head by itself?): set it on the root module alone, or "
            f"leave fuse_head False"
        )
    zero = logits.flatten()[0].to(one.made.dtype)
    return one.made.detach() + (zero - zero.detach()) / one.form.logits.scale
