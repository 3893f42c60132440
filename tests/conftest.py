"""The backend fixtures, the options and the tests of a GPU, and a network that is switched off."""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import cuda_device
import cuda_emulated
import pytest
import torch
import triton_interpreter
from gpu import report

from caref_kernels import backends

# The emulation of the CUDA kernels is a backend of the suite alone.
BACKENDS = (*backends.ORDER, cuda_emulated.NAME)
GPU_TESTS = Path(report.__file__).parent
# Their launches need a GPU or Triton's interpreter.
TRITON_FILES = ("test_triton_kernels.py", "test_triton_row_math.py", "test_triton_selection.py")
DEVICE_CHECKED = (*backends.DEVICE_CHECKED, cuda_emulated.NAME)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="NAMES",
        help="comma-separated backends that must run here; any other one that cannot is skipped with its reason",
    )
    parser.addoption(
        "--gpucheck", type=Path, metavar="FILE", help="write the outcomes to FILE; an error without a CUDA device"
    )
    parser.addoption("--fake-device", action="store_true", help="rehearse tests/gpu on the CPU, at small sizes")


def _required(config: pytest.Config) -> list[str]:
    return [name for name in config.getoption("--require").split(",") if name]


def pytest_configure(config: pytest.Config) -> None:
    # A second thread gains nothing on these sizes and costs minutes where the cores are shared; test_determinism.py
    # runs every number of threads.
    torch.set_num_threads(1)
    if triton_interpreter.ACTIVE:
        triton_interpreter.quicken()
        # numpy's own remarks on infinities, which the GPU does not make
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
    unknown = sorted(set(_required(config)) - set(BACKENDS))
    if unknown:
        raise pytest.UsageError(f"--require: unknown backends {unknown}; there are {', '.join(BACKENDS)}")
    config.pluginmanager.register(report.LostDevice())
    if config.getoption("--gpucheck") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_gpu_report(config))


def _gpu_report(config: pytest.Config) -> report.Report:
    from benchmarks.provenance import gpu_provenance

    reason = None if config.getoption("--fake-device") else cuda_device.missing()
    if reason is not None:
        raise pytest.UsageError(f"--gpucheck: {reason}")
    try:
        provenance = gpu_provenance(torch.device("cpu" if config.getoption("--fake-device") else "cuda"))
    except ValueError as error:
        raise pytest.UsageError(f"--gpucheck: {error}") from error
    return report.Report(config.getoption("--gpucheck"), provenance)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--gpucheck``: files without a test for a GPU, which may import packages that its machine does not have."""
    if config.getoption("--gpucheck") is None or collection_path.suffix != ".py":
        return None
    if GPU_TESTS in collection_path.parents or collection_path.name in TRITON_FILES:
        return None
    return None if re.search(r"def test_\w+\([^)]*\b(\w*backend|cuda)\b", collection_path.read_text()) else True


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark with ``gpu`` the tests that run on a CUDA device: tests/gpu, and those of the suite for its backends."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    on_gpu = any(name.endswith("backend") and value in cuda_device.ON_CUDA for name, value in parameters.items())
    if on_gpu or "cuda" in item.fixturenames or GPU_TESTS in item.path.parents or item.path.name in TRITON_FILES:
        item.add_marker("gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under Triton's interpreter: only the tests of its backend, and of those the ones that it can take.

    Otherwise: all but those that the emulation of CUDA cannot take.
    """
    kept, left_out = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if triton_interpreter.ACTIVE:
            suitable = "triton" in item.nodeid and not triton_interpreter.is_too_large(item.originalname, parameters)
        else:
            suitable = not cuda_emulated.is_left_out(item.originalname, parameters)
        (kept if suitable else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _backend_fixture(name: str, names: Iterable[str], meaning: str):
    @pytest.fixture(params=tuple(names), name=name)
    def fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        chosen = _runnable(request.param, request.config)
        if cuda_device.device_of(chosen) == "cuda":
            cuda_device.move_tensors_of(request.module, "cuda", monkeypatch)
        return chosen

    fixture.__doc__ = meaning
    return fixture


backend = _backend_fixture("backend", BACKENDS, "The name of each backend that runs here.")
fused_backend = _backend_fixture(
    "fused_backend",
    (name for name in BACKENDS if name != "reference"),
    "The name of each backend that runs here and is not the reference.",
)
raising_backend = _backend_fixture(
    "raising_backend",
    (name for name in BACKENDS if name not in DEVICE_CHECKED),
    "The name of each backend that runs here and raises for a label that is no column.",
)
silent_backend = _backend_fixture(
    "silent_backend",
    DEVICE_CHECKED,
    "The name of each backend that runs here and makes the row of such a label NaN, because it cannot raise.",
)


@pytest.fixture
def cuda() -> torch.device:
    """The current CUDA device."""
    reason = cuda_device.missing()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def runnable(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Skips, with the reason, unless the backend of that name runs here; a failure if it is required."""
    return functools.partial(_runnable, config=request.config)


def _runnable(name: str, config: pytest.Config) -> str:
    device = cuda_device.device_of(name)
    reason = cuda_device.missing() if device == "cuda" else None
    reason = reason or backends.get(name).unsupported(torch.empty(1, 2, device=device))
    if reason is None:
        return name
    if name in _required(config):
        pytest.fail(f"backend {name!r} is required and cannot run: {reason}")
    pytest.skip(f"backend {name!r}: {reason}")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the library nor a test may reach beyond this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise AssertionError(f"a test tried to connect to {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
