"""The backend fixture, the option that turns skips into failures, and a network that is switched off."""

from __future__ import annotations

import ipaddress
import socket

import pytest
import torch
import triton_interpreter

from caref_kernels import backends


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
    unknown = sorted(set(_required(config)) - set(backends.ORDER))
    if unknown:
        raise pytest.UsageError(f"--require: unknown backends {unknown}; there are {', '.join(backends.ORDER)}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under Triton's interpreter: only the tests of its backend, and of those the ones that it can take."""
    if not triton_interpreter.ACTIVE:
        return
    kept, left_out = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        suitable = "triton" in item.nodeid and not triton_interpreter.is_too_large(item.originalname, parameters)
        (kept if suitable else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=backends.ORDER)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that runs here."""
    return _runnable(request.param, request.config)


@pytest.fixture(params=[name for name in backends.ORDER if name != "reference"])
def fused_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that runs here and is not the reference."""
    return _runnable(request.param, request.config)


@pytest.fixture(params=[name for name in backends.ORDER if name not in backends.DEVICE_CHECKED])
def raising_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that runs here and raises for a label that is no column."""
    return _runnable(request.param, request.config)


@pytest.fixture(params=backends.DEVICE_CHECKED)
def silent_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that runs here and makes the row of such a label NaN, because it cannot raise."""
    return _runnable(request.param, request.config)


def _runnable(name: str, config: pytest.Config) -> str:
    reason = backends.get(name).unsupported(torch.empty(1, 2))
    if reason is None:
        return name
    if name in _required(config):
        pytest.fail(f"backend {name!r} is required and cannot run: {reason}")
    pytest.skip(f"backend {name!r}: {reason}")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """X09: neither the library nor a test may reach beyond this machine."""
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
