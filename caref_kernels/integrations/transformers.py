"""The CAREF loss in a transformers ``Trainer`` or ``Seq2SeqTrainer``: one line, no subclass, no patched module.

    trainer = Seq2SeqTrainer(model=model, args=args, ...)        # as before
    attach_caref(trainer, lambda_sced=0.1, lambda_kl=0.1)        # the one line
    trainer.train()

What the line does, and what to know about it:

- The trainer pops the labels and runs the model once, without its own loss; the loss is computed from those logits.  An
  encoder-decoder model therefore needs ``decoder_input_ids`` in its batches: give the model to the collator,
  ``DataCollatorForSeq2Seq(tokenizer, model=model)``.
- The loss is divided by ``num_items_in_batch``, the labels of all accumulation steps of all processes, so 1 x 16 and
  4 x 4 examples give the same step.  Neither accumulation steps nor processes appear here: the trainer sees to them.
- Each record of the training loss also gets ``ce``, ``sced``, ``kl`` and ``entropy`` (per item, over the same steps),
  each evaluation record ``eval_ce`` and so on.  The terms come from the pass that made the loss, are summed on the
  device, and are read once per record.
- Evaluation uses the same loss, unless ``Seq2SeqTrainer`` generates (``predict_with_generate=True`` and a
  ``compute_metrics``): then it never calls a ``compute_loss_func``, ``eval_loss`` is the model's own cross-entropy,
  which is not comparable, and the record gets no terms.
- Under ``bf16=True`` or ``fp16=True`` accelerate hands over a float32 copy of the logits, of twice their size.
- ``attach_caref(trainer, fuse_head=True)`` makes no logits at all in training: see transformers_heads.py.

Tested with transformers 5.17 to 5.23.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from caref_kernels import CarefConfig, CarefLoss

OLDEST_TRANSFORMERS = (5, 17)
_NEEDS = "caref_kernels.integrations.transformers needs transformers >= 5.17 (pip install 'caref_kernels[train]')"

try:
    import transformers
except ImportError as error:
    raise ImportError(_NEEDS) from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    raise ImportError(f"{_NEEDS}; got {transformers.__version__}")

from .transformers_heads import FusedHead, fused_head  # noqa: E402 - after the check of the version

Shift = Literal["auto"] | bool
TERMS = ("ce", "sced", "kl", "entropy")
# The trainer counts num_items_in_batch with this value, whatever the loss ignores.
TRAINER_IGNORE_INDEX = -100
_UNATTACHED = (
    "CarefTrainerLoss runs without attach_caref(trainer): label_smoothing_factor is not checked (a Trainer with a "
    "compute_loss_func ignores it) and the terms are not logged; write attach_caref(trainer) after trainer = "
    "Trainer(...) instead of passing compute_loss_func"
)


class RunningTerms:
    """Weighted sums of detached terms, kept on their device; nothing is read back before ``take``."""

    def __init__(self) -> None:
        self.clear()

    def add(self, terms: Tensor, weight: float, *, divided: bool) -> None:
        """Add ``weight * terms``; ``terms`` (4,).  ``divided``: they were divided by ``num_items_in_batch``."""
        terms = terms if weight == 1 else terms * weight
        self.total = terms if self.total is None else self.total.to(terms.device) + terms
        self.weight += weight
        self.divided = divided

    def take(self, device: torch.device) -> Tensor:
        """(5,) float32: the four sums and the sum of the weights, all 0 if nothing was added; starts afresh."""
        total = torch.zeros(len(TERMS), device=device) if self.total is None else self.total.float().to(device)
        weight = total.new_full((1,), self.weight)
        self.clear()
        return torch.cat((total, weight))

    def clear(self) -> None:
        """Forget everything added."""
        self.total: Tensor | None = None
        self.weight = 0.0
        self.divided = False


class CarefTrainerLoss:
    """A ``compute_loss_func``: ``(outputs, labels, num_items_in_batch=None) -> loss``.

    :func:`attach_caref` makes one and installs it, with the checks and the logging around it; passing it to
    ``Trainer(compute_loss_func=...)`` by hand works too, with a warning that those are missing.

    Args:
        config: a :class:`caref_kernels.CarefConfig`, or give its fields as keywords.
        shift: True for causal models (the logits at position i are scored with the label at i + 1), False for
            encoder-decoder models, ``"auto"`` to tell by the model's outputs.
    Attributes:
        config: the configuration in use.
        head: the :class:`FusedHead` of the model, or ``None``: the outputs are logits.
        train_terms, eval_terms: :class:`RunningTerms` of the calls with and without gradients.
        weigh_examples: whether an evaluation batch weighs as many as its examples, or each the same.
    Raises:
        TypeError, ValueError: as :class:`caref_kernels.CarefConfig`; and for an option that a Trainer contradicts.
    """

    def __init__(self, config: CarefConfig | None = None, *, shift: Shift = "auto", **options: Any) -> None:
        if config is not None and options:
            raise TypeError(f"give either a CarefConfig or options, not both; got {sorted(options)} besides the config")
        if config is not None and not isinstance(config, CarefConfig):
            raise TypeError(f"config must be a CarefConfig; got {config!r}")
        if not (isinstance(shift, bool) or shift == "auto"):
            raise ValueError(f"shift must be True, False or 'auto'; got {shift!r}")
        config = CarefConfig(**options) if config is None else config
        if config.reduction != "mean":
            raise ValueError(f"reduction must be 'mean' in a Trainer, that sets the divisor; got {config.reduction!r}")
        if config.ignore_index != TRAINER_IGNORE_INDEX:
            raise ValueError(
                f"ignore_index must be {TRAINER_IGNORE_INDEX} in a Trainer, which counts the labels that differ from "
                f"it; got {config.ignore_index}"
            )
        self.config = dataclasses.replace(config, return_terms=True)
        self.shift = shift
        self._loss = CarefLoss(self.config)
        self.head: FusedHead | None = None
        self.train_terms = RunningTerms()
        self.eval_terms = RunningTerms()
        self.weigh_examples = True
        self._warn_unattached = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r}, shift={self.shift!r})"

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """The loss of one micro-batch, a scalar.

        Args:
            outputs: of the model: a mapping with ``logits`` (B, T, V), or a tuple that starts with them.
            labels: (B, T), -100 where no token is to be predicted; moved to the device of the logits.
            num_items_in_batch: divisor: a number, or a 0-D tensor on any device; 0 counts as 1, so that a step without
                a label has the loss 0.  ``None`` takes the mean over the labels of this micro-batch.
        Raises:
            TypeError: ``outputs`` has no logits.
            ValueError: ``labels`` is missing, or ``shift="auto"`` cannot tell the kind of model.
            IndexError: as :func:`caref_kernels.caref_loss`, which checks everything else.
        """
        if self._warn_unattached:
            self.mark_attached()  # said once
            warnings.warn(_UNATTACHED, RuntimeWarning, stacklevel=2)
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels: the batch must have a 'labels' tensor for the CAREF loss; got {labels!r}")
        logits = _logits(outputs)
        labels = labels.to(logits.device)
        shift = _shifts(outputs) if self.shift == "auto" else self.shift
        num_items = _divisor(num_items_in_batch, logits.device)
        if self.head is not None:
            out = self.head.loss(logits, labels, num_items, config=self.config, shift=shift)
        else:
            # The logits stay whole: moving the labels costs 8 bytes a row, moving the logits a copy of them.
            labels = F.pad(labels, (0, 1), value=TRAINER_IGNORE_INDEX)[..., 1:] if shift else labels
            out = self._loss(logits, labels, num_items)
        terms = torch.stack([getattr(out, name).detach() for name in TERMS])
        divided = num_items is not None
        if torch.is_grad_enabled():
            self.train_terms.add(terms, 1.0, divided=divided)
        else:
            self.eval_terms.add(terms, float(labels.size(0)) if self.weigh_examples else 1.0, divided=divided)
        return out.loss

    def mark_attached(self) -> None:
        """Say that a callback looks after the checks and the logging, so that a call need not warn."""
        self._warn_unattached = False


class CarefTrainerCallback(transformers.TrainerCallback):
    """Adds the terms of a :class:`CarefTrainerLoss` to the records of the trainer that uses it."""

    def __init__(self, trainer: transformers.Trainer, loss: CarefTrainerLoss) -> None:
        self._trainer = trainer
        self._loss = loss
        self._logged_step = 0

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        """Start a new count, also when training is resumed."""
        _check_arguments(args)  # they may have changed since
        self._logged_step = state.global_step
        self._loss.train_terms.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        """Extend the record that is being logged, and its copy in the history."""
        if logs is None:
            return
        if "loss" in logs:
            steps = max(state.global_step - self._logged_step, 1)
            self._logged_step = state.global_step
            extra = self._read(self._loss.train_terms, "", steps)
        else:
            extra = self._evaluated(logs)
        logs.update(extra)
        if extra and state.log_history:
            state.log_history[-1].update(extra)

    def on_predict(self, args, state, control, metrics=None, **kwargs):  # noqa: ARG002
        """Extend the metrics of ``trainer.predict``, which are not logged."""
        metrics.update(self._evaluated(metrics))

    def _evaluated(self, metrics: dict[str, float]) -> dict[str, float]:
        losses = [key for key in metrics if key.endswith("_loss") and key != "train_loss"]
        if not losses:
            return {}
        prefix = min(losses, key=len).removesuffix("loss")
        return self._read(self._loss.eval_terms, prefix, None)

    def _read(self, terms: RunningTerms, prefix: str, steps: int | None) -> dict[str, float]:
        """Averages over the processes, as the trainer averages its loss; every process must call it."""
        accelerator = self._trainer.accelerator
        scale = 1
        if terms.divided and self._trainer.args.average_tokens_across_devices:
            scale = accelerator.num_processes // self._trainer.get_tp_size()
        gathered = accelerator.gather(terms.take(accelerator.device).unsqueeze(0))
        *sums, weight = gathered.mean(0).tolist()  # the one synchronisation of the record
        if weight == 0:
            return {}
        divisor = weight if steps is None else steps
        return {prefix + name: total * scale / divisor for name, total in zip(TERMS, sums, strict=True)}


def attach_caref(
    trainer: transformers.Trainer,
    config: CarefConfig | None = None,
    *,
    shift: Shift = "auto",
    fuse_head: bool = False,
    **options: Any,
) -> CarefTrainerLoss:
    """Make ``trainer`` train and evaluate with the CAREF loss, and log its terms.

    Call it once, between making the trainer and ``train()``; the module's docstring says what changes.

    Args:
        trainer: a ``Trainer``, ``Seq2SeqTrainer`` or subclass that leaves ``compute_loss`` alone; the model may be
            wrapped by PEFT.
        config, shift, options: as :class:`CarefTrainerLoss`, e.g. ``attach_caref(trainer, lambda_sced=0.05)``.
        fuse_head: compute the training loss from the head's input, without logits; ``loss.head.remove()`` undoes it.
    Returns:
        The loss that was installed as ``trainer.compute_loss_func``.
    Raises:
        TypeError: ``trainer`` is not a transformers Trainer.
        ValueError: the trainer has a ``compute_loss_func`` already, or something that it would silently drop or scale
            wrongly beside one: ``label_smoothing_factor``, the regulariser of an AdaLoRA adapter, ``nn.DataParallel``,
            context or sequence parallelism; or a head that cannot be fused.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer must be a transformers Trainer; got {type(trainer).__name__}")
    if trainer.compute_loss_func is not None:
        raise ValueError(f"trainer.compute_loss_func must be None for attach_caref; got {trainer.compute_loss_func!r}")
    _check_arguments(trainer.args)
    _check_parallelism(trainer)
    _check_adapters(trainer.model)
    loss = CarefTrainerLoss(config, shift=shift, **options)
    loss.mark_attached()
    loss.head = fused_head(trainer.model) if fuse_head else None
    # Both average the loss of evaluation batches, but a Seq2SeqTrainer counts a short last batch like a full one.
    loss.weigh_examples = not isinstance(trainer, transformers.Seq2SeqTrainer)
    trainer.compute_loss_func = loss
    trainer.add_callback(CarefTrainerCallback(trainer, loss))
    # First in the row, so that the reporters (TensorBoard, ...) see the complete records.
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
    return loss


