"""A process for each measurement: one that breaks costs itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .sources import ROOT

MOST_CHARACTERS = 600
LEAST_SECONDS = 20.0


class Limits:
    """Seconds of one process, and of all together from now on."""

    def __init__(self, of_all: float, of_one: float) -> None:
        self._of_one, self._end = of_one, time.monotonic() + of_all

    def next(self) -> tuple[float, str | None]:
        """(seconds that the next process may take, why it should not start)."""
        left = self._end - time.monotonic()
        too_late = left < min(self._of_one, LEAST_SECONDS)
        return min(self._of_one, left), f"left out: {max(left, 0):.0f} s were left" if too_late else None


def run(
    module: str, arguments: list[str], limits: Limits, environment: dict[str, str] | None = None
) -> tuple[dict | None, str | None]:
    """Run ``python -m module ARGUMENTS --part FILE``: (what it wrote to FILE, ``None``) or (``None``, the reason)."""
    seconds, reason = limits.next()
    if reason is not None:
        return None, reason
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        reason = _run([module, *arguments, "--part", str(part)], seconds, environment)
        if reason is None and part.is_file():
            return json.loads(part.read_text()), None
    return None, reason or "no result"


def _run(command: list[str], limit: float, environment: dict[str, str] | None) -> str | None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", timeout=limit, check=False, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if done.returncode == 0:
        return None
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return f"{how}: {done.stderr.strip()[-MOST_CHARACTERS:]}".replace(str(ROOT), ".").replace(sys.prefix, "PREFIX")
