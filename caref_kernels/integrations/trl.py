"""Supervised fine-tuning with TRL and the CAREF loss.

    trainer = CarefSFTTrainer(model, args=SFTConfig(...), train_dataset=..., caref=CarefConfig(lambda_sced=0.1))
    trainer.train()

TRL's own ``SFTTrainer`` does not use the loss of the model: it takes the log-probabilities of the labels and computes
cross-entropy from them.  ``CarefSFTTrainer`` uses the model's loss, in one forward pass per micro-batch, and takes
TRL's metrics (entropy, mean token accuracy, number of tokens, router loss) from the same pass.  Tested with TRL 1.16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caref_kernels import CarefConfig

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("caref_kernels.integrations.trl needs trl >= 1.16 (pip install trl)") from error

from .passes import TERMS, PassTerms, record_terms  # after the guard
from .trainer import loss_scale
from .transformers import attach_caref, base_model


class CarefSFTTrainer(SFTTrainer):
    """``trl.SFTTrainer`` whose loss is that of :func:`caref_kernels.integrations.transformers.apply_caref`.

    Packed, padding-free and completion-only data sets, PEFT, mixtures of experts and evaluation work as in TRL; records
    also get ``ce``, ``sced`` and ``kl``.

    Args:
        args: positional arguments of ``trl.SFTTrainer``.
        caref: the options of the loss; ``None`` takes the defaults.
        fuse_head: compute no logits in training; see :func:`caref_kernels.integrations.transformers.apply_caref`.
        kwargs: keyword arguments of ``trl.SFTTrainer``.

    Raises:
        ValueError: ``SFTConfig.loss_type`` is another loss than "nll", or as in
            :func:`caref_kernels.integrations.transformers.attach_caref`.
    """

    uses_model_loss = True  # attach_caref refuses other trainers of TRL

    def __init__(self, *args: Any, caref: CarefConfig | None = None, fuse_head: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll":
            raise ValueError(
                f"loss_type must be 'nll' with the CAREF loss, which has cross-entropy as its first term; got "
                f"{self.args.loss_type!r}"
            )
        attach_caref(self, caref, fuse_head=fuse_head)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, scaled as TRL scales its own; see ``transformers.Trainer.compute_loss``."""
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        has_divisor = num_items_in_batch is not None
        with record_terms() as passes:
            outputs = model(**inputs, **({"num_items_in_batch": num_items_in_batch} if has_divisor else {}))
        if len(passes) != 1:
            raise RuntimeError(
                f"the forward pass of {type(self).__name__}'s model made the CAREF loss {len(passes)} times instead of "
                f"once: was it removed after the trainer was made?"
            )
        scale = loss_scale(self, has_divisor)
        loss = scale * outputs["loss"]
        if self.aux_loss_enabled:
            # The model adds its router loss once per micro-batch, a mean: it is averaged over the accumulation steps
            # and is not a sum over items that every rank shares.
            steps = self.current_gradient_accumulation_steps if has_divisor else 1
            added = getattr(base_model(model), "router_aux_loss_coef", self.router_aux_loss_coef)
            loss = loss + (self.router_aux_loss_coef / steps - scale * added) * outputs["aux_loss"]
        self._note_metrics(passes[0], inputs, outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _note_metrics(self, terms: PassTerms, inputs: dict[str, Any], outputs: Any, num_items: Any) -> None:
        """TRL's metrics of one micro-batch over all ranks, in one collective."""
        entropy = terms.values[TERMS.index("entropy")] * (terms.valid if num_items is None else num_items)
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        elif "position_ids" in inputs:
            tokens = inputs["position_ids"].size(1)
        else:
            raise ValueError(f"the batch must have 'attention_mask' or 'position_ids'; got {sorted(inputs)}")
        aux_loss = outputs["aux_loss"].detach() if self.aux_loss_enabled else 0
        values = (entropy, terms.correct, terms.valid, tokens, aux_loss)
        packed = torch.stack([torch.as_tensor(value).to(terms.values.device, torch.float64) for value in values])
        entropy, correct, valid, tokens, aux_loss = self.accelerator.reduce(packed, "sum").tolist()
        is_training = self.model.training
        metrics = self._metrics["train" if is_training else "eval"]
        metrics["entropy"].append(entropy / valid if valid else 0.0)
        metrics["mean_token_accuracy"].append(correct / valid if valid else 0.0)
        if is_training:
            self._total_train_tokens += int(tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(aux_loss / self.accelerator.num_processes)
