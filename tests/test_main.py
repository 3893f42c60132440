"""``python -m caref_kernels``: the backends, and the versions that a bug report should name."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import caref_kernels
from caref_kernels import __main__ as command

ROOT = Path(__file__).resolve().parents[1]


def test_the_command_prints_backends_and_versions() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "caref_kernels"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert caref_kernels.explain() + "\n" in done.stdout
    table = done.stdout[done.stdout.index("\nversions\n") :].splitlines()[2:]
    found = dict(line.split(maxsplit=1) for line in table)
    assert found["caref_kernels"] == caref_kernels.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert set(found) == {"caref_kernels", "python", "torch", "triton", "transformers", "extension", "CUDA"}


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MODULE", None)
    monkeypatch.setattr(command, "MISSING", "built without a compiler")
    monkeypatch.setattr(command, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = command.versions()
    assert found["extension"] == "built without a compiler"
    assert found["no-such-package"] == "not installed"
    assert found["CUDA"] == "13.0, no device"


def test_the_extension_says_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        CUDA_ARCHITECTURES = "80 90"
        instruction_set = staticmethod(lambda: "baseline")

    monkeypatch.setattr(command, "MODULE", Module)
    assert command.versions()["extension"] == "compiled, instruction set baseline, CUDA kernels for sm_80, sm_90"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert command.versions()["CUDA"] == "torch is built without CUDA"
