"""One repetition of one contestant, and repetitions of many, interleaved; time, page faults and memory."""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import Case
from .providers import Provider

WARM_UP = 2
# A fast contestant is repeated more often within a round, so that its median settles while the slow ones run.
MOST_PER_ROUND = 8
LEAST_ROUNDS = 3
PHASES = ("forward", "backward", "both")
PERCENTILES = (20, 50, 80)


class Sample(NamedTuple):
    """One repetition: seconds of the forward and of the backward pass, and minor page faults of the two together."""

    forward: float
    backward: float
    faults: int

    @property
    def both(self) -> float:
        """Seconds of forward and backward."""
        return self.forward + self.backward


class Workspace:
    """The tensors of one case, shared by its contestants; what a repetition overwrites is refreshed before the next."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.case = case
        self.values, self.labels = case.tensors(device)
        self._buffer = self.values.clone().requires_grad_()
        self._copy = torch.empty_like(self.values)

    def repeat(self, provider: Provider) -> Sample:
        """Run ``provider`` once on fresh logits and time it; the copy counts as a forward pass."""
        logits = self.refresh()
        faults, start = _page_faults(), time.perf_counter()
        result = self.forward(provider, logits)
        middle = time.perf_counter()
        # Kept alive past the end of the clock: freeing it is the business of the optimiser step, not of the loss.
        gradient = self.backward(provider, logits, result)
        end = time.perf_counter()
        sample = Sample(middle - start, end - middle, _page_faults() - faults)
        del gradient
        return sample

    def refresh(self) -> torch.Tensor:
        """The logits with their values restored: not a leaf, as the output of a head, so that it may be overwritten."""
        with torch.no_grad():
            self._buffer.copy_(self.values)
        return self._buffer.view_as(self._buffer)

    def forward(self, provider: Provider, logits: torch.Tensor) -> torch.Tensor:
        """The provider's loss, or the copy."""
        return self._copy.copy_(logits.detach()) if provider.loss is None else provider.loss(logits, self.labels)

    def backward(self, provider: Provider, logits: torch.Tensor, result: torch.Tensor) -> torch.Tensor | None:
        """The gradient of the provider's loss; nothing for the copy."""
        return None if provider.loss is None else torch.autograd.grad(result, logits)[0]


def interleave(workspace: Workspace, providers: tuple[Provider, ...], seconds: float) -> dict[str, list[Sample]]:
    """Samples of every provider, in random order, for about ``seconds`` and at least ``LEAST_ROUNDS`` rounds."""
    typical = {}
    for provider in providers:
        warm_up = [workspace.repeat(provider).both for _ in range(WARM_UP)]
        typical[provider.name] = min(warm_up)
    rounds = schedule(typical, seconds)
    known = {provider.name: provider for provider in providers}
    samples: dict[str, list[Sample]] = {name: [] for name in known}
    gc.collect()
    gc.disable()
    try:
        for name in rounds:
            samples[name].append(workspace.repeat(known[name]))
    finally:
        gc.enable()
    return samples


def schedule(typical: dict[str, float], seconds: float, seed: int = 0) -> Iterator[str]:
    """Names in the order in which they run: whole rounds, each shuffled, filling ``seconds`` of measured time.

    ``typical`` gives the expected seconds of one repetition.  The slowest runs once a round, the others up to
    ``MOST_PER_ROUND`` times.
    """
    slowest = max(typical.values())
    repeats = {name: max(1, min(MOST_PER_ROUND, int(slowest / own))) for name, own in typical.items()}
    one_round = [name for name, count in repeats.items() for _ in range(count)]
    cost = sum(typical[name] for name in one_round)
    order = random.Random(seed)
    for _ in range(max(LEAST_ROUNDS, int(seconds / cost))):
        order.shuffle(one_round)
        yield from one_round


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The percentiles of ``PERCENTILES``, interpolated.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"percentiles need at least 2 values; got {len(values)}")
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    low, middle, high = (cuts[percent - 1] for percent in PERCENTILES)
    return low, middle, high


def useful_bytes(case: Case, phase: str) -> int:
    """Bytes that a perfect streaming implementation moves: the forward reads the logits, the backward reads them and
    writes the gradient.  The copy, which is listed under "both", reads and writes once.
    """
    return case.logits_bytes * {"forward": 1, "backward": 2, "both": 3, "copy": 2}[phase]


def extra_memory(workspace: Workspace, provider: Provider) -> int:
    """Bytes by which the resident set of the process peaks above its level before a forward and backward pass.

    Means something only in a process whose allocator gives memory back at once (``REGIMES["memory"]`` of measure.py);
    resolution one page, and some kilobytes for what the allocator keeps.

    Raises:
        OSError: the kernel does not let a process reset its peak.
    """
    workspace.repeat(provider)  # whatever is made once
    logits = workspace.refresh()
    gc.collect()
    before = resident_bytes(reset_peak=True)
    result = workspace.forward(provider, logits)
    gradient = workspace.backward(provider, logits, result)
    peak = resident_bytes(peak=True)
    del gradient
    return max(0, peak - before)


def resident_bytes(*, peak: bool = False, reset_peak: bool = False) -> int:
    """The resident set of this process, or its peak since the last reset.

    Raises:
        OSError: the kernel does not let a process reset its peak.
    """
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmHWM" if peak else "VmRSS")


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024
