"""``--fake-device``: the calls to ``torch.cuda`` of the tests here, carried out by the CPU, to rehearse them.

The fake behaves like a GPU where the injected faults need it: work on another stream sees memory before the pending
copies, a replayed graph repeats the captured operators, reading a value is an error while synchronisation is one, and
allocations are counted and limited.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BACKEND = "cpu"
MEMORY_BYTES = 2**32


class Stream:
    """A stream, with the copies on it that no other stream may rely on yet."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (memory, before, after)

    def synchronize(self) -> None:
        self.pending.clear()

    def wait_stream(self, other: Stream) -> None:
        other.synchronize()


class Graph:
    """The operators of a capture, and their outputs."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, arguments, options, outputs in self.calls:
                fresh = tree_leaves(function(*arguments, **options))
                for one, other in zip(tree_leaves(outputs), fresh, strict=True):
                    if isinstance(one, torch.Tensor) and one.data_ptr() != other.data_ptr():
                        one.copy_(other)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, outputs))
        return outputs


class _Copies(TorchDispatchMode):
    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        before, result = args[0].clone(), func(*args, **(kwargs or {}))
        self._stream.pending.append((args[0], before, args[0].clone()))
        return result


class FakeDevice:
    """The state of the fake."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default = self.current = Stream()
        self.left = 0
        self._monkeypatch, self._read, self._empty = monkeypatch, torch.Tensor.item, torch.empty
        self._profile: torch.autograd.profiler.profile | None = None

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        previous, self.current = self.current, stream
        hidden = list(previous.pending) if stream is not previous else []
        for memory, before, _ in reversed(hidden):
            memory.data.copy_(before)
        try:
            with _Copies(stream):
                yield
        finally:
            self.current = previous
            for memory, _, after in hidden:
                memory.data.copy_(after)

    def set_sync_debug_mode(self, mode: str) -> None:
        def refuse(_tensor: torch.Tensor):
            raise RuntimeError("called a synchronizing CUDA operation")

        self._monkeypatch.setattr(torch.Tensor, "item", refuse if mode == "error" else self._read)

    def set_per_process_memory_fraction(self, fraction: float) -> None:
        def limited(*arguments, **options) -> torch.Tensor:
            made = self._empty(*arguments, **options)
            if 2 * made.nbytes > fraction * MEMORY_BYTES:  # there is a second one as large
                raise torch.cuda.OutOfMemoryError("the fake device is out of memory")
            return made

        self._monkeypatch.setattr(torch, "empty", limited if fraction < 1 else self._empty)

    def reset_peak_memory_stats(self) -> None:
        self._profile = torch.autograd.profiler.profile(profile_memory=True).__enter__()
        self.left = 0

    def max_memory_allocated(self) -> int:
        self._profile.__exit__(None, None, None)
        level = peak = 0
        for event in self._profile.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        self.left = level
        return peak


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the parts of ``torch.cuda`` that the tests here call."""
    fake = FakeDevice(monkeypatch)
    replaced = {
        "Stream": Stream, "CUDAGraph": Graph, "graph": lambda graph: _Capture(graph),
        "stream": fake.stream, "current_stream": lambda: fake.current, "default_stream": lambda device: fake.default,
        "synchronize": lambda: None, "_sleep": lambda cycles: None, "device_count": lambda: 1,
        "empty_cache": lambda: None, "set_sync_debug_mode": fake.set_sync_debug_mode,
        "mem_get_info": lambda: (MEMORY_BYTES, MEMORY_BYTES),
        "set_per_process_memory_fraction": fake.set_per_process_memory_fraction,
        "reset_peak_memory_stats": fake.reset_peak_memory_stats, "max_memory_allocated": fake.max_memory_allocated,
        "memory_allocated": lambda: fake.left,
    }  # fmt: skip
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
