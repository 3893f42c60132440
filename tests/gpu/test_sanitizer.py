"""The kernels under compute-sanitizer."""

from __future__ import annotations

import sys

import pytest

from . import sanitizer


@pytest.fixture(scope="session")
def usable(tmp_path_factory) -> None:
    """Skips unless the sanitizer reports an injected fault."""
    reason = sanitizer.unusable(tmp_path_factory.mktemp("sanitizer"))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_sanitizer_reports_nothing(target, tool):
    if target.small:
        pytest.skip("no CUDA device to sanitize")
    program = (sys.executable, "-m", "gpu.sanitizer", target.backend)
    found = sanitizer.errors(*sanitizer.run(tool, *program, timeout=140))
    assert not found, found
