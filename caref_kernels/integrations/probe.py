"""A probe run of one model on one batch: how it computes its loss, and what it does to its head's output.

The name of the class tells nothing.  The model runs in evaluation mode without gradients, with its own loss; what does
not match cross-entropy of its logits, or a scale and a softcap on its head's output, is refused.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import check_head, current_head
from .model_loss import ModelForward, ModelLoss
from .passes import IGNORE_INDEX, LogitForm, LossForm, ProbeRun, is_dtensor, name_of, running, shifted, whole

# Rounding steps by which values that exact arithmetic makes equal may differ, relative to the largest.
STEPS = 16
# The head's output in the second probe run: far beyond every softcap in use, so that one shows.
REACH = 300.0
# Attributes of a configuration or a model with a factor of the logits, or a divisor, and with a softcap.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "softcap", "logit_softcap")


def can_probe(model: nn.Module) -> bool:
    """Whether the weights are here and whole, so that the model can run before whatever shards it is set up."""
    return not any(
        is_dtensor(value) or hasattr(value, "ds_id") or value.device.type == "meta" or value.numel() == 0
        for value in model.parameters()
    )


def find_form(model: nn.Module, state: ModelLoss, batch: Mapping[str, Any] | None) -> LossForm:
    """Probe ``model``, whose forward and loss function are installed, on ``batch`` or on four tokens.

    Raises ValueError, with the reason, if the model cannot have the CAREF loss, or its head cannot be fused.
    """
    with _evaluating(model), torch.no_grad():
        inputs = _four_tokens(model) if batch is None else _with_labels(model, batch)
        probe_run = ProbeRun(model, head=current_head(model) if state.fuse_head else None)
        if state.fuse_head:
            check_head(probe_run.head)
        calls_loss_function, logits, loss = _run(probe_run, inputs)
        shift = _find_shift(model, logits, loss, inputs)
        if not calls_loss_function:
            _check_without_labels(model, inputs, logits)
        form = _find_logit_form(model, inputs, probe_run) if state.fuse_head else None
    return LossForm(calls_loss_function, shift, form)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    dtypes = {value.dtype for value in model.parameters()} & {torch.bfloat16, torch.float16, torch.float32}
    narrow = min(dtypes - {torch.float32}, key=str, default=torch.bfloat16)
    try:
        # Adapters in float32 on a 16-bit model: its training script will run it under autocast.
        with torch.autocast(model.device.type, narrow) if len(dtypes) > 1 else contextlib.nullcontext():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _with_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """``batch`` with labels that differ from position to position: its own may all be ignored on one of the ranks."""
    kept = {name: value for name, value in batch.items() if name not in ("num_items_in_batch", "shift_labels")}
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(f"probe_batch must have labels, a tensor; got {sorted(batch)}")
    numbers = torch.arange(labels.numel(), device=labels.device).reshape(labels.shape)
    return kept | {"labels": numbers % _vocabulary(model), "return_dict": True}


def _vocabulary(model: nn.Module) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _four_tokens(model: nn.Module) -> dict[str, Any]:
    tokens = torch.arange(3, 7, device=model.device)[None] % _vocabulary(model)
    inputs = {"input_ids": tokens, "labels": tokens.flip(-1), "return_dict": True}
    if "attention_mask" in ModelForward.of(model).names:
        # A model that leaves masked positions out of its loss, whatever their labels say, shows it here.
        inputs["attention_mask"] = torch.ones_like(tokens).index_fill(-1, tokens.new_tensor([3]), 0)
    return inputs


def _forward(probe_run: ProbeRun, inputs: Mapping[str, Any]) -> Any:
    model = probe_run.model
    try:
        with running(probe_run):
            return model.forward(**inputs)
    except Exception as error:
        raise ValueError(
            f"{name_of(model)} could not be tried on one batch ({type(error).__name__}: {str(error)[:200]}): pass "
            f"probe_batch=, the inputs of one forward pass with labels"
        ) from error


def _run(probe_run: ProbeRun, inputs: Mapping[str, Any]) -> tuple[bool, Tensor, Tensor]:
    """Whether the model calls its loss function, its logits and its loss."""
    output, name = _forward(probe_run, inputs), name_of(probe_run.model)
    if len(probe_run.losses) > 1:
        raise ValueError(
            f"{name} asks for {len(probe_run.losses)} losses in one forward pass; which is CAREF's is not known"
        )
    if probe_run.losses:
        return True, *probe_run.losses[0]
    logits, loss = (output.get(part) if isinstance(output, dict) else None for part in ("logits", "loss"))
    if logits is None or loss is None:
        raise ValueError(f"{name} returns no loss and logits for labels; use caref_loss on its outputs")
    return False, whole(logits), whole(loss)


def _find_shift(model: nn.Module, logits: Tensor, loss: Tensor, inputs: Mapping[str, Any]) -> bool:
    """Whether the model's loss is cross-entropy of its logits with labels shifted by one position, or as they are."""
    if not loss.isfinite():  # weights that are NaN, which the training will show
        return not model.config.is_encoder_decoder
    labels = inputs["labels"].to(logits.device)
    if logits.shape[:-1] != labels.shape:
        labels = F.pad(labels, (logits.shape[-2] - labels.shape[-1], 0), value=IGNORE_INDEX)  # virtual tokens
    errors = {}
    for shift, targets in ((True, shifted(labels)), (False, labels)):
        exact = F.cross_entropy(logits.double().flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX)
        errors[shift] = float((loss.double() - exact).abs() / exact.abs())
    shift = min(errors, key=errors.get)
    allowed = STEPS * torch.finfo(torch.promote_types(loss.dtype, logits.dtype)).eps
    if not errors[shift] <= max(allowed, torch.finfo(loss.dtype).eps):
        raise ValueError(
            f"the loss of {name_of(model)} is not cross-entropy of its logits: on one batch they differ by "
            f"{errors[shift]:.3g}, {allowed:.3g} is allowed; compute the loss from the logits with caref_loss"
        )
    return shift


