"""The head of a loaded transformers model, fused with the loss: in training the (B, T, V) logits are never made.

    with fused_head(model) as head:
        outputs = model(**inputs)                 # training mode, without labels
        loss = head.loss(outputs, labels)         # CarefConfig's options as keywords

Two hooks on the model let its head pass on what it gets, so that ``outputs.logits`` is the head's input (B, T, D), and
:meth:`FusedHead.loss` does the rest with ``linear_caref_loss``.  No module is replaced and no class is touched; between
two forward passes the model is as it was, and :meth:`FusedHead.remove`, or the end of the ``with``, takes the hooks
off.

- Only a forward pass in training mode with gradients enabled is changed: evaluation and ``generate()`` are not.
- PEFT may wrap the model before or after.  The head is looked up in every pass, so an adapter that trains a copy of it
  (``modules_to_save``) is followed, and one that adds to its output (LoRA on the head) is refused.
- The classes of ``HEADS`` are known to do nothing to the logits that the loss would miss, except to scale the head's
  input (T5) or to add a constant bias (BART), which is carried over.  Every model is checked on one batch when it is
  fused: the fused head must give the logits that the model gives.
- Gradients of the head's parameters come from outside of the model's forward pass.  DistributedDataParallel copes with
  that unless ``find_unused_parameters=True``; sharded weights (FSDP, ZeRO-3) are refused.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from caref_kernels import CarefConfig, CarefLoss, CarefOutput, LinearCarefLoss

# Class of the model: the buffer that it adds to the logits, or None.
HEADS: dict[str, str | None] = {
    "BartForConditionalGeneration": "final_logits_bias",
    "GPT2LMHeadModel": None,
    "Gemma2ForCausalLM": None,
    "Gemma3ForCausalLM": None,
    "GemmaForCausalLM": None,
    "LlamaForCausalLM": None,
    "MBartForConditionalGeneration": "final_logits_bias",
    "MT5ForConditionalGeneration": None,
    "MarianMTModel": "final_logits_bias",
    "MistralForCausalLM": None,
    "Qwen2ForCausalLM": None,
    "Qwen3ForCausalLM": None,
    "SmolLM3ForCausalLM": None,
    "T5ForConditionalGeneration": None,
}
# Rounding steps by which the logits of the one batch may differ, relative to the largest.
CHECK_STEPS = 16


def fused_head(model: nn.Module, *, batch: Mapping[str, Tensor] | None = None) -> FusedHead:
    """Fuse the head of ``model``; see the module's docstring.

    Args:
        model: a transformers model of a class in ``HEADS``, or a PEFT model of one; not wrapped by anything else.
        batch: inputs of a forward pass without labels, for the check; by default four tokens.
    Returns:
        The :class:`FusedHead`, which is its own context manager.
    Raises:
        TypeError: ``model`` is neither.
        ValueError: its class is not in ``HEADS``, it caps its logits, its head is not a plain linear layer (an adapter
            or a quantised one) or is sharded, it is fused already, or the check fails.  The message gives the reason.
    """
    return FusedHead(model, batch=batch)


class FusedHead:
    """The hooks of one model, and the loss of its outputs; made by :func:`fused_head`.

    Attributes:
        model: the transformers model inside.
    """

    def __init__(self, model: nn.Module, *, batch: Mapping[str, Tensor] | None = None) -> None:
        self.model = _base_model(model)
        self._bias_name = HEADS[type(self.model).__name__]
        self._probing = False
        self._active: list[tuple[nn.Module, Tensor | None]] = []  # head and bias of the pass that is running
        self._head: nn.Module | None = None  # of the last changed pass
        self._autocast: tuple[str, torch.dtype, bool] | None = None
        self._modules: dict[CarefConfig, tuple[CarefLoss, LinearCarefLoss]] = {}
        check_head(_current_head(self.model))
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]
        self.model._caref_fused_head = True
        try:
            self._check_on(batch)
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off; what is left is the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.model.__dict__.pop("_caref_fused_head", None)

    def loss(
        self,
        outputs: Any,
        labels: Tensor,
        num_items: float | Tensor | None = None,
        *,
        config: CarefConfig | None = None,
        shift: bool | None = None,
        **options: Any,
    ) -> Tensor | CarefOutput:
        """The CAREF loss of the model's outputs.

        Args:
            outputs: of the model, in training or evaluation mode: a mapping with ``logits``, or those themselves.
            labels: (B, T), -100 (``ignore_index``) where no token is to be predicted.
            num_items: as in :func:`caref_kernels.caref_loss`.
            config, options: a :class:`caref_kernels.CarefConfig`, or its fields as keywords.
            shift: whether position i is scored with label i + 1; ``None``: yes unless the model is an encoder-decoder.
        Raises:
            TypeError, ValueError, IndexError: as :func:`caref_kernels.linear_caref_loss`.
        """
        config = CarefConfig(**options) if config is None else config
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
        labels = labels.to(logits.device)
        if not self.model.config.is_encoder_decoder if shift is None else shift:
            labels = F.pad(labels, (0, 1), value=config.ignore_index)[..., 1:]
        if config not in self._modules:
            self._modules[config] = CarefLoss(config), LinearCarefLoss(config)
        from_logits, from_hidden = self._modules[config]
        head = self._head
        if head is None or logits.size(-1) != head.weight.size(1):
            return from_logits(logits, labels, num_items)
        kind, dtype, enabled = self._autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):  # as in the model, whose products these are
            return from_hidden(logits, head.weight, labels, self._bias(head), num_items)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if not (self._probing or (model.training and torch.is_grad_enabled())):
            return
        if kwargs.get("labels") is not None:
            raise ValueError(
                "labels must not be given to a model whose head is fused, whose own loss would take the hidden states "
                "for logits: give them to FusedHead.loss (an encoder-decoder model then needs decoder_input_ids, e.g. "
                "from model.prepare_decoder_input_ids_from_labels(labels))"
            )
        head = _current_head(model)
        check_head(head)
        bias = None
        if self._bias_name is not None:
            bias = getattr(model, self._bias_name)
            setattr(model, self._bias_name, bias.new_zeros(1, 1))
        head.forward = types.MethodType(self._pass_on, head)
        self._active.append((head, bias))

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG002
        if self._active:
            head, bias = self._active.pop()
            del head.forward
            if bias is not None:
                setattr(model, self._bias_name, bias)

    def _pass_on(self, head: nn.Module, hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        self._head = head
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return hidden

    def _bias(self, head: nn.Linear) -> Tensor | None:
        if self._bias_name is None:
            return head.bias
        constant = getattr(self.model, self._bias_name).reshape(-1).to(head.weight)
        return constant if head.bias is None else head.bias + constant

    def _check_on(self, batch: Mapping[str, Tensor] | None) -> None:
        """The head applied to what it would get must be the model's logits."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                inputs = self._four_tokens() if batch is None else batch
                logits = self.model(**inputs).logits
                self._probing = True
                hidden = self.model(**inputs).logits
                again = F.linear(hidden, self._head.weight, self._bias(self._head))
        finally:
            self._probing, self._head = False, None
            for module, training in modes.items():
                module.training = training
        error = (again.float() - logits.float()).abs().max() / logits.float().abs().max()
        allowed = CHECK_STEPS * torch.finfo(again.dtype).eps
        if not error <= allowed:
            raise ValueError(
                f"the head of {type(self.model).__name__} cannot be fused: on one batch its logits differ from "
                f"weight * hidden + bias by {float(error):.3g} of the largest, {allowed:.3g} is allowed; something "
                f"else is done to them"
            )

    def _four_tokens(self) -> dict[str, Tensor]:
        config = self.model.config
        head = _current_head(self.model)
        tokens = torch.arange(1, 5, device=head.weight.device)[None] % config.get_text_config().vocab_size
        return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})


