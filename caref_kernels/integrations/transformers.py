"""The CAREF loss as a transformers model's own: ``model(**batch).loss`` is it, in every training script.

    apply_caref(model, lambda_sced=0.1, lambda_kl=0.1)
    loss = model(**batch).loss      # Trainer, TRL, Accelerate, Lightning, DDP, FSDP2, DeepSpeed, or a loop of your own

``labels``, ``shift_labels`` and ``num_items_in_batch`` mean what they mean to transformers.  With ``fuse_head=True`` a
training pass makes no logits: its outputs have none.  Evaluation, ``generate`` and calls without labels are the model's
own.  In a Trainer, ``attach_caref(trainer)`` applies the loss, checks what the Trainer would contradict and logs the
terms.

Who divides: the loss is the sum over the valid rows divided by ``num_items_in_batch``, or by their number in this batch
if it is not given.  Accumulation steps and ranks that average gradients need a number that counts all of them:
:func:`caref_kernels.integrations.count_items` makes it.

Tested with transformers 5.17 to 5.23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from caref_kernels import CarefConfig

OLDEST_TRANSFORMERS = (5, 17)
_NEEDS = "caref_kernels.integrations.transformers needs transformers >= 5.17 (pip install 'caref_kernels[train]')"

try:
    import transformers
except ImportError as error:
    raise ImportError(_NEEDS) from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    raise ImportError(f"{_NEEDS}; got {transformers.__version__}")

from .heads import HeadForward, all_heads, check_head, current_head, install, uninstall  # noqa: E402 - after the check
from .model_loss import STATE, LossFunction, ModelForward, ModelLoss, refuse_fused_lm_head  # noqa: E402
from .passes import IGNORE_INDEX, TERMS, PassTerms, record_terms  # noqa: E402
from .probe import can_try, find_form  # noqa: E402
from .trainer import TrainerTerms  # noqa: E402

__all__ = ["TERMS", "PassTerms", "apply_caref", "attach_caref", "record_terms", "remove_caref"]


def apply_caref(
    model: nn.Module,
    config: CarefConfig | None = None,
    *,
    fuse_head: bool = False,
    probe_batch: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Make the CAREF loss the loss of ``model``, in place.

    The model is tried on one batch first: how it makes its loss, whether it moves labels by one position and what it
    does to its head's output is observed, in evaluation mode and without gradients.  A model whose weights are sharded
    is tried in its first forward pass with labels instead, on every rank.  Parameters, buffers, configuration,
    ``state_dict`` and ``save_pretrained`` are not changed; ``copy.deepcopy`` and ``torch.save`` keep the loss.  A
    second call replaces the options of the first without another trial, so that a schedule may call it in every step.

    Args:
        model: a transformers model that returns a loss for ``labels``: causal or encoder-decoder, also inside of PEFT,
            DistributedDataParallel, a DeepSpeed engine or ``torch.compile``; before or after ``fully_shard``.
        config: a :class:`caref_kernels.CarefConfig`, or give its fields as keywords.
        fuse_head: compute the loss of a training pass from the head's input, without logits; see
            :func:`caref_kernels.linear_caref_loss` for precision and memory.
        probe_batch: the inputs of one forward pass with labels, for models that cannot run on four tokens alone.
        options: e.g. ``apply_caref(model, lambda_sced=0.05)``.
    Returns:
        ``model`` itself.
    Raises:
        TypeError: ``model`` is not a transformers model.
        TypeError, ValueError: as :class:`caref_kernels.CarefConfig`; and for an option that a model contradicts.
        ValueError: the model's own loss is not cross-entropy of its logits, or its head cannot be fused; the message
            gives the reason.
    """
    if not isinstance(fuse_head, bool):
        raise TypeError(f"fuse_head must be True or False; got {fuse_head!r}")
    base = base_model(model)
    state = ModelLoss(checked_config(config, options), fuse_head)
    before = vars(base).get(STATE)
    if before is None:
        _install(base, state)
    else:
        state.accepted_loss_kwargs = before.accepted_loss_kwargs
        state.form = before.form if before.fuse_head or not fuse_head else None
        vars(base)[STATE] = state
    try:
        if fuse_head:
            check_head(current_head(base))
            for head in all_heads(base):
                install(head, HeadForward)
        if state.form is None and can_try(base):
            state.form = find_form(base, state, probe_batch)
    except BaseException:
        remove_caref(base)
        raise
    return model


