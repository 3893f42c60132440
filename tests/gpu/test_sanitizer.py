"""The kernels under compute-sanitizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from . import sanitizer

TESTS = Path(__file__).resolve().parents[1]


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
    found = sanitizer.errors(*sanitizer.run(tool, *program, cwd=TESTS, timeout=140))
    assert not found, found
