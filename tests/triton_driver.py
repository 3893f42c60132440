"""A recording stub of the Triton driver: launches are specialized and compiled as for a GPU, and recorded.

Unlike ahead-of-time compilation, this shows how Triton treats the arguments of a call: their types, which of them
become constants, and how many kernels are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# The arguments of a launch before those of the kernel: stream, function, two metadata objects, two hooks.
_BEFORE_ARGUMENTS = 6


class Launch(NamedTuple):
    """One launch; ``signature`` has the type of each parameter, "constexpr" for compile-time constants."""

    kernel: str
    grid: tuple[int, int, int]
    signature: dict[str, str]
    arguments: dict[str, Any]
    max_registers: int | None  # per thread, if the launch limits them


class RecordingDriver:
    """The methods of a driver that Triton calls, for one device that runs nothing."""

    def __init__(self, capability: int, launches: list[Launch]) -> None:
        self._capability = capability
        self.utils = self
        self._launches = launches

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """(module, function, registers, spills, maximum threads) of a kernel that is not loaded."""
        return None, 1, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        names = source.fn.arg_names

        def launch(x, y, z, *others):
            arguments = dict(zip(names, others[_BEFORE_ARGUMENTS:], strict=True))
            name, max_registers = source.fn.fn.__name__, metadata.maxnreg
            self._launches.append(Launch(name, (x, y, z), dict(source.signature), arguments, max_registers))

        return launch


@contextmanager
def recorded(kernels: list, capability: int = 90) -> Iterator[list[Launch]]:
    """Record the launches of ``kernels`` in a with-block; their compiled code is discarded at its end."""
    from triton.runtime import driver

    before, launches = driver._active, []
    for kernel in kernels:
        kernel.device_caches.clear()
    driver.set_active(RecordingDriver(capability, launches))
    try:
        yield launches
    finally:
        driver._active = before
        for kernel in kernels:
            kernel.device_caches.clear()


def compilations(kernel) -> int:
    """The number of times that ``kernel`` was compiled in the with-block."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())
