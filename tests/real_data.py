"""Files that tests read and that a copy of the repository may lack: missing ones are skipped, and fail in CI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(__file__).with_name("data")


def require_data(path: Path) -> Path:
    """Return ``path`` if it is there; otherwise the test is skipped, or fails where CI=true forbids that."""
    if path.exists():
        return path
    message = f"missing test data: {path}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message)
    pytest.skip(message)
