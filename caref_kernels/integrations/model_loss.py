"""The CAREF loss as a model's own: its forward pass, its ``loss_function``, and what they know of the model.

A model of transformers computes its loss in one of two ways.  Most causal models call ``self.loss_function``, which is
replaced; they add router losses to it themselves.  Most encoder-decoder models have cross-entropy written into their
forward: their labels are held back and the loss is put into the outputs afterwards.  A probe run (probe.py) finds out
which of the two it is, and whether labels are shifted by one position.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from caref_kernels import CarefConfig, caref_loss

from .heads import HeadForward, WrappedForward, check_head, current_head, loss_of_head
from .passes import ForwardPass, LossForm, ProbeRun, current_pass, is_dtensor, name_of, running, whole

STATE = "_caref"  # the attribute of a model that holds its ModelLoss
_ADDED_LOSSES = ("aux_loss", "z_loss")  # endings of the names of outputs that a model adds to its loss


@dataclass
class ModelLoss:
    """The loss of one model.

    Attributes:
        config: with reduction "mean" and return_terms True.
        fuse_head: whether training computes the loss inside of the head.
        form: ``None`` while it is unknown: a model whose weights are sharded is probed in its first forward pass.
        replaced: the attributes of the model that were set on it before, and are restored when the loss is removed.
    """

    config: CarefConfig
    fuse_head: bool
    form: LossForm | None
    replaced: dict[str, Any]

    def fuses(self, model: nn.Module) -> bool:
        """Whether a forward pass of ``model`` computes its loss in the head: in training alone."""
        return self.fuse_head and model.training and torch.is_grad_enabled()


class LossFunction:
    """The ``loss_function`` of a model; ``original`` is the one that the model called before."""

    def __init__(self, model: nn.Module, original: Callable) -> None:
        self.model, self.original = model, original

    def __call__(
        self, logits: Tensor, labels: Tensor | None = None, vocab_size: int | None = None, **kwargs: Any
    ) -> Any:
        """The CAREF loss of ``logits`` (B, T, V), a scalar; the arguments are those of transformers' losses."""
        forward_pass, state = current_pass(), vars(self.model)[STATE]
        if forward_pass is None or forward_pass.model is not self.model:
            if state.fuses(self.model):
                raise RuntimeError(
                    f"{name_of(self.model)}.loss_function was called outside of the model's forward pass, where "
                    f"its head cannot be fused: call the model, or apply_caref without fuse_head"
                )
            form = state.form or LossForm(calls_loss_function=True, shift=True, logits=None)
            forward_pass = ForwardPass(self.model, state.config, form, {"labels": labels, **kwargs})
        elif isinstance(forward_pass, ProbeRun):
            return forward_pass.observe_loss(self.original, logits, labels, vocab_size=vocab_size, **kwargs)
        if labels is not None:  # the model may have changed them: virtual tokens, image tokens
            forward_pass.labels = labels
        forward_pass.called_loss_function = True
        return _loss_of(forward_pass, logits)


def _loss_of(forward_pass: ForwardPass, logits: Tensor) -> Tensor:
    """The loss of a forward pass, computed by its head or from its logits."""
    if forward_pass.head is None:
        options = forward_pass.loss_options(logits.device)
        if is_dtensor(logits) and all(placement.is_replicate() for placement in logits.placements):
            logits = whole(logits)
        return forward_pass.finish(caref_loss(logits, forward_pass.targets(logits.device), **options))
    if forward_pass.head_loss is None:
        raise RuntimeError(
            f"{name_of(forward_pass.model)} made its logits without calling its output head, so its head cannot be "
            f"fused; leave fuse_head False"
        )
    return loss_of_head(forward_pass, logits)


