"""The sources that determine the results of a kind of kernels, their hash, and the commit they belong to."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The kernels with their build flags, and the Python between a caller and them.
_EVERYWHERE = ("setup.py", "csrc/*", "caref_kernels/*.py", "caref_kernels/backends/*.py")
KERNEL_SOURCES = {
    "cpu": (*_EVERYWHERE, "csrc/cpu/**/*"),
    "gpu": (*_EVERYWHERE, "csrc/cuda/**/*", "caref_kernels/backends/triton/**/*.py"),
}
# A run rewrites these files itself: they do not make the tree dirty.
RESULTS = (":(exclude)benchmarks/results", ":(exclude)README.md", ":(exclude)docs")


def source_hash(root: Path = ROOT, kind: str = "cpu") -> str:
    """sha256 over the names and contents of the sources of one kind of kernels, in hexadecimal."""
    digest = hashlib.sha256()
    files = {path for pattern in KERNEL_SOURCES[kind] for path in root.glob(pattern) if path.is_file()}
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def git(*arguments: str) -> str:
    """The output of a git command in the source tree.

    Raises:
        OSError, subprocess.CalledProcessError: there is no git, or no checkout.
    """
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.strip()
