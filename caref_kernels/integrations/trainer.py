"""What a transformers Trainer needs besides a model with the CAREF loss: checks, and the terms in its records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .passes import TERMS, record_terms

_METHODS = ("compute_loss", "prediction_step", "evaluation_loop", "log", "call_model_init")


def check_trainer(trainer: transformers.Trainer, label_smoothing: float) -> None:
    """Raise ValueError for what would replace the model's loss, which has ``label_smoothing``, or scale it wrongly."""
    args = trainer.args
    if trainer.compute_loss_func is not None:
        raise ValueError(
            f"trainer.compute_loss_func must be None: it replaces the model's loss; got {trainer.compute_loss_func!r}"
        )
    is_trl = any(base.__module__.startswith("trl.") for base in type(trainer).__mro__)
    if is_trl and not getattr(trainer, "uses_model_loss", False):
        raise ValueError(
            f"{type(trainer).__name__} does not ask the model for its loss: use "
            f"caref_kernels.integrations.trl.CarefSFTTrainer instead of attach_caref"
        )
    if args.label_smoothing_factor not in (0, label_smoothing):
        raise ValueError(
            f"label_smoothing_factor must be 0, or the label_smoothing of the CAREF loss, {label_smoothing}; got "
            f"{args.label_smoothing_factor}"
        )
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel must be False: it replaces the model's forward pass and its loss")
    if args.n_gpu > 1:
        raise ValueError(
            f"args.n_gpu must be at most 1, got {args.n_gpu}: nn.DataParallel copies the model in every step; "
            f"launch one process per GPU with torchrun or accelerate, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    for name, size in (("context", trainer.get_cp_size()), ("sequence", trainer.get_sp_size())):
        if size != 1:
            raise ValueError(
                f"{name} parallelism must have size 1, got {size}: it splits the positions of a row over "
                f"processes, where labels cannot be shifted"
            )


def loss_scale(trainer: transformers.Trainer, divided: bool) -> int:
    """The factor of a loss that is averaged over the processes, though they share its divisor if it is ``divided``."""
    if divided and trainer.args.average_tokens_across_devices:
        return trainer.accelerator.num_processes // trainer.get_tp_size()
    return 1


class TrainerTerms(transformers.TrainerCallback):
    """The terms of one trainer's passes; its methods replace those of the trainer, which they call."""

    def __init__(self, trainer: transformers.Trainer, apply: Callable[[nn.Module], nn.Module]) -> None:
        self.trainer, self.apply, self.label_smoothing = trainer, apply, 0.0
        self.original = {name: getattr(trainer, name) for name in _METHODS}
        self.evaluation: list[Tensor] | None = None  # during an evaluation: (examples, 5) of all ranks for each step
        self.pending: tuple[int, dict[str, float]] | None = None  # the step and the terms of the next record
        self.start(step=0)

    def start(self, step: int) -> None:
        """Start a new sum of terms after the optimizer step ``step``."""
        self.total: Tensor | None = None  # (5,): the terms and the number of passes
        self.divided = False
        self.last_step = step

    @classmethod
    def install(
        cls, trainer: transformers.Trainer, apply: Callable[[nn.Module], nn.Module], label_smoothing: float
    ) -> None:
        """Put the methods of a new instance into ``trainer``; a second time, only the loss of new models changes."""
        trainer.label_smoother = None  # it would replace the model's loss, which smooths its labels itself
        terms = getattr(vars(trainer).get("compute_loss"), "__self__", None)
        is_new = not isinstance(terms, cls)
        terms = cls(trainer, apply) if is_new else terms
        terms.apply, terms.label_smoothing = apply, label_smoothing
        if not is_new:
            return
        handler = trainer.callback_handler
        for name in _METHODS:
            setattr(trainer, name, getattr(terms, name))
        for name in ("on_step_end", "on_epoch_end"):
            setattr(handler, name, partial(terms.after_callbacks, getattr(handler, name)))
        trainer.add_callback(terms)
        trainer.model_accepts_loss_kwargs = True

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        """Check the arguments again, which may have changed, and start a new sum, also when training is resumed."""
        check_trainer(self.trainer, self.label_smoothing)
        self.start(state.global_step)
        self.pending = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model, with the loss."""
        return self.apply(self.original["call_model_init"](trial))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss of one micro-batch; RuntimeError if the model has labels but its loss is not used."""
        has_labels = inputs.get("labels") is not None
        with record_terms() as passes:
            result = self.original["compute_loss"](model, inputs, *args, **kwargs)
        if has_labels and not passes:
            raise RuntimeError(
                f"{type(self.trainer).__name__}.compute_loss never asked the model for its loss, so the CAREF loss "
                f"would not be trained: call model(**inputs) with the labels and use outputs.loss"
            )
        for terms in passes if torch.is_grad_enabled() else ():
            row = F.pad(terms.values, (0, 1), value=1.0)
            self.total = row if self.total is None else self.total.to(row.device) + row
            self.divided = terms.divided
        return result

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation step; its terms are repeated and gathered exactly as the trainer does with its loss.

        A Trainer leaves out what fills up the last batch of a rank, a Seq2SeqTrainer does not.
        """
        with record_terms() as passes:
            result = self.original["prediction_step"](model, inputs, *args, **kwargs)
        for terms in passes if self.evaluation is not None else ():
            size = self.trainer.args.eval_batch_size or terms.examples
            values = loss_scale(self.trainer, terms.divided) * terms.values
            row = torch.cat((values, terms.loss.reshape(1))).float()
            self.evaluation.append(self.trainer.gather_function(row.expand(size, -1).contiguous()))
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation or prediction; its metrics get the terms, averaged as the trainer averages its loss."""
        outer, self.evaluation = self.evaluation, []
        try:
            output = self.original["evaluation_loop"](*args, **kwargs)
            rows = self.evaluation
        finally:
            self.evaluation = outer
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        if rows and output.metrics is not None:
            found = torch.cat(rows)
            found[found[:, -1].isnan()] = torch.nan  # the terms of a batch without a label are 0, its loss is NaN
            finite = found[:, -1].isfinite()
            if self.trainer.args.logging_nan_inf_filter and finite.any():
                found = found[finite]
            for name, value in zip(TERMS, found.mean(0).tolist(), strict=False):
                output.metrics.setdefault(f"{prefix}_{name}", value)
        return output

    def after_callbacks(self, event: Callable, args: Any, state: Any, control: Any) -> Any:
        """Collect the terms after the callbacks of ``event``, when every process knows whether a record follows."""
        control = event(args, state, control)
        steps = state.global_step - self.last_step
        if control.should_log and steps > 0:
            device = self.trainer.accelerator.device
            total = torch.zeros(len(TERMS) + 1, device=device) if self.total is None else self.total
            gathered = self.trainer.accelerator.gather(total.float().to(device).unsqueeze(0))
            *totals, passes = gathered.mean(0).tolist()  # the only synchronisation of the record
            if passes:
                scale = loss_scale(self.trainer, self.divided) / steps
                terms = {name: total * scale for name, total in zip(TERMS, totals, strict=True)}
                self.pending = state.global_step, terms
            self.start(state.global_step)
        return control

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log one record; that of the training loss gets the terms, which were collected before."""
        if "loss" in logs and self.pending is not None and self.pending[0] == self.trainer.state.global_step:
            logs = {**logs, **self.pending[1], **logs}  # a metric of the same name is kept
            self.pending = None
        self.original["log"](logs, *args, **kwargs)
