"""Training one variant on one split: transformers' Trainer with the fused loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from caref_kernels import caref_loss

from ..integrations.transformers import attach_caref
from .encoding import Encoded
from .evaluation import IGNORED, num_kept
from .results import Job
from .settings import Settings
from .summary import CURVE
from .variants import VARIANTS

if TYPE_CHECKING:
    from .runs import Callbacks


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is NaN or infinite; the message is the dump."""


class Stopped(Exception):  # no error: somebody asked the run to stop, and it did
    """The run stopped after a step or batch because it was asked to; it begins anew next time."""


def _features(item: Encoded, causal: bool, index: int) -> dict[str, Any]:
    """An encoded example as the collator takes it; ``index`` tells which one it is."""
    tokens, labels = [*item.prompt], [*item.target]
    if causal:
        tokens, labels = tokens + labels, [IGNORED] * len(tokens) + labels
    return {"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens), "index": index}


class HarnessTrainer(transformers.Trainer):
    """A Trainer that stops at a loss that is not finite, and says which examples gave it."""

    def __init__(self, *, uids: Sequence[str], skip_nonfinite: int, **options: Any) -> None:
        super().__init__(**options)
        self.uids, self.skips_left = uids, skip_nonfinite
        self.batch: list[int] = []
        self._batch_step = -1

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch.

        Raises:
            NonFiniteError: the loss is not finite and no skip is left.
        """
        index = inputs.pop("index").tolist()
        self.batch = self.batch + index if self._batch_step == self.state.global_step else index
        self._batch_step = self.state.global_step
        kept = dict(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.skips_left and not math.isfinite(loss.item()):
            raise self.non_finite(f"loss {loss.item()}", kept)
        return loss

    def non_finite(self, what: str, inputs: dict[str, Tensor] | None = None) -> NonFiniteError:
        """The error with the dump that helps to repeat the step."""
        dump = {"step": self.state.global_step + 1, "what": what, "examples": [self.uids[i] for i in self.batch]}
        bad = [name for name, value in self.model.named_parameters() if not value.isfinite().all()]
        dump["parameters that are not finite"] = bad[:10]
        if inputs is not None:
            with torch.no_grad():
                logits = self.model(**self._prepare_inputs(inputs)).logits.float()
            finite = logits[logits.isfinite()]
            dump["logits"] = {
                "not finite": logits.numel() - finite.numel(),
                "range": [finite.min().item(), finite.max().item()] if finite.numel() else None,
            }
        return NonFiniteError(json.dumps(dump))


class StepCallback(transformers.TrainerCallback):
    """What happens around a step: the check of the gradient, AdaLoRA's allocator, progress, and a wish to stop."""

    def __init__(self, trainer: HarnessTrainer, callbacks: Callbacks, allocates: bool) -> None:
        self._trainer, self._callbacks, self._allocates = trainer, callbacks, allocates
        self._skipped = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002
        """Let no gradient that is not finite reach the parameters."""
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        self._skipped = not torch.nn.utils.get_total_norm(gradients).isfinite().item()
        if not self._skipped:
            return
        if not self._trainer.skips_left:
            raise self._trainer.non_finite("gradient")
        self._trainer.skips_left -= 1
        for parameter in self._trainer.model.parameters():
            parameter.grad = None

    def on_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002
        """Give AdaLoRA's allocator its turn, while the gradients are there."""
        if self._allocates and not self._skipped:
            self._trainer.model.base_model.update_and_allocate(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        """Report the step; when asked to stop, stop."""
        self._callbacks.step()
        if self._callbacks.stop():
            raise Stopped


class NumKeptCallback(transformers.TrainerCallback):
    """Adds k_t, the mean of ceil(exp(H)) over the rows of the last micro-batch, to the records of the loss."""

    def __init__(self, trainer: transformers.Trainer, causal: bool) -> None:
        self._trainer, self._causal, self._compute_loss = trainer, causal, trainer.compute_loss
        self._mean: Tensor | None = None
        trainer.compute_loss = self.compute_loss

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; in a step that will be logged, also the entropies of its rows, without a gradient."""
        labels = inputs["labels"]
        loss, outputs = self._compute_loss(model, inputs, True, num_items_in_batch)
        if (self._trainer.state.global_step + 1) % self._trainer.args.logging_steps == 0:
            logits = outputs["logits"].detach()
            rows = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:] if self._causal else labels
            options = {"lambda_sced": 0.0, "lambda_kl": 0.0, "reduction": "none", "return_terms": True}
            entropy = caref_loss(logits, rows.to(logits.device), **options).entropy
            self._mean = num_kept(entropy[rows.to(logits.device) != IGNORED]).mean()
        return (loss, outputs) if return_outputs else loss

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        """Extend the record."""
        if logs is not None and "loss" in logs and self._mean is not None:
            logs["k_t"] = state.log_history[-1]["k_t"] = self._mean.item()


def train(
    model: Any,
    items: Sequence[Encoded],
    tokenizer: Any,
    job: Job,
    settings: Settings,
    micro_batch: int,
    callbacks: Callbacks,
) -> list[dict]:
    """Train ``model`` in place.

    Args:
        model: prepared for the job's variant.
        items: the examples, encoded.
        tokenizer: which pads.
        job, settings: what is trained, and how.
        micro_batch: examples at a time, a divisor of the batch.
        callbacks: told about every step, and asked after it whether to stop.
    Returns: the curve: one record for every logged step.
    Raises:
        Stopped: ``callbacks`` asked for it.
        NonFiniteError: the loss or a gradient is not finite.
        torch.OutOfMemoryError: the device has too little memory for the micro-batch.
    """
    causal, variant = not model.config.is_encoder_decoder, VARIANTS[job.variant]
    base = model.get_base_model() if variant.is_adapter else model
    trainer = HarnessTrainer(
        uids=[item.example.uid for item in items],
        skip_nonfinite=settings.skip_nonfinite,
        model=model,
        args=_arguments(settings, job.seed, micro_batch, model.device),
        train_dataset=[_features(item, causal, index) for index, item in enumerate(items)],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=None if causal else base),
    )
    if variant.trained != "adalora":
        # AdaLoRA keeps the model's own loss, to which PEFT adds its regulariser.
        weights = variant.weights(settings.lambda_sced, settings.lambda_kl)
        attach_caref(trainer, alpha=job.alpha, beta=job.beta, **weights)
        trainer.add_callback(NumKeptCallback(trainer, causal))
    trainer.add_callback(StepCallback(trainer, callbacks, variant.trained == "adalora"))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [
        {"step": record["step"], **{name: record[name] for name in CURVE if name in record}}
        for record in trainer.state.log_history
        if "loss" in record
    ]


def _arguments(settings: Settings, seed: int, micro_batch: int, device: torch.device) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=".",  # the Trainer makes its folder, and nothing is written there
        use_cpu=device.type == "cpu",
        bf16=settings.precision == "bf16",
        seed=seed,  # which the Trainer sets when it is made
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.batch_size // micro_batch,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        warmup_steps=min(settings.warmup_steps, settings.max_steps),
        lr_scheduler_type="linear" if settings.schedule == "linear" else "constant_with_warmup",
        optim="adamw_torch",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type != "cpu",
        disable_tqdm=True,
        report_to="none",
    )
