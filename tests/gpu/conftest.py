"""The target of every test here, guard zones, and the rule that an injected fault must make its test fail."""

from __future__ import annotations

import cuda_device
import pytest
import torch

from caref_kernels import backends

from . import fake_device, faults
from .guard_zones import GuardZones
from .target import Target


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        fake = metafunc.config.getoption("--fake-device")
        metafunc.parametrize("target", (fake_device.BACKEND,) if fake else cuda_device.ON_CUDA, indirect=True)


@pytest.fixture
def fault() -> None:
    """The name of the injected fault; ``gpu.faults.notices`` parametrizes it."""


@pytest.fixture
def target(request: pytest.FixtureRequest, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Each backend of the GPU; with ``--fake-device`` the CPU backend, at small sizes."""
    if request.config.getoption("--fake-device"):
        fake_device.install(monkeypatch)
    backend = request.getfixturevalue("runnable")(request.param)
    device = cuda_device.device_of(backend)
    if fault is not None:
        backend = f"{backend}-with-{fault}"
        monkeypatch.setitem(backends._BACKENDS, backend, faults.BY_NAME[fault](backends.get(request.param)))
    return Target(backend, request.param, device, small=device == "cpu")


@pytest.fixture
def guard_zones() -> GuardZones:
    """Guards the tensors of a call, and fills fresh ones with NaN."""
    return GuardZones()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """A test with a fault passes if an assertion fails: any other error would prove nothing.

    A test that does not fit into the memory of the device is skipped.
    """
    name = pyfuncitem.callspec.params.get("fault") if hasattr(pyfuncitem, "callspec") else None
    try:
        result = yield
    except torch.cuda.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {error}")
    except AssertionError:
        if name is None:
            raise
        return True
    if name is not None:
        pytest.fail(f"the injected fault {name} was not noticed", pytrace=False)
    return result
