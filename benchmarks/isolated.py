"""A process for each case: one that a contestant breaks costs that case, and the results file is whole after each.

The parent never touches the device.  A worker is the same module with ``--worker CASE --part FILE``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .provenance import ROOT

MOST_CHARACTERS = 600


def run_cases(
    module: str, names: Iterable[str], arguments: list[str], budget: float, limit: float,
    done: Callable[[str, dict], None], environment: dict[str, str] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Run ``python -m module --worker NAME`` for every name; ``done(name, part)`` gets what it wrote.

    Returns the reasons of the cases without a result: over the ``limit`` of one, ended badly, or left out because the
    ``budget`` (seconds, for all of them) was spent.
    """
    end = time.monotonic() + budget
    left_out = {}
    for name in names:
        left = end - time.monotonic()
        if left < min(limit, 20.0):
            left_out[name] = f"left out: {max(left, 0):.0f} s of the budget were left"
            continue
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, "part.json")
            reason = _run([module, "--worker", name, "--part", str(part), *arguments], min(limit, left), environment)
            if reason is None and part.is_file():
                done(name, json.loads(part.read_text()))
            else:
                left_out[name] = reason or "no result"
    return left_out


def write(path: Path, results: dict) -> None:
    """Replace the results file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


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
