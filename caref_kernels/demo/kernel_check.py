"""The loss on real rows: against its plain definition in float64, against the clock, and in bytes."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import CarefConfig, caref_loss

REPETITIONS = 9
# glibc maps every block above this afresh from the system, and eager temporaries then cost several times their work.
MMAP_THRESHOLD = 32 << 20


@dataclass(frozen=True)
class Measured:
    """One implementation on the rows: largest relative errors, milliseconds and bytes of forward plus backward."""

    name: str
    loss_error: float | None
    gradient_error: float | None
    milliseconds: float
    extra_bytes: int


@dataclass(frozen=True)
class KernelCheck:
    """All implementations on the same ``rows`` of ``columns`` logits."""

    rows: int
    columns: int
    logits_bytes: int
    measured: tuple[Measured, ...]


def eager_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row as one writes it in PyTorch; an independent oracle in float64."""
    columns = logits.size(-1)
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp()
    log_ratio = log_p + math.log(columns)
    sced = ((p * log_ratio.abs()) ** CarefConfig.alpha * (1 - p) ** CarefConfig.beta).sum(-1)
    kl = (p * log_ratio).sum(-1)
    ce = F.nll_loss(log_p, labels, reduction="none")
    return ce + CarefConfig.lambda_sced * sced + CarefConfig.lambda_kl * kl


def fused_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row from the package, on the backend that ``"auto"`` takes."""
    return caref_loss(logits, labels, reduction="none")


def check(logits: Tensor, labels: Tensor, after_part: Callable[[], None]) -> KernelCheck:
    """Measure the eager and the fused loss, and cross-entropy alone for scale, on logits (N, V) float32.

    Every implementation starts from the mean over rows, as in training.  The repetitions are interleaved, so that a
    slow moment of the machine meets all of them.  ``after_part`` is called after the errors, the times and the bytes.
    """
    exact = _loss_and_gradient(eager_loss, logits.double(), labels)
    errors = {}
    for name, function in (("eager", eager_loss), ("fused", fused_loss)):
        errors[name] = _errors(_loss_and_gradient(function, logits, labels), exact)
    after_part()
    functions: dict[str, Callable] = {
        "eager": lambda z, y: eager_loss(z, y).mean(),
        "fused": caref_loss,
        "cross-entropy alone": F.cross_entropy,
    }
    times = time_interleaved({name: _closure(function, logits, labels) for name, function in functions.items()})
    after_part()
    measured = []
    for name, function in functions.items():
        loss_error, gradient_error = errors.get(name, (None, None))
        extra = extra_bytes(_closure(function, logits, labels))
        measured.append(Measured(name, loss_error, gradient_error, 1e3 * times[name], extra))
    after_part()
    return KernelCheck(logits.size(0), logits.size(1), logits.nbytes, tuple(measured))


def time_interleaved(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each function over ``REPETITIONS`` rounds, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(REPETITIONS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_bytes(function: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held at one time during ``function()``, beyond what it held before.

    Read from the allocation events of torch's profiler.  Memory that does not come from torch is not in it.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = most = 0
    for _, size in sorted(sizes, key=lambda item: item[0]):
        held += size
        most = max(most, held)
    return most


def _closure(function: Callable, logits: Tensor, labels: Tensor) -> Callable[[], object]:
    def run() -> None:
        leaf = logits.detach().requires_grad_()
        function(leaf, labels).backward()

    return run


def _loss_and_gradient(function: Callable, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, labels)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().double(), gradient.double()


def _errors(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Largest relative error of a row's loss, and of a row's gradient in the Euclidean norm."""
    loss = ((got[0] - exact[0]).abs() / exact[0].abs()).max()
    gradient = ((got[1] - exact[1]).norm(dim=-1) / exact[1].norm(dim=-1)).max()
    return loss.item(), gradient.item()
