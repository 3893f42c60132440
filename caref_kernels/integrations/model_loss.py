"""The CAREF loss as a model's own: its forward pass, its ``loss_function``, and what they know of the model.

A model of transformers makes its loss in one of two ways.  Most causal models call ``self.loss_function``, which may be
set: they add router losses themselves, and the loss takes part in everything that happens to the model's own.  Most
encoder-decoder models have cross-entropy written into their forward: their labels are held back and the loss is put
into the outputs afterwards.  Which of the two it is, and whether labels are moved by one position, is found out by a
trial on one batch (probe.py), not from the name of a class.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from caref_kernels import CarefConfig, caref_loss

from .heads import HeadForward, check_head, current_head, install, joined, rebound
from .passes import LossForm, Pass, Trial, innermost, is_dtensor, name_of, running

STATE = "_caref"  # the attribute of a model that holds its ModelLoss
# Outputs with losses that a model adds where it has the labels.
_OWN_LOSSES = ("aux_loss", "z_loss")


@dataclass
class ModelLoss:
    """The loss of one model.

    Attributes:
        config: with reduction "mean" and return_terms True.
        fuse_head: whether training makes the loss inside of the head.
        form: ``None`` while it is unknown: a model whose weights are sharded is tried in its first forward pass.
        accepted_loss_kwargs: the attribute ``accepts_loss_kwargs`` that the model had itself, or ``None``.
    """

    config: CarefConfig
    fuse_head: bool
    form: LossForm | None = None
    accepted_loss_kwargs: bool | None = None


class LossFunction:
    """What a model calls as ``self.loss_function``.

    ``original`` is what it called before, ``own`` the same if it was set on this model and is not that of its class.
    """

    def __init__(self, model: nn.Module, original: Any, own: Any) -> None:
        self.model, self.original, self.own = model, original, own

    def __call__(
        self, logits: Tensor, labels: Tensor | None = None, vocab_size: int | None = None, **kwargs: Any
    ) -> Any:
        """The CAREF loss of ``logits`` (B, T, V), a scalar; the arguments are those of transformers' losses."""
        one, state = innermost(), vars(self.model)[STATE]
        if one is None or one.model is not self.model:
            if state.fuse_head and self.model.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name_of(self.model)}.loss_function was called outside of the model's forward pass, where "
                    f"its head cannot be fused: call the model, or apply_caref without fuse_head"
                )
            form = state.form or LossForm(asks=True, shift=True, logits=None)
            one = Pass(self.model, state.config, form, {"labels": labels, **kwargs})
        elif isinstance(one, Trial):
            return one.observe_loss(self.original, logits, labels, vocab_size=vocab_size, **kwargs)
        if labels is not None:  # the model may have changed them: virtual tokens, image tokens
            one.labels = labels
        one.was_asked = True
        return loss_of_pass(one, logits)


def loss_of_pass(one: Pass, logits: Tensor) -> Tensor:
    """The loss of ``one``, made by its head or from its logits."""
    if one.head is not None:
        if one.made is None:
            raise RuntimeError(
                f"{name_of(one.model)} made its logits without calling its output head, so its head cannot be "
                f"fused; leave fuse_head False"
            )
        return joined(one, logits)
    targets, options = one.targets(logits.device), one.keywords(logits.device)
    if is_dtensor(logits) and all(placement.is_replicate() for placement in logits.placements):
        logits = logits.to_local(grad_placements=logits.placements)
    return one.finish(caref_loss(logits, targets, **options))


