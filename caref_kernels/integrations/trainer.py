"""What a transformers Trainer needs besides a model with the CAREF loss: checks, and the terms in its records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .passes import TERMS, PassTerms, record_terms


class Sums:
    """Sums of the terms of training passes, kept on their device; nothing is read back before ``packed``."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.passes = 0
        self.divided = False

    def add(self, passes: list[PassTerms]) -> None:
        """Add the terms of ``passes``."""
        for terms in passes:
            self.total = terms.values if self.total is None else self.total.to(terms.values.device) + terms.values
            self.passes += 1
            self.divided = terms.divided

    def packed(self, device: torch.device) -> Tensor:
        """(5,) float32: the four sums and the number of passes, all 0 if nothing was added."""
        total = torch.zeros(len(TERMS), device=device) if self.total is None else self.total.float().to(device)
        return torch.cat((total, torch.full((1,), float(self.passes), device=device)))


class TrainerTerms(transformers.TrainerCallback):
    """The terms of one trainer's passes; its methods take the places of the trainer's own, which they call."""

    def __init__(self, trainer: transformers.Trainer, apply: Callable[[nn.Module], nn.Module]) -> None:
        self.trainer, self.apply = trainer, apply
        self.training = Sums()
        self.evaluation: list[Tensor] | None = None  # of the loop that is running: (examples, 5) of all ranks
        self.steps_before = 0  # optimizer steps up to the last record
        self.pending: tuple[int, dict[str, float]] | None = None  # the step and the terms of the next record
        handler = trainer.callback_handler
        self.inner = {name: getattr(trainer, name) for name in _METHODS}
        self.inner_events = {name: getattr(handler, name) for name in _EVENTS}

    @classmethod
    def install(cls, trainer: transformers.Trainer, apply: Callable[[nn.Module], nn.Module]) -> None:
        """Put the methods of a new instance into ``trainer``; a second time, only the loss of new models changes."""
        before = getattr(vars(trainer).get("compute_loss"), "__self__", None)
        if isinstance(before, cls):
            before.apply = apply
            return
        terms = cls(trainer, apply)
        for name in _METHODS:
            setattr(trainer, name, getattr(terms, name))
        for name in _EVENTS:
            setattr(trainer.callback_handler, name, getattr(terms, f"after_{name}"))
        trainer.add_callback(terms)
        trainer.model_accepts_loss_kwargs = True

    @staticmethod
    def check(trainer: transformers.Trainer) -> None:
        """Raise ValueError for what would replace the model's loss, or scale it wrongly."""
        if trainer.compute_loss_func is not None:
            raise ValueError(
                f"trainer.compute_loss_func must be None: it replaces the model's loss; got "
                f"{trainer.compute_loss_func!r}"
            )
        is_trl = any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)
        if is_trl and not getattr(trainer, "asks_for_the_loss", False):
            raise ValueError(
                f"{type(trainer).__name__} does not ask the model for its loss: use "
                f"caref_kernels.integrations.trl.CarefSFTTrainer instead of attach_caref"
            )
        args = trainer.args
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor must be 0 with the CAREF loss, whose own terms regularise the distribution "
                f"(the Trainer would replace the model's loss); got {args.label_smoothing_factor}"
            )
        if getattr(args, "use_liger_kernel", False):
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

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        """Start a new count, also when training is resumed."""
        self.check(self.trainer)  # the arguments may have changed since
        self.training, self.steps_before, self.pending = Sums(), state.global_step, None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model, with the loss."""
        return self.apply(self.inner["call_model_init"](trial))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss of one micro-batch.

        Raises:
            RuntimeError: the model has labels and was not asked for its loss.
        """
        has_labels = inputs.get("labels") is not None
        with record_terms() as passes:
            result = self.inner["compute_loss"](model, inputs, *args, **kwargs)
        if has_labels and not passes:
            kind = type(self.trainer)
            raise RuntimeError(
                f"{kind.__name__}.compute_loss never asked the model for its loss, so the CAREF loss would not be "
                f"trained: call model(**inputs) with the labels and use outputs.loss"
            )
        if torch.is_grad_enabled():
            self.training.add(passes)
        return result

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation step; its terms are repeated and gathered exactly as the trainer does with its loss.

        A Trainer leaves out what fills up the last batch of a rank, a Seq2SeqTrainer does not.
        """
        with record_terms() as passes:
            result = self.inner["prediction_step"](model, inputs, *args, **kwargs)
        if self.evaluation is not None:
            for terms in passes:
                size = self.trainer.args.eval_batch_size or terms.examples
                scale = self._scale(terms.divided)
                row = torch.cat((scale * terms.values, terms.loss.reshape(1))).float()
                self.evaluation.append(self.trainer.gather_function(row.expand(size, -1).contiguous()))
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation or prediction; its metrics get the terms, averaged as the trainer averages its loss."""
        outer, self.evaluation = self.evaluation, []
        try:
            output = self.inner["evaluation_loop"](*args, **kwargs)
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

    def after_on_step_end(self, args, state, control) -> Any:
        """After all callbacks: every process is here, and knows whether a record follows."""
        return self._collect(self.inner_events["on_step_end"](args, state, control), state)

    def after_on_epoch_end(self, args, state, control) -> Any:
        """As :meth:`after_on_step_end`."""
        return self._collect(self.inner_events["on_epoch_end"](args, state, control), state)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log one record; that of the training loss gets the terms, which are here already."""
        if "loss" in logs and self.pending is not None and self.pending[0] == self.trainer.state.global_step:
            logs = {**logs, **{name: value for name, value in self.pending[1].items() if name not in logs}}
            self.pending = None
        self.inner["log"](logs, *args, **kwargs)

    def _collect(self, control: Any, state: Any) -> Any:
        steps = state.global_step - self.steps_before
        if control.should_log and steps > 0:
            sums, self.training, self.steps_before = self.training, Sums(), state.global_step
            accelerator = self.trainer.accelerator
            gathered = accelerator.gather(sums.packed(accelerator.device).unsqueeze(0))
            *totals, passes = gathered.mean(0).tolist()  # the one synchronisation of the record
            if passes:
                scale = self._scale(sums.divided) / steps
                self.pending = state.global_step, {n: total * scale for n, total in zip(TERMS, totals, strict=True)}
        return control

    def _scale(self, divided: bool) -> int:
        """As the trainer scales its loss before it is averaged over the processes that share a divisor."""
        if divided and self.trainer.args.average_tokens_across_devices:
            return self.trainer.accelerator.num_processes // self.trainer.get_tp_size()
        return 1


_METHODS = ("compute_loss", "prediction_step", "evaluation_loop", "log", "call_model_init")
_EVENTS = ("on_step_end", "on_epoch_end")
