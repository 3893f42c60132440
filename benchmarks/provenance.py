"""Where and of what a result was measured: machine, versions, commit, and the hash of the kernel sources."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import torch

import caref_kernels
from caref_kernels import backends

from . import peers
from .sources import RESULTS, git, source_hash


def provenance() -> dict:
    """Machine, versions and sources of a run of the CPU kernels in this process.

    ``CAREF_KERNELS_COMMIT`` names the commit of a tree without its git folder.

    Raises:
        ValueError: neither a git checkout nor that variable, so the figures could not be traced to a commit.
    """
    fused = backends.get("cpu")
    missing = fused.unsupported(torch.empty(1, 2))
    return {
        "machine": cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_backend": missing or fused.describe(),
        **_versions(),
        "source_sha256": source_hash(),
    }


def gpu_provenance(device: torch.device) -> dict:
    """The same for a run of the GPU kernels on ``device``, which may be a CPU that stands for a GPU."""
    made: dict = {"machine": cpu_model(Path("/proc/cpuinfo"))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        made = {
            "machine": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda or "none",
        }
    installed = importlib.util.find_spec("triton") is not None
    triton = importlib.metadata.version("triton") if installed else "not installed"
    return {
        **made,
        "triton": triton,
        "peers": peers.versions(),
        **_versions(),
        "source_sha256": source_hash(kind="gpu"),
    }


def _versions() -> dict[str, str | bool]:
    return {
        "os": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "caref_kernels": caref_kernels.__version__,
        **_commit(),
    }


def _commit() -> dict[str, str | bool]:
    named = os.environ.get("CAREF_KERNELS_COMMIT")
    if named:
        return {"commit": named, "dirty": False}
    return {
        "commit": _checked_git("rev-parse", "HEAD"),
        "dirty": bool(_checked_git("status", "--porcelain", "--", ".", *RESULTS)),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def cpu_model(cpuinfo: Path) -> str:
    """The processor's name from a file in the format of /proc/cpuinfo; without one, what Python knows."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({'-'.join(family)})" if family else name


def _checked_git(*arguments: str) -> str:
    try:
        return git(*arguments)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"a benchmark needs the git checkout it measures, but git {' '.join(arguments)} failed: {error}"
        ) from error