def _check_arguments(args: transformers.TrainingArguments) -> None:
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor must be 0 with the CAREF loss, whose own terms regularise the distribution (a "
            f"Trainer with a compute_loss_func would ignore it); got {args.label_smoothing_factor}"
        )


def _check_parallelism(trainer: transformers.Trainer) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"args.n_gpu must be at most 1, got {trainer.args.n_gpu}: nn.DataParallel scales the loss of a "
            f"compute_loss_func by the number of GPUs; launch one process per GPU with torchrun or accelerate, or show "
            f"one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    for name, size in (("context", trainer.get_cp_size()), ("sequence", trainer.get_sp_size())):
        if size != 1:
            raise ValueError(
                f"{name} parallelism must have size 1, got {size}: it splits the positions of a row over processes, "
                f"where labels cannot be shifted"
            )


def _check_adapters(model: torch.nn.Module) -> None:
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if str(getattr(adapter, "peft_type", "")).rsplit(".", 1)[-1] == "ADALORA":
            raise ValueError(
                f"adapter {name!r} has peft_type ADALORA: PEFT adds its orthogonality term to the model's own loss, "
                f"which a compute_loss_func replaces; use another adapter type, such as LoRA"
            )


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        logits, found = outputs.get("logits"), f"the keys {list(outputs)}"
    elif isinstance(outputs, tuple) and outputs:
        logits, found = outputs[0], f"a tuple led by {type(outputs[0]).__name__}"
    else:
        logits, found = None, f"{type(outputs).__name__}"
    if not isinstance(logits, Tensor):
        raise TypeError(f"outputs: expected a mapping with a 'logits' tensor, or a tuple led by it; got {found}")
    return logits


def _shifts(outputs: Any) -> bool:
    if isinstance(outputs, Mapping):
        if "encoder_last_hidden_state" in outputs:
            return False
        if "CausalLM" in type(outputs).__name__:
            return True
    raise ValueError(
        f"shift='auto' cannot tell from outputs of type {type(outputs).__name__} whether the model is causal; pass "
        f"shift=True (causal: labels are the input tokens) or shift=False (encoder-decoder: labels are aligned)"
    )


def _divisor(num_items: Tensor | float | None, device: torch.device) -> Tensor | float | None:
    if isinstance(num_items, Tensor):
        num_items = num_items.to(device, non_blocking=True)
        return torch.where(num_items == 0, torch.ones_like(num_items), num_items)
    return 1 if num_items == 0 else num_items
