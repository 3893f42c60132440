"""Negative controls in compiled code: the Triton kernels with a mistake in their source must not pass.

The package is copied, one line is changed, and a stage of the copy runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .report import judge

PACKAGE = Path(__file__).resolve().parents[1]


class Patch(NamedTuple):
    """A mistake: in which file, what becomes of which text, and the stage that must notice."""

    path: str
    old: str
    new: str
    stage: str


_ROWS = "backends/triton/rows.py"
_MASK, _LABEL = 'mask=column < columns, other=float("-inf")', "inside = (label >= 0) & (label < columns)"
_OFFSET = "outer * outer_stride.to(tl.int64) + (narrow % inner_rows).to(tl.int64) * inner_stride.to(tl.int64)"
PATCHES = {
    "unmasked tail": Patch(_ROWS, _MASK, _MASK.replace("< columns,", "< columns + 8,"), "smoke"),
    "32-bit row offset": Patch(_ROWS, _OFFSET, f"({_OFFSET}).to(tl.int32).to(tl.int64)", "large"),
    "label not checked": Patch(_ROWS, _LABEL, "inside = label == label", "labels"),
}


def plant(patch: Patch, folder: Path) -> Path:
    """A copy of the package with ``patch``, under ``folder``.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / patch.path).read_text()
    if text.count(patch.old) != 1:
        raise ValueError(f"{patch.path} must hold {patch.old!r} exactly once; it does {text.count(patch.old)} times")
    (copy / patch.path).write_text(text.replace(patch.old, patch.new))
    return copy


def controls(backend: str, seconds: float, device: str = "cuda", names: tuple[str, ...] = tuple(PATCHES)) -> dict:
    """Every patch against the first check of its stage; caught if that fails or the process dies on the device."""
    verdicts = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="caref-control-") as folder:
            plant(PATCHES[name], Path(folder))
            verdicts[name] = _try(PATCHES[name].stage, backend, device, Path(folder), seconds / len(names))
    return {"cases": len(names), "failed": [], "controls": verdicts}


def _try(stage: str, backend: str, device: str, folder: Path, seconds: float) -> str:
    result = folder / "result.json"
    command = [sys.executable, "-m", "caref_kernels.gpucheck", "--worker", stage, "--backend", backend]
    command += ["--device", device, "--result", str(result), "--seconds", str(seconds), "--first-check"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    return _verdict(done, result)


def _verdict(done: subprocess.CompletedProcess, result: Path) -> str:
    if result.is_file():
        status, detail = judge(json.loads(result.read_text()))
        return "caught" if status == "fail" else f"{status}: {detail}"
    if done.returncode < 0 or "illegal memory access" in done.stderr:
        return "caught"
    return f"ended with {done.returncode}: {done.stderr[-300:]}"
