"""Time, page faults and memory of one call, and repetitions of many calls, interleaved in random order."""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Larger than any second-level cache, 50 MiB on an H200.
FLUSHED_BYTES = 2**28
# Of the device's clock, about a millisecond: the host queues forward and backward of any implementation in less.
PAUSE_CYCLES = 2_000_000
# A fast implementation is repeated more often within a round, so that its median settles while the slow ones run.
MOST_PER_ROUND = 8
LEAST_ROUNDS = 3
PERCENTILES = (20, 50, 80)


class Calls(NamedTuple):
    """What is timed: ``prepare() -> inputs`` is not, ``forward(inputs) -> result`` and ``backward`` are."""

    prepare: Callable[[], Any]
    forward: Callable[[Any], Any]
    backward: Callable[[Any, Any], Any]


class Sample(NamedTuple):
    """One repetition: seconds, and minor page faults of forward and backward together."""

    forward: float
    backward: float
    call: float  # wall clock of both with the host's part, nothing queued before
    page_faults: int

    @property
    def both(self) -> float:
        """Seconds of forward and backward."""
        return self.forward + self.backward


class Clock:
    """Times calls on one device: by the wall clock on a CPU, by events on the stream of a GPU.

    On a GPU the events stand behind a pause in which the host queues everything, so that they measure the time of the
    device alone.  The second-level cache is filled with other data before.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._cache = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if self._on_gpu else None

    def time(self, calls: Calls) -> Sample:
        """Run ``calls`` once, on a GPU a second time for the wall clock.

        Results live until the clock has stopped: to free them is the work of the optimiser step, not of the loss.
        """
        inputs = self._fresh(calls)
        if self._on_gpu:
            torch.cuda._sleep(PAUSE_CYCLES)
        faults, marks = _page_faults(), [self._mark()]
        result = calls.forward(inputs)
        marks.append(self._mark())
        gradient = calls.backward(inputs, result)
        marks.append(self._mark())
        faults = _page_faults() - faults
        self._wait()
        forward, backward = (self._between(*pair) for pair in zip(marks, marks[1:], strict=False))
        del result, gradient
        call = self._wall_clock(calls) if self._on_gpu else forward + backward
        return Sample(forward, backward, call, faults)

    def extra_memory(self, calls: Calls) -> int:
        """Bytes by which memory peaks during forward and backward above its level before.

        On a GPU this is allocated memory; on a CPU it is the resident set of the process, which means something only
        if the allocator gives memory back at once (``ALLOCATORS["memory"]`` of measure.py).

        Raises:
            OSError: on a CPU, if the kernel does not let a process reset its peak.
        """
        self.time(calls)  # whatever is made once
        inputs = calls.prepare()
        gc.collect()
        if self._on_gpu:
            self._wait()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self._on_gpu else resident_bytes(reset_peak=True)
        result = calls.forward(inputs)
        gradient = calls.backward(inputs, result)
        self._wait()
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else resident_bytes(peak=True)
        del gradient, result
        return max(0, peak - before)

    def _wall_clock(self, calls: Calls) -> float:
        inputs = self._fresh(calls)
        self._wait()
        start = time.perf_counter()
        result = calls.forward(inputs)
        gradient = calls.backward(inputs, result)
        self._wait()
        seconds = time.perf_counter() - start
        del gradient, result
        return seconds

    def _fresh(self, calls: Calls) -> Any:
        inputs = calls.prepare()
        if self._cache is not None:
            self._cache.zero_()
        return inputs

    def _mark(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def interleave(repeat: dict[str, Callable[[], Any]], typical: dict[str, float], seconds: float) -> dict[str, list]:
    """What the functions return, by name, called in the order of :func:`schedule`."""
    samples: dict[str, list] = {name: [] for name in repeat}
    gc.collect()
    gc.disable()
    try:
        for name in schedule(typical, seconds):
            samples[name].append(repeat[name]())
    finally:
        gc.enable()
    return samples


def schedule(typical: dict[str, float], seconds: float, seed: int = 0) -> Iterator[str]:
    """Names in the order in which they run: whole rounds, each shuffled, filling ``seconds`` of measured time.

    ``typical`` gives the expected seconds of one repetition.  The slowest runs once a round, the others up to
    ``MOST_PER_ROUND`` times.
    """
    slowest = max(typical.values(), default=0.0)
    repeats = {name: max(1, min(MOST_PER_ROUND, int(slowest / own))) for name, own in typical.items()}
    one_round = [name for name, count in repeats.items() for _ in range(count)]
    cost = sum(typical[name] for name in one_round)
    order = random.Random(seed)
    for _ in range(max(LEAST_ROUNDS, int(seconds / cost)) if one_round else 0):
        order.shuffle(one_round)
        yield from one_round


def times(samples: list[Sample], phases: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a row: the number of samples, percentiles of every phase in milliseconds, median page faults."""
    faults = sorted(sample.page_faults for sample in samples)[len(samples) // 2]
    fields = {f"{phase}_ms": percentiles_ms([getattr(one, phase) for one in samples]) for phase in phases}
    return {"samples": len(samples), "page_faults": faults, **fields}


def percentiles_ms(seconds: list[float]) -> list[float]:
    """The percentiles of ``PERCENTILES`` in milliseconds, to four significant digits: more would be noise.

    Raises:
        ValueError: fewer than two values.
    """
    if len(seconds) < 2:
        raise ValueError(f"percentiles need at least 2 values; got {len(seconds)}")
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return [float(f"{1e3 * cuts[percent - 1]:.4g}") for percent in PERCENTILES]


def resident_bytes(*, peak: bool = False, reset_peak: bool = False) -> int:
    """The resident set of this process, or its peak since the last reset.

    Raises:
        OSError: the kernel does not let a process reset its peak.
    """
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
