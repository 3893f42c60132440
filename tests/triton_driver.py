"""A driver for Triton where there is no device: a launch is specialized and compiled as for a GPU, and written down.

What ahead-of-time compilation does not see is what Triton makes of the arguments of a call: their types, the ones that
it turns into constants, and how many kernels that makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# Stream, function, metadata of the kernel and of the launch, and a hook each for before and after.
_BEFORE_ARGUMENTS = 6


class Launch(NamedTuple):
    """One launch: ``signature`` has the type of each parameter, "constexpr" for those that are compiled in."""

    kernel: str
    grid: tuple[int, int, int]
    signature: dict[str, str]
    arguments: dict[str, Any]
    most_registers: int | None  # of a thread, if the launch says so


class RecordingDriver:
    """What Triton asks of a driver, for one device that runs nothing."""

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
        """(module, function, registers, spills, most threads); nothing is loaded that would be unloaded."""
        return None, 1, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        names = source.fn.arg_names

        def launch(x, y, z, *others):
            arguments = dict(zip(names, others[_BEFORE_ARGUMENTS:], strict=True))
            name, most = source.fn.fn.__name__, metadata.maxnreg
            self._launches.append(Launch(name, (x, y, z), dict(source.signature), arguments, most))

        return launch


@contextmanager
def recorded(kernels: list, capability: int = 90) -> Iterator[list[Launch]]:
    """The launches of ``kernels`` inside of the block; what was compiled for them is forgotten at its end."""
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


def variants(kernel) -> int:
    """How many times ``kernel`` was compiled inside of the block."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())