def remove_caref(model: nn.Module) -> nn.Module:
    """Give ``model`` its own loss back; nothing happens if it has it.  Returns ``model``."""
    base = base_model(model)
    state = vars(base).pop(STATE, None)
    if state is None:
        return model
    uninstall(base, ModelForward)
    for head in all_heads(base):
        uninstall(head, HeadForward)
    for key, hook in list(base._forward_pre_hooks.items()):
        if hook is refuse_fused_lm_head:
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    if isinstance(base.loss_function, LossFunction):
        own = base.loss_function.own
        if own is None:
            del base._loss_function
        else:
            base.loss_function = own
    vars(base).pop("accepts_loss_kwargs", None)
    if state.accepted_loss_kwargs is not None:
        base.accepts_loss_kwargs = state.accepted_loss_kwargs
    return model


def attach_caref(
    trainer: transformers.Trainer,
    config: CarefConfig | None = None,
    *,
    fuse_head: bool = False,
    probe_batch: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Let ``trainer`` train and evaluate with the CAREF loss, and log its terms.

    Call it once, between making the trainer and ``train()``.  It is :func:`apply_caref` on the trainer's model, and on
    every model that ``model_init`` makes, with what only a Trainer needs:

    - The loss is divided by ``num_items_in_batch``, the labels of all accumulation steps of all processes, for every
      kind of model, so that 1 x 16 and 4 x 4 examples give the same step.
    - Each record of the training loss gets ``ce``, ``sced``, ``kl`` and ``entropy`` (per item, over the same steps),
      each evaluation and prediction ``eval_ce`` and so on.  The terms come from the pass that made the loss, are added
      on the device and read once per record, in a collective that every process reaches.  A metric of the same name is
      kept.

    Args:
        trainer: a ``Trainer``, ``Seq2SeqTrainer`` or subclass whose ``compute_loss`` calls the model with its labels.
        config, fuse_head, probe_batch, options: as in :func:`apply_caref`.
    Raises:
        TypeError: ``trainer`` is not a transformers Trainer.
        ValueError: the trainer has something that would replace the model's loss or scale it wrongly:
            ``compute_loss_func``, ``label_smoothing_factor``, ``use_liger_kernel``, ``nn.DataParallel``, context or
            sequence parallelism; or as in :func:`apply_caref`.
        RuntimeError: in training, if a ``compute_loss`` never asks the model for its loss.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer must be a transformers Trainer; got {type(trainer).__name__}")
    TrainerTerms.check(trainer)
    config = checked_config(config, options)

    def apply(model: nn.Module) -> nn.Module:
        return apply_caref(model, config, fuse_head=fuse_head, probe_batch=probe_batch)

    apply(trainer.model)
    TrainerTerms.install(trainer, apply)


def checked_config(config: CarefConfig | None, options: Mapping[str, Any]) -> CarefConfig:
    """The configuration of a model's loss.

    Raises:
        TypeError, ValueError: see :func:`apply_caref`.
    """
    if config is not None and options:
        raise TypeError(f"give either a CarefConfig or options, not both; got {sorted(options)} besides the config")
    if config is not None and not isinstance(config, CarefConfig):
        raise TypeError(f"config must be a CarefConfig; got {config!r}")
    config = CarefConfig(**options) if config is None else config
    for name, value, reason in (
        ("reduction", "mean", "a model returns one number, and its callers set the divisor"),
        ("ignore_index", IGNORE_INDEX, "transformers' models and Trainer count the labels that differ from it"),
        ("inplace_backward", False, "a model's logits are its output, which others may read"),
    ):
        if getattr(config, name) != value:
            raise ValueError(f"{name} must be {value!r} for a model's loss, {reason}; got {getattr(config, name)!r}")
    return dataclasses.replace(config, return_terms=True)


def base_model(model: nn.Module) -> transformers.PreTrainedModel:
    """The transformers model inside of ``model``: below compilation, engines, data parallelism and PEFT.

    Raises:
        TypeError: there is none.
    """
    base = model
    while not isinstance(base, transformers.PreTrainedModel):
        inner = getattr(base, "_orig_mod", None)
        if inner is None and hasattr(base, "get_base_model"):
            inner = base.get_base_model()
        inner = getattr(base, "module", None) if inner is None else inner
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model must be a transformers model, or a wrapper of one; got {type(model).__name__}")
        base = inner
    return base


def _install(base: transformers.PreTrainedModel, state: ModelLoss) -> None:
    state.accepted_loss_kwargs = vars(base).get("accepts_loss_kwargs")
    vars(base)[STATE] = state
    base.loss_function = LossFunction(base, base.loss_function, vars(base).get("_loss_function"))
    base.accepts_loss_kwargs = True  # num_items_in_batch, whatever the signature of its forward
    install(base, ModelForward)
    base.register_forward_pre_hook(refuse_fused_lm_head, with_kwargs=True)