def _check_without_labels(model: nn.Module, inputs: Mapping[str, Any], logits: Tensor) -> None:
    """The model must compute the same logits from what it is given instead of its labels."""
    output = _forward(ProbeRun(model), ModelForward.of(model).without_labels(model, dict(inputs)))
    error, allowed = _difference(whole(output["logits"]), logits)
    if not error <= allowed:
        raise ValueError(
            f"{name_of(model)} makes other logits when its labels are held back: on one batch they differ by "
            f"{error:.3g} of the largest, {allowed:.3g} is allowed; compute the loss from the logits with caref_loss"
        )


def _find_logit_form(model: nn.Module, inputs: Mapping[str, Any], first_run: ProbeRun) -> LogitForm:
    """What the model does to its head's output, from a probe run whose output spans [-REACH, REACH]."""
    name = name_of(model)
    if len(first_run.outputs) != 1:
        raise ValueError(
            f"{name} calls its output head {len(first_run.outputs)} times in one forward pass; it must be once"
        )
    output = first_run.outputs[0]
    ramp = torch.linspace(-REACH, REACH, output.size(-1), device=output.device).to(output.dtype)
    _, logits, _ = _run(ProbeRun(model, first_run.head, ramp), inputs)
    if logits.shape != output.shape:
        raise ValueError(f"{name} selects or reorders its logits, {tuple(output.shape)} to {tuple(logits.shape)}")
    bias = "final_logits_bias" if hasattr(model, "final_logits_bias") else None
    closest = float("inf")
    factors = [factor for value in _attributes(model, _FACTORS) for factor in (value, 1 / value)]
    for scale, softcap in itertools.product([1.0, *factors], [None, *_attributes(model, _SOFTCAPS)]):
        form = LogitForm(scale, softcap, bias)
        error, allowed = _difference(logits, form.apply(ramp, model).expand_as(logits))
        if error <= allowed:
            return form
        closest = min(closest, error)
    raise ValueError(
        f"the head of {name} cannot be fused: something is done to its logits that is neither a scale nor a softcap "
        f"nor a constant bias (they differ by {closest:.3g} of the largest); leave fuse_head False"
    )


def _attributes(model: nn.Module, names: tuple[str, ...]) -> list[float]:
    """The positive numbers among the attributes ``names`` of the model and its configurations."""
    holders = (model.config, model.config.get_text_config(decoder=True), model, getattr(model, "model", None))
    values = (getattr(holder, name, None) for holder, name in itertools.product(holders, names))
    numbers = (value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool))
    return list(dict.fromkeys(float(value) for value in numbers if value > 0))


def _difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference relative to the largest value, and what rounding may make of it."""
    actual_64, expected_64 = actual.double().nan_to_num(), expected.double().nan_to_num()
    scale = expected_64.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = (actual_64 - expected_64).abs().max() / scale
    return float(error), STEPS * torch.finfo(actual.dtype).eps
