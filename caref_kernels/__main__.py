"""``python -m caref_kernels``: which backends run on this machine, and the versions that a bug report should name."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch

from . import __version__, explain
from .backends.compiled import MISSING, MODULE

PACKAGES = ("triton", "transformers")


def main() -> None:
    """Print ``explain()`` for the CPU and for the CUDA device, if there is one, and the versions."""
    explain()
    if torch.cuda.is_available():
        explain(torch.empty(1, 2, device="cuda"))
    lines = ["versions", *(f"  {name:<14} {value}" for name, value in versions().items())]
    sys.stdout.write("\n".join(lines) + "\n")


def versions() -> dict[str, str]:
    """What is installed, by name; packages that are optional and missing say so."""
    found = {"caref_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: _version(name) for name in PACKAGES} | {"extension": _extension(), "CUDA": _cuda()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    if MODULE is None:
        return MISSING
    built = MODULE.CUDA_ARCHITECTURES
    kernels = f"CUDA kernels for sm_{built.replace(' ', ', sm_')}" if built else "no CUDA kernels"
    return f"compiled, instruction set {MODULE.instruction_set()}, {kernels}"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


if __name__ == "__main__":
    main()