class ModelForward:
    """The ``forward`` of one model, whose outputs have the CAREF loss wherever the batch has labels.

    Kept in the model's ``__dict__``, so that copies and pickles of the model have their own.
    """

    def __init__(self, module: nn.Module, inner: Any) -> None:
        self.module, self.inner = module, inner
        parameters = inspect.signature(self._inner_of(module)).parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        self.takes_any = len(self.names) < len(parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class, which a Trainer reads to know the columns of its data set."""
        return inspect.signature(self._inner_of(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :class:`ModelForward`."""
        model, args = rebound(self.module, args)
        inner = self._inner_of(model)
        state = vars(model).get(STATE)
        one = innermost()
        # A trial, or a wrapper that a removal could not reach and a second apply has put another one around.
        if state is None or (one is not None and one.model is model):
            return inner(*args, **kwargs)
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if kwargs.get("labels") is None:
            return inner(**kwargs)
        if state.form is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{name_of(model)} was sharded before apply_caref, so that it is tried in its first forward pass "
                    f"with labels, which cannot be a compiled one: run one batch first, or apply_caref before sharding"
                )
            from .probe import find_form  # late: probe.py builds on this module

            state.form = find_form(model, state, kwargs)
        one = Pass(model, state.config, state.form, kwargs)
        if state.fuse_head and model.training and torch.is_grad_enabled():
            one.head = current_head(model)
            check_head(one.head)
            install(one.head, HeadForward)  # again, for a head that was replaced since
        wants_dict = kwargs.get("return_dict")
        if wants_dict is None:
            wants_dict = getattr(model.config, "return_dict", True)
        if self.takes_any or "return_dict" in self.names:
            kwargs["return_dict"] = True
        if not state.form.asks:
            kwargs = self.without_labels(model, kwargs)
        with running(one):
            output = inner(**kwargs)
            output = with_loss(one, output)
        return output if wants_dict else output.to_tuple()

    def _inner_of(self, model: nn.Module) -> Any:
        return self.inner or type(model).forward.__get__(model)

    def without_labels(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a model that would compute a loss of its own, with what it derives from its labels."""
        kwargs = dict(kwargs)
        labels = kwargs.pop("labels")
        if not self.takes_any:
            for name in {"num_items_in_batch", "shift_labels"} - set(self.names):
                kwargs.pop(name, None)
        if model.config.is_encoder_decoder and not any(
            kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")
        ):
            kwargs["decoder_input_ids"] = decoder_inputs(model, labels)
        return kwargs


def forward_of(model: nn.Module) -> ModelForward:
    """What :func:`caref_kernels.integrations.heads.install` has put into ``model``."""
    values = (getattr(value, "__func__", value) for value in vars(model).values())
    return next(value for value in values if isinstance(value, ModelForward))


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """What an encoder-decoder model makes of its labels if it is given no decoder inputs.

    Raises:
        ValueError: the model has neither of the two functions that models have for it.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    modules = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    shift = next((module.shift_tokens_right for module in modules if hasattr(module, "shift_tokens_right")), None)
    if shift is None:
        raise ValueError(
            f"{name_of(model)} does not say how it makes decoder_input_ids from labels: pass them in the batch"
        )
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


def with_loss(one: Pass, output: Any) -> Any:
    """The outputs of the model with the loss of ``one``, and without the logits of a fused head."""
    model = name_of(one.model)
    if not isinstance(output, dict) or "logits" not in output:
        raise TypeError(
            f"{model} must return a ModelOutput with logits for the CAREF loss; got {type(output).__name__}"
        )
    changed: dict[str, Any] = {}
    if not one.form.asks:
        dropped = [name for name in output if name.endswith(_OWN_LOSSES) and output[name] is not None]
        if dropped:
            raise ValueError(
                f"{model} adds losses of its own to its cross-entropy, {', '.join(dropped)}, which would be lost: turn "
                f"them off (output_router_logits=False), or compute the loss from the logits with caref_loss"
            )
        changed["loss"] = loss_of_pass(one, output["logits"])
    elif not one.was_asked:
        raise RuntimeError(
            f"{model} made a loss without asking its loss_function, which apply_caref has set: its forward was "
            f"replaced after apply_caref (a Liger kernel?)"
        )
    if one.head is not None:
        changed["logits"] = None
    return type(output)(**{**output, **changed}) if changed else output


def refuse_fused_lm_head(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
    """A forward pre-hook: TRL puts a forward of its own around the model's, which would never reach its loss.

    Raises:
        ValueError: the model is asked for log-probabilities, from which plain cross-entropy would be trained.
    """
    if kwargs.get("fused_lm_head"):
        raise ValueError(
            f"{name_of(model)} has the CAREF loss, but was asked for the log-probabilities of its labels "
            f"(fused_lm_head=True), as TRL's SFTTrainer does, which would train plain cross-entropy: use "
            f"caref_kernels.integrations.trl.CarefSFTTrainer, or remove_caref(model)"
        )