def check_head(head: nn.Module) -> None:
    """Raise ValueError unless ``head`` is a linear layer that is its weight and bias and nothing else."""
    kind = type(head)
    if kind is not nn.Linear:
        adapted = hasattr(head, "base_layer") or "lora" in kind.__module__.lower()
        reason = "an adapter on the head, whose part of the logits and gradient would be lost" if adapted else "unknown"
        raise ValueError(f"the output head must be a torch.nn.Linear to be fused; got {kind.__qualname__} ({reason})")
    if "forward" in vars(head) or nn.utils.parametrize.is_parametrized(head):
        raise ValueError("the output head must be a plain torch.nn.Linear to be fused; its forward pass is replaced")
    weight = head.weight
    if type(weight).__name__ == "DTensor" or type(weight.data).__name__ == "DTensor":
        raise ValueError(
            "the weight of the output head is a DTensor (FSDP2 or tensor parallelism): outside of the model's forward "
            "pass this rank has a part of it; use the loss on logits, or vocab_parallel_linear_caref_loss"
        )
    if weight.numel() == 0 or weight.dim() != 2 or weight.device.type == "meta":
        raise ValueError(
            f"the weight of the output head is not here: shape {tuple(weight.shape)} on {weight.device} (a ZeRO-3 or "
            f"FSDP shard, or offloaded); use the loss on logits"
        )
    if weight.size(0) == weight.size(1):
        raise ValueError(f"a head of V = D = {weight.size(0)} cannot be fused: its input and output look alike")


def _current_head(model: nn.Module) -> nn.Module:
    """The module that makes the logits now: PEFT's trained copy of the head, if there is one and it is in use."""
    head = model.get_output_embeddings()
    if type(head).__name__ != "ModulesToSaveWrapper":
        return head
    adapters = head.active_adapters
    return head.modules_to_save[adapters[0]] if adapters and not head.disable_adapters else head.original_module


def _base_model(model: nn.Module) -> transformers.PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, transformers.PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model, or a PEFT model of one, before any other wrapper; got "
            f"{type(model).__name__}"
        )
    name = type(base).__name__
    if name not in HEADS:
        raise ValueError(
            f"the head of {name} is not known to be safe to fuse; those of {', '.join(HEADS)} are.  Use the loss on "
            f"logits (attach_caref without fuse_head, or caref_loss)"
        )
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"{name} caps its logits, final_logit_softcapping = {cap}, which the fused head does not do: use the loss "
            f"on logits, or set it to None if the checkpoint is trained without"
        )
    if hasattr(base, "_caref_fused_head"):
        raise ValueError(f"the head of this {name} is fused already; remove() that one first")
    return base
