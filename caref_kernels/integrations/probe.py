"""A trial of one model on one batch: how it makes its loss, and what it does to its head's output.

Nothing is told by the name of a class.  The model runs in evaluation mode without gradients, with its own loss; what
cannot be matched with cross-entropy of its logits, or with a scale and a softcap on its head's output, is refused.
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
from .model_loss import ModelLoss, forward_of
from .passes import IGNORE_INDEX, LogitForm, LossForm, Trial, is_dtensor, name_of, running, whole

# Rounding steps by which values may differ that exact arithmetic makes equal, relative to the largest.
STEPS = 16
# The head's output in the second trial: far beyond every softcap in use, so that one shows.
REACH = 300.0
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# Attributes of a configuration or a model with a factor of the logits, or a divisor, and with a softcap.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "softcap", "logit_softcap")


def can_try(model: nn.Module) -> bool:
    """Whether the weights are here and whole, so that the model can run before whatever shards it is set up."""
    return not any(
        is_dtensor(value) or hasattr(value, "ds_id") or value.device.type == "meta" or value.numel() == 0
        for value in model.parameters()
    )


def find_form(model: nn.Module, state: ModelLoss, batch: Mapping[str, Any] | None) -> LossForm:
    """Try ``model``, whose forward and loss function are installed.

    Args:
        batch: the inputs of one forward pass, with labels; ``None``: four tokens.
    Raises:
        ValueError: the model cannot have the CAREF loss, or not with a fused head; the message gives the reason.
    """
    with _evaluating(model), torch.no_grad():
        inputs = _four_tokens(model) if batch is None else _with_labels(model, batch)
        trial = Trial(model, head=current_head(model) if state.fuse_head else None)
        if state.fuse_head:
            check_head(trial.head)
        output = _run(trial, inputs)
        asks, logits, loss = _loss_of(trial, output)
        shift = _shift_of(model, logits, loss, inputs)
        if not asks:
            _check_without_labels(model, inputs, logits)
        form = _logit_form(model, inputs, trial) if state.fuse_head else None
    return LossForm(asks, shift, form)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    dtypes = {value.dtype for value in model.parameters()} & {*_SIXTEEN_BITS, torch.float32}
    narrow = min(dtypes - {torch.float32}, key=str, default=torch.bfloat16)
    kind = next((value.device.type for value in model.parameters()), "cpu")
    try:
        # Adapters in float32 on a 16-bit model: its training script will run it under autocast.
        with torch.autocast(kind, narrow) if len(dtypes) > 1 else contextlib.nullcontext():
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
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    tokens = torch.arange(3, 7, device=device)[None] % _vocabulary(model)
    inputs = {"input_ids": tokens, "labels": tokens.flip(-1), "return_dict": True}
    if "attention_mask" in forward_of(model).names:
        # A model that leaves masked positions out of its loss, whatever their labels say, shows it here.
        inputs["attention_mask"] = torch.ones_like(tokens).index_fill(-1, tokens.new_tensor([3]), 0)
    return inputs


def _run(trial: Trial, inputs: Mapping[str, Any]) -> Any:
    model = trial.model
    try:
        with running(trial):
            return model.forward(**inputs)
    except Exception as error:
        raise ValueError(
            f"{name_of(model)} could not be tried on one batch ({type(error).__name__}: {str(error)[:200]}): pass "
            f"probe_batch=, the inputs of one forward pass with labels"
        ) from error


def _loss_of(trial: Trial, output: Any) -> tuple[bool, Tensor, Tensor]:
    """Whether the model asks its loss function, its logits and its loss."""
    name = name_of(trial.model)
    if len(trial.losses) > 1:
        raise ValueError(
            f"{name} asks for {len(trial.losses)} losses in one forward pass; which is CAREF's is not known"
        )
    if trial.losses:
        return True, *trial.losses[0]
    logits, loss = (output.get(part) if isinstance(output, dict) else None for part in ("logits", "loss"))
    if logits is None or loss is None:
        raise ValueError(f"{name} returns no loss and logits for labels; use caref_loss on its outputs")
    return False, whole(logits), whole(loss)


def _shift_of(model: nn.Module, logits: Tensor, loss: Tensor, inputs: Mapping[str, Any]) -> bool:
    """Whether the model's loss is cross-entropy of its logits with labels moved by one position, or as they are."""
    if not loss.isfinite():  # weights that are NaN; the training will say so
        return not model.config.is_encoder_decoder
    labels = inputs["labels"].to(logits.device)
    if logits.shape[:-1] != labels.shape:
        labels = F.pad(labels, (logits.shape[-2] - labels.shape[-1], 0), value=IGNORE_INDEX)  # virtual tokens
    errors = {}
    for shift in (True, False):
        moved = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shift else labels
        exact = F.cross_entropy(logits.double().flatten(0, -2), moved.flatten(), ignore_index=IGNORE_INDEX)
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
    """The model must make the same logits from what it is given instead of its labels."""
    again = whole(_run(Trial(model), forward_of(model).without_labels(model, dict(inputs)))["logits"])
    error, allowed = _difference(again, logits)
    if not error <= allowed:
        raise ValueError(
            f"{name_of(model)} makes other logits when its labels are held back: on one batch they differ by "
            f"{error:.3g} of the largest, {allowed:.3g} is allowed; compute the loss from the logits with caref_loss"
        )


def _logit_form(model: nn.Module, inputs: Mapping[str, Any], first: Trial) -> LogitForm:
    """What the model does to its head's output, from a trial whose output spans [-REACH, REACH]."""
    name = name_of(model)
    if len(first.outputs) != 1:
        raise ValueError(
            f"{name} calls its output head {len(first.outputs)} times in one forward pass; it must be once"
        )
    output = first.outputs[0]
    ramp = torch.linspace(-REACH, REACH, output.size(-1), device=output.device).to(output.dtype)
    trial = Trial(model, first.head, ramp)
    made = _run(trial, inputs)
    logits = trial.losses[0][0] if trial.losses else whole(made["logits"])
    if logits.shape != output.shape:
        raise ValueError(f"{name} selects or reorders its logits, {tuple(output.shape)} to {tuple(logits.shape)}")
    bias = "final_logits_bias" if hasattr(model, "final_logits_bias") else None
    closest = float("inf")
    for scale, softcap in itertools.product(_candidates(model, _FACTORS, True), _candidates(model, _SOFTCAPS, False)):
        form = LogitForm(scale or 1.0, softcap, bias)
        error, allowed = _difference(logits, form.apply(ramp, model).expand_as(logits))
        if error <= allowed:
            return form
        closest = min(closest, error)
    raise ValueError(
        f"the head of {name} cannot be fused: something is done to its logits that is neither a scale nor a softcap "
        f"nor a constant bias (they differ by {closest:.3g} of the largest); leave fuse_head False"
    )


def _candidates(model: nn.Module, names: tuple[str, ...], is_factor: bool) -> list[float | None]:
    holders = (model.config, model.config.get_text_config(decoder=True), model, getattr(model, "model", None))
    found: list[float | None] = [None]
    for holder, name in itertools.product(holders, names):
        value = getattr(holder, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            found += [float(value), 1 / float(value)] if is_factor else [float(value)]
    return list(dict.fromkeys(found))


def _difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference relative to the largest value, and what rounding may make of it."""
    actual_64, expected_64 = actual.double().nan_to_num(), expected.double().nan_to_num()
    scale = expected_64.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = (actual_64 - expected_64).abs().max() / scale
    return float(error), STEPS * torch.finfo(actual.dtype).eps
