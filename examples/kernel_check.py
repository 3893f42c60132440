"""The loss on rows that a model makes: its errors against float64, and its time, alone and in a training step."""

import math

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from caref_kernels import CarefConfig, caref_loss

IGNORED = -100


def written_out(logits, labels):
    """The loss of each row as one writes it in PyTorch: cross-entropy, SCED and KL to uniform."""
    log_p = F.log_softmax(logits, -1)
    p, log_ratio = log_p.exp(), log_p + math.log(logits.size(-1))
    sced = ((p * log_ratio.abs()) ** CarefConfig.alpha * (1 - p) ** CarefConfig.beta).sum(-1)
    kl = (p * log_ratio).sum(-1)
    ce = F.cross_entropy(logits, labels, reduction="none")
    return ce + CarefConfig.lambda_sced * sced + CarefConfig.lambda_kl * kl


def fused(logits, labels):
    return caref_loss(logits, labels, reduction="none")


LOSSES = {"written out": written_out, "caref_loss": fused, "cross-entropy": F.cross_entropy}


@torch.no_grad()
def target_rows(model, batches, count):
    """Logits (R, V) that predict the first ``count`` tokens with a label, and these tokens (R,)."""
    found = []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
        found.append((logits[labels != IGNORED], labels[labels != IGNORED]))
        if sum(len(part) for _, part in found) >= count:
            break
    return tuple(torch.cat(parts)[:count] for parts in zip(*found, strict=True))


def check(logits, labels):
    """Lines: the largest relative errors of a row's loss and gradient, and the milliseconds of forward and backward."""
    loss, gradient = _backward(written_out, logits.double(), labels)
    lines = [f"  {'':<16}{'loss error':>12}{'gradient error':>16}{'ms':>9}"]
    for name, function in LOSSES.items():
        errors = ("-", "-")
        if function is not F.cross_entropy:
            own_loss, own_gradient = (value.double() for value in _backward(function, logits, labels))
            relative = (own_gradient - gradient).norm(dim=-1) / gradient.norm(dim=-1)
            errors = [f"{error.max().item():.1e}" for error in ((own_loss - loss).abs() / loss.abs(), relative)]
        lines.append(f"  {name:<16}{errors[0]:>12}{errors[1]:>16}{_milliseconds(function, logits, labels):>9.2f}")
    lines.append("  errors: largest relative error of a row against float64 (gradient: Euclidean norm).")
    return [*lines, "  ms: forward and backward, median."]


@torch.no_grad()
def time_steps(model, batch, seconds):
    """Lines: the seconds of a step by name, and what the loss takes of them on the logits and labels of ``batch``."""
    labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].flatten()
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.flatten(0, 1)
    times = {name: _milliseconds(function, logits, labels) for name, function in LOSSES.items()}
    own = times["caref_loss"]
    lines = [
        f"  {name:<16}{value:.2f} s per step, of which the loss takes {own:.1f} ms, {0.1 * own / value:.1f} %"
        for name, value in seconds.items()
    ]
    lines.append(f"  the loss alone, on the {len(labels)} rows of a batch, {(labels != IGNORED).sum()} with a label:")
    return [*lines, *(f"    {name:<16}{value:7.1f} ms" for name, value in times.items())]


@torch.enable_grad()
def _backward(function, logits, labels):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, labels)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def _milliseconds(function, logits, labels):
    call = {"call": lambda: _backward(function, logits, labels)}
    return 1e3 * Timer("call()", globals=call, num_threads=torch.get_num_threads()).blocked_autorange().median
