"""The CAREF loss as a transformers model's own: every training script gets it as ``model(**batch).loss``.

    apply_caref(model, lambda_sced=0.1, lambda_kl=0.1)
    loss = model(**batch).loss      # Trainer, TRL, Accelerate, Lightning, DDP, FSDP2, DeepSpeed, or a plain loop

``labels``, ``shift_labels`` and ``num_items_in_batch`` mean what they mean to transformers: the loss is the sum over
the valid rows divided by ``num_items_in_batch`` (:func:`caref_kernels.integrations.count_items`), or by the number of
valid rows of the batch.  Evaluation, ``generate`` and calls without labels are the model's own.

Tested with transformers 5.17 to 5.23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from caref_kernels import CarefConfig

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from caref_kernels.keywords import ConfigKeywords

OLDEST_TRANSFORMERS = (5, 17)
_NEEDS = "caref_kernels.integrations.transformers needs transformers >= 5.17 (pip install 'caref_kernels[train]')"

try:
    import transformers
except ImportError as error:
    raise ImportError(_NEEDS) from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    raise ImportError(f"{_NEEDS}; got {transformers.__version__}")

from .heads import HeadForward, all_heads, check_head, current_head  # noqa: E402 - after the check
from .model_loss import STATE, LossFunction, ModelForward, ModelLoss, refuse_fused_lm_head  # noqa: E402
from .passes import IGNORE_INDEX, TERMS, PassTerms, record_terms  # noqa: E402
from .probe import can_probe, find_form  # noqa: E402
from .trainer import TrainerTerms, check_trainer  # noqa: E402

__all__ = ["TERMS", "PassTerms", "apply_caref", "attach_caref", "record_terms", "remove_caref"]


def apply_caref(
    model: nn.Module,
    config: CarefConfig | None = None,
    *,
    fuse_head: bool = False,
    probe_batch: Mapping[str, Any] | None = None,
    **options: Unpack[ConfigKeywords],
) -> nn.Module:
    """Make the CAREF loss the loss of ``model``, in place.

    A probe run on one batch, in evaluation mode and without gradients, shows how the model computes its loss, whether
    it shifts labels by one position and what it does to its head's output.  A model whose weights are sharded is probed
    in its first forward pass with labels instead, on every rank.  Parameters, buffers, configuration, ``state_dict``
    and ``save_pretrained`` are not changed; ``copy.deepcopy`` and ``torch.save`` keep the loss.  A second call replaces
    the options of the first without another probe run, so that a schedule may call it in every step.  A batch may have
    ``token_weights`` of the shape of its labels (a Trainer hands them on with ``remove_unused_columns=False``).

    Args:
        model: a transformers model that returns a loss for ``labels``: causal or encoder-decoder, also inside of PEFT,
            DistributedDataParallel, a DeepSpeed engine or ``torch.compile``; before or after ``fully_shard``.
        config: a :class:`caref_kernels.CarefConfig`, or give its fields as keywords.
        fuse_head: compute the loss of a training pass from the head's input; its outputs have no logits.  See
            :func:`caref_kernels.linear_caref_loss` for precision and memory.
        probe_batch: the inputs of one forward pass with labels, for models that cannot run on four tokens alone.
        options: e.g. ``apply_caref(model, lambda_sced=0.05)``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a transformers model; or as :class:`caref_kernels.CarefConfig`.
        ValueError: the model's own loss is not cross-entropy of its logits, its head cannot be fused, or an option
            contradicts the model, with the reason in the message; or as :class:`caref_kernels.CarefConfig`.
    """
    if not isinstance(fuse_head, bool):
        raise TypeError(f"fuse_head must be True or False; got {fuse_head!r}")
    base = base_model(model)
    config = checked_config(config, options)
    state = vars(base).get(STATE)
    if state is None:
        state = _install(base, config, fuse_head)
    else:
        form = state.form if state.fuse_head or not fuse_head else None
        state = vars(base)[STATE] = dataclasses.replace(state, config=config, fuse_head=fuse_head, form=form)
    try:
        if fuse_head:
            check_head(current_head(base))
            for head in all_heads(base):
                HeadForward.install(head)
        if state.form is None and can_probe(base):
            state.form = find_form(base, state, probe_batch)
    except BaseException:
        remove_caref(base)
        raise
    return model


def _install(base: transformers.PreTrainedModel, config: CarefConfig, fuse_head: bool) -> ModelLoss:
    replaced = {name: vars(base)[name] for name in ("_loss_function", "accepts_loss_kwargs") if name in vars(base)}
    vars(base)[STATE] = state = ModelLoss(config, fuse_head, None, replaced)
    base.loss_function = LossFunction(base, base.loss_function)
    base.accepts_loss_kwargs = True  # num_items_in_batch, whatever the signature of its forward
    ModelForward.install(base)
    base.register_forward_pre_hook(refuse_fused_lm_head, with_kwargs=True)
    return state


def remove_caref(model: nn.Module) -> nn.Module:
    """Restore the loss that ``model`` had before :func:`apply_caref`, if it was applied.

    Args:
        model: as in :func:`apply_caref`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a transformers model.
    """
    base = base_model(model)
    state = vars(base).pop(STATE, None)
    if state is None:
        return model
    ModelForward.uninstall(base)
    for head in all_heads(base):
        HeadForward.uninstall(head)
    for key, hook in list(base._forward_pre_hooks.items()):
        if hook is refuse_fused_lm_head:
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    restored = dict(state.replaced)
    if isinstance(base.loss_function, LossFunction):
        del base._loss_function
    else:  # another one was set since
        restored.pop("_loss_function", None)
    vars(base).pop("accepts_loss_kwargs", None)
    vars(base).update(restored)
    return model


def attach_caref(
    trainer: transformers.Trainer,
    config: CarefConfig | None = None,
    *,
    fuse_head: bool = False,
    probe_batch: Mapping[str, Any] | None = None,
    **options: Unpack[ConfigKeywords],
) -> None:
    """Let ``trainer`` train and evaluate with the CAREF loss, and log its terms.

    Call it once, between making the trainer and ``train()``.  It applies :func:`apply_caref` to the trainer's model and
    to every model that ``model_init`` makes, and adds what a Trainer needs:

    - The loss is divided by ``num_items_in_batch``, the labels of all accumulation steps of all processes, for every
      kind of model, so that 1 x 16 and 4 x 4 examples give the same step.
    - Each record of the training loss gets ``ce``, ``sced``, ``kl`` and ``entropy`` (per item, over the same steps),
      each evaluation and prediction ``eval_ce`` and so on.  The terms come from the pass that computed the loss, are
      added on the device and read once per record, in a collective that every process reaches.  A metric of the same
      name is kept.
    - The ``label_smoothing_factor`` of the trainer's arguments becomes the ``label_smoothing`` of the loss.

    Args:
        trainer: a ``Trainer``, ``Seq2SeqTrainer`` or subclass whose ``compute_loss`` calls the model with its labels.
        config: as in :func:`apply_caref`.
        fuse_head: as in :func:`apply_caref`.
        probe_batch: as in :func:`apply_caref`.
        options: as in :func:`apply_caref`.

    Raises:
        TypeError: ``trainer`` is not a transformers Trainer; or as :func:`apply_caref`.
        ValueError: the trainer has something that would replace the model's loss or scale it wrongly:
            ``compute_loss_func``, a ``label_smoothing_factor`` that is not the loss's, ``use_liger_kernel``,
            ``nn.DataParallel``, context or sequence parallelism; or as :func:`apply_caref`.
        RuntimeError: in training, if a ``compute_loss`` never calls the model with its labels.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer must be a transformers Trainer; got {type(trainer).__name__}")
    config = checked_config(config, options)
    if config.label_smoothing == 0:
        config = dataclasses.replace(config, label_smoothing=trainer.args.label_smoothing_factor)
    check_trainer(trainer, config.label_smoothing)

    def apply(model: nn.Module) -> nn.Module:
        return apply_caref(model, config, fuse_head=fuse_head, probe_batch=probe_batch)

    apply(trainer.model)
    TrainerTerms.install(trainer, apply, config.label_smoothing)


