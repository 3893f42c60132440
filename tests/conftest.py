"""The backend fixture, the option that turns skips into failures, and a network that is switched off."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

import cuda_device
import cuda_emulated
import pytest
import torch
import triton_interpreter

from caref_kernels import backends

# The emulation of the CUDA kernels is a backend of the suite alone.
BACKENDS = (*backends.ORDER, cuda_emulated.NAME)
DEVICE_CHECKED = (*backends.DEVICE_CHECKED, cuda_emulated.NAME)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="NAMES",
        help="comma-separated backends that must run here; any other one that cannot is skipped with its reason",
    )


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
