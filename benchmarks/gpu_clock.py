"""Time and memory of calls on a device: events on the stream, behind a pause, after the cache was filled anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# Larger than any second-level cache, 50 MiB on an H200.
FLUSHED_BYTES = 2**28
# Of the device's clock, about a millisecond: the host queues forward and backward of any contestant in less.
PAUSE_CYCLES = 2_000_000


class GpuSample(NamedTuple):
    """Seconds of one repetition."""

    forward: float
    backward: float
    both: float
    call: float


class Clock:
    """Times a forward and a backward pass on one device; on the CPU, to try a command out, by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._cache = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if self._on_gpu else None

    def repeat(self, prepare: Callable, forward: Callable, backward: Callable) -> GpuSample:
        """Run twice, for the device's time and for the wall clock of a call with nothing queued before it.

        ``prepare() -> inputs`` is not timed; ``forward(inputs) -> result``; ``backward(inputs, result) -> gradients``.
        """
        inputs = self._fresh(prepare)
        if self._on_gpu:
            torch.cuda._sleep(PAUSE_CYCLES)
        marks = [self._mark()]
        result = forward(inputs)
        marks.append(self._mark())
        gradient = backward(inputs, result)
        marks.append(self._mark())
        self._wait()
        first, second = (self._between(*pair) for pair in zip(marks, marks[1:], strict=False))
        del result, gradient
        inputs = self._fresh(prepare)
        self._wait()
        start = time.perf_counter()
        result = forward(inputs)
        gradient = backward(inputs, result)
        self._wait()
        call = time.perf_counter() - start
        del gradient, result
        return GpuSample(first, second, first + second, call)

    def extra_memory(self, prepare: Callable, forward: Callable, backward: Callable) -> int | None:
        """Bytes by which allocated memory peaks during a forward and backward pass; ``None`` off a CUDA device."""
        if not self._on_gpu:
            return None
        inputs = prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = forward(inputs)
        gradient = backward(inputs, result)
        torch.cuda.synchronize()
        del gradient, result
        return torch.cuda.max_memory_allocated() - before

    def _fresh(self, prepare: Callable):
        inputs = prepare()
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