def checked_config(config: CarefConfig | None, options: Mapping[str, Any]) -> CarefConfig:
    """The configuration of a model's loss; raises the errors of :func:`apply_caref`."""
    if config is None:
        config = CarefConfig(**options)
    elif options:
        raise TypeError(f"give either a CarefConfig or options, not both; got {sorted(options)} besides the config")
    elif not isinstance(config, CarefConfig):
        raise TypeError(f"config must be a CarefConfig; got {config!r}")
    for name, value, reason in (
        ("shift", False, "a probe run shows whether the model shifts its labels"),
        ("reduction", "mean", "a model returns one number, and its callers set the divisor"),
        ("ignore_index", IGNORE_INDEX, "transformers' models and Trainer count the labels that differ from it"),
        ("inplace_backward", False, "a model's logits are its output, which others may read"),
    ):
        if getattr(config, name) != value:
            raise ValueError(f"{name} must be {value!r} for a model's loss, {reason}; got {getattr(config, name)!r}")
    return dataclasses.replace(config, return_terms=True)


def base_model(model: nn.Module) -> transformers.PreTrainedModel:
    """The transformers model below compilation, engines, data parallelism and PEFT, or TypeError if there is none."""
    base = model
    while not isinstance(base, transformers.PreTrainedModel):
        if hasattr(base, "get_base_model"):
            base = base.get_base_model()
        else:
            base = getattr(base, "_orig_mod", getattr(base, "module", None))
        if not isinstance(base, nn.Module):
            raise TypeError(f"model must be a transformers model, or a wrapper of one; got {type(model).__name__}")
    return base