class ModelForward(WrappedForward):
    """The ``forward`` of a model, whose outputs have the CAREF loss wherever the batch has labels."""

    def __init__(self, module: nn.Module, inner: Callable | None) -> None:
        super().__init__(module, inner)
        parameters = self.__signature__.parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        self.takes_any = len(self.names) < len(parameters)

    @classmethod
    def of(cls, model: nn.Module) -> ModelForward:
        """The instance that is installed in ``model``, also where accelerate has moved it to another attribute."""
        values = (getattr(value, "__func__", value) for value in vars(model).values())
        return next(value for value in values if isinstance(value, cls))

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the inner forward, which a Trainer reads to know the columns of its data set."""
        return inspect.signature(self.called(())[1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the model; the arguments are those of the inner forward."""
        model, inner, args = self.called(args)
        state, outer = vars(model).get(STATE), current_pass()
        # A probe run; or this wrapper could not be removed, and a second apply_caref has put another one around it.
        if state is None or (outer is not None and outer.model is model):
            return inner(*args, **kwargs)
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        token_weights = kwargs.pop("token_weights", None)
        if kwargs.get("labels") is None:
            return inner(**kwargs)
        if state.form is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{name_of(model)} was sharded before apply_caref, so that it is tried in its first forward pass "
                    f"with labels, which cannot be a compiled one: run one batch first, or apply_caref before sharding"
                )
            from .probe import find_form  # late: probe.py imports this module

            state.form = find_form(model, state, kwargs)
        forward_pass = ForwardPass(model, state.config, state.form, {**kwargs, "token_weights": token_weights})
        if state.fuses(model):
            forward_pass.head = current_head(model)
            check_head(forward_pass.head)
            HeadForward.install(forward_pass.head)  # again, in case that the head was replaced since
        returns_dict = kwargs.get("return_dict")
        if returns_dict is None:
            returns_dict = getattr(model.config, "return_dict", True)
        if self.takes_any or "return_dict" in self.names:
            kwargs["return_dict"] = True
        if not state.form.calls_loss_function:
            kwargs = self.without_labels(model, kwargs)
        with running(forward_pass):
            output = _with_loss(forward_pass, inner(**kwargs))
        return output if returns_dict else output.to_tuple()

    def without_labels(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """``kwargs`` without the labels, but with the decoder inputs that the model would derive from them."""
        kwargs = dict(kwargs)
        labels = kwargs.pop("labels")
        if not self.takes_any:
            for name in {"num_items_in_batch", "shift_labels"} - set(self.names):
                kwargs.pop(name, None)
        if model.config.is_encoder_decoder and not any(
            kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")
        ):
            kwargs["decoder_input_ids"] = _decoder_inputs(model, labels)
        return kwargs


def _decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """The ``decoder_input_ids`` that an encoder-decoder model derives from its labels if the batch has none."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    modules = (sys.modules.get(base.__module__) for base in type(model).__mro__)
    shift = next((module.shift_tokens_right for module in modules if hasattr(module, "shift_tokens_right")), None)
    if shift is None:
        raise ValueError(
            f"{name_of(model)} does not say how it makes decoder_input_ids from labels: pass them in the batch"
        )
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


def _with_loss(forward_pass: ForwardPass, output: Any) -> Any:
    """The outputs of the model with the loss of its forward pass, and without the logits of a fused head."""
    model = name_of(forward_pass.model)
    if not isinstance(output, dict) or "logits" not in output:
        raise TypeError(
            f"{model} must return a ModelOutput with logits for the CAREF loss; got {type(output).__name__}"
        )
    changed: dict[str, Any] = {}
    if not forward_pass.form.calls_loss_function:
        lost = [name for name in output if name.endswith(_ADDED_LOSSES) and output[name] is not None]
        if lost:
            raise ValueError(
                f"{model} adds losses of its own to its cross-entropy, {', '.join(lost)}, which would be lost: turn "
                f"them off (output_router_logits=False), or compute the loss from the logits with caref_loss"
            )
        changed["loss"] = _loss_of(forward_pass, output["logits"])
    elif not forward_pass.called_loss_function:
        raise RuntimeError(
            f"{model} made a loss without asking its loss_function, which apply_caref has set: its forward was "
            f"replaced after apply_caref (a Liger kernel?)"
        )
    if forward_pass.head is not None:
        changed["logits"] = None
    return type(output)(**{**output, **changed}) if changed else output


def refuse_fused_lm_head(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
    """A forward pre-hook that raises ValueError where TRL wants log-probabilities, to train plain cross-entropy.

    TRL puts a forward of its own around that of the model, which would never reach the model's loss.
    """
    if kwargs.get("fused_lm_head"):
        raise ValueError(
            f"{name_of(model)} has the CAREF loss, but was asked for the log-probabilities of its labels "
            f"(fused_lm_head=True), as TRL's SFTTrainer does, which would train plain cross-entropy: use "
            f"caref_kernels.integrations.trl.CarefSFTTrainer, or remove_caref(model)"
        )
