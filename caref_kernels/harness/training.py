"""Training one variant on one split: transformers' Trainer with the fused loss, and crash-safe checkpoints."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from caref_kernels import caref_loss

from ..integrations.transformers import attach_caref
from .checkpoints import CheckpointStore
from .encoding import Encoded
from .evaluation import IGNORED, support
from .settings import Settings
from .summary import CURVE
from .variants import Variant

logger = logging.getLogger(__name__)
_WEIGHTS = "trained.safetensors"
_STATE = "trainer_state.json"
_RANKS = "rank_pattern.json"


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is NaN or infinite; the message is the dump."""


class Stopped(Exception):  # noqa: N818 - no error: somebody asked the run to stop, and it did
    """The run stopped after a step because it was asked to; its checkpoint is written."""


@dataclass(frozen=True)
class Plan:
    """What a training needs besides its model.

    Args:
        settings, variant: the experiment and its row.
        weights: of the loss: alpha, beta, lambda_sced, lambda_kl.
        seed: of everything random.
        micro_batch: examples at a time, a divisor of the batch.
        stop: asked after every step whether to stop there.
        after_step: called after every step.
    """

    settings: Settings
    variant: Variant
    weights: dict[str, float]
    seed: int
    micro_batch: int
    stop: Callable[[], bool]
    after_step: Callable[[], None]


class Examples(torch.utils.data.Dataset):
    """Encoded examples as the collator takes them; ``index`` tells which one it is."""

    def __init__(self, items: Sequence[Encoded], causal: bool) -> None:
        self.items, self.causal = items, causal

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        if self.causal:
            tokens = {
                "input_ids": [*item.prompt, *item.target],
                "labels": [IGNORED] * len(item.prompt) + list(item.target),
            }
        else:
            tokens = {"input_ids": [*item.prompt], "labels": [*item.target]}
        return {**tokens, "attention_mask": [1] * len(tokens["input_ids"]), "index": index}


class HarnessTrainer(transformers.Trainer):
    """A Trainer that saves what is trained, and no pickles, through a :class:`CheckpointStore`."""

    def __init__(self, *, store: CheckpointStore, uids: Sequence[str], skip_nonfinite: int, **options: Any) -> None:
        super().__init__(**options)
        self.store, self.uids, self.skips_left = store, uids, skip_nonfinite
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
        last = self.store.latest(logger.warning)
        dump["last checkpoint"] = None if last is None else last.folder.name
        return NonFiniteError(json.dumps(dump))

    def _save_checkpoint(self, model, trial) -> None:  # noqa: ARG002 - the Trainer's signature
        def write(folder: Path) -> None:
            save_trained(self.model, folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / _STATE))

        self.store.save(self.state.global_step, write)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        load_trained(self.model if model is None else model, Path(resume_from_checkpoint))


class StepCallback(transformers.TrainerCallback):
    """What happens around a step: the check of the gradient, AdaLoRA's allocator, progress, and a wish to stop."""

    def __init__(self, trainer: HarnessTrainer, plan: Plan) -> None:
        self._trainer, self._plan = trainer, plan
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
        if self._plan.variant.trained == "adalora" and not self._skipped:
            self._trainer.model.base_model.update_and_allocate(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        """Report the step; when asked to stop, save and stop."""
        self._plan.after_step()
        if self._plan.stop() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


class SupportCallback(transformers.TrainerCallback):
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
            self._mean = support(entropy[rows.to(logits.device) != IGNORED]).mean()
        return (loss, outputs) if return_outputs else loss

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        """Extend the record."""
        if logs is not None and "loss" in logs and self._mean is not None:
            logs["k_t"] = state.log_history[-1]["k_t"] = self._mean.item()


def train(model: Any, items: Sequence[Encoded], tokenizer: Any, plan: Plan, store: CheckpointStore, note) -> list[dict]:
    """Train ``model`` in place, from its last checkpoint if there is one.

    Args:
        model: prepared for the plan's variant.
        items: the examples, encoded.
        tokenizer: which pads.
        store: of this run; it holds the finished training when this returns.
        note: told about checkpoints that are passed over.
    Returns: the curve: one record for every logged step.
    Raises:
        Stopped: the plan's ``stop`` asked for it.
        NonFiniteError: the loss or a gradient is not finite.
        torch.OutOfMemoryError: the device has too little memory for the micro-batch.
    """
    last = store.latest(note)
    if last is not None and last.step >= plan.settings.max_steps:
        load_trained(model, last.folder)
        return _curve(json.loads((last.folder / _STATE).read_text(encoding="utf-8"))["log_history"])
    transformers.set_seed(plan.seed)
    causal = not model.config.is_encoder_decoder
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=None if causal else _base(model))
    trainer = HarnessTrainer(
        store=store,
        uids=[item.example.uid for item in items],
        skip_nonfinite=plan.settings.skip_nonfinite,
        model=model,
        args=_arguments(plan, store.folder, model.device),
        train_dataset=Examples(items, causal),
        data_collator=collator,
    )
    if plan.variant.trained != "adalora":
        # AdaLoRA keeps the model's own loss, to which PEFT adds its regulariser.
        attach_caref(trainer, **plan.weights)
        trainer.add_callback(SupportCallback(trainer, causal))
    trainer.add_callback(StepCallback(trainer, plan))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if last is None else str(last.folder))
    if trainer.state.global_step < plan.settings.max_steps:
        raise Stopped
    return _curve(trainer.state.log_history)


def save_trained(model: Any, folder: Path) -> None:
    """Write the trained parameters, and what AdaLoRA's allocator knows, to ``folder``."""
    tensors = {f"parameter/{name}": value.detach() for name, value in model.named_parameters() if value.requires_grad}
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None:
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            tensors |= {f"{kind}/{name}": value for name, value in getattr(allocator, kind).items()}
        pattern = allocator.peft_config.rank_pattern
        (folder / _RANKS).write_text(json.dumps(pattern), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / _WEIGHTS)


def load_trained(model: Any, folder: Path) -> None:
    """Read what :func:`save_trained` wrote into ``model``.

    Raises:
        ValueError: the tensors are not those of this model.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    tensors = load_file(folder / _WEIGHTS, device=str(model.device))
    names = {name.partition("/")[2] for name in tensors if name.startswith("parameter/")}
    if names != set(parameters):
        raise ValueError(
            f"{folder / _WEIGHTS}: holds {len(names)} parameters; the model trains {len(parameters)} others"
        )
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(tensors[f"parameter/{name}"])
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None:
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            prefix = f"{kind}/"
            known = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            setattr(allocator, kind, known)
        allocator.peft_config.rank_pattern = json.loads((folder / _RANKS).read_text(encoding="utf-8"))


def _arguments(plan: Plan, folder: Path, device: torch.device) -> transformers.TrainingArguments:
    settings = plan.settings
    return transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=device.type == "cpu",
        bf16=settings.precision == "bf16",
        seed=plan.seed,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=settings.batch_size // plan.micro_batch,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        warmup_steps=min(settings.warmup_steps, settings.max_steps),
        lr_scheduler_type="linear" if settings.schedule == "linear" else "constant_with_warmup",
        optim="adamw_torch",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type != "cpu",
        disable_tqdm=True,
        report_to="none",
    )


def _curve(history: list[dict]) -> list[dict]:
    return [
        {"step": record["step"], **{name: record[name] for name in CURVE if name in record}}
        for record in history
        if "loss" in record
    ]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
