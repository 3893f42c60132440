"""Stages that need no GPU: what the machine and the package are; the build."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import caref_kernels

from .. import backends
from . import sources
from .subject import Unsupported

_PACKAGES = ("triton", "transformers", "peft", "pytest", "hypothesis", "numpy")


def environment(_device: str, _seconds: float) -> dict:
    """Versions, the GPU if there is one, and which backends run where."""
    host: dict = {
        "gpu": None,
        "kernel": platform.release(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in _PACKAGES:
        installed = importlib.util.find_spec(name) is not None
        host[name] = importlib.metadata.version(name) if installed else None
    samples = {"cpu": torch.empty(1, 2)}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        host |= {
            "gpu": properties.name,
            "cc": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
            "gpus": torch.cuda.device_count(),
        }
        samples["cuda"] = torch.empty(1, 2, device="cuda")
    else:
        host["gpu_missing"] = "torch is a build for CPUs" if torch.version.cuda is None else "torch sees no CUDA device"
    host["backends"] = {
        device: {name: backends.get(name).unsupported(sample) or "runs" for name in backends.ORDER}
        for device, sample in samples.items()
    }
    return {"cases": 1, "failed": [], "controls": {}, "host": host}


def package_state(commit: str) -> dict:
    """Version, commit and source hash of what is checked; ``commit`` names that of a tree without its git folder."""
    state: dict = {"version": caref_kernels.__version__, "git": commit or None, "dirty": None, "source_sha256": None}
    if sources.is_checkout():
        state["source_sha256"] = sources.source_hash(kind="gpu")
        try:
            state["git"] = commit or sources.git("rev-parse", "HEAD")
            state["dirty"] = bool(sources.git("status", "--porcelain", "--", ".", *sources.RESULTS))
        except (OSError, subprocess.CalledProcessError):
            pass
    return state


def build(_device: str, seconds: float, capability: str = "") -> dict:
    """The compiled module; in a source tree it is built in place if it is missing or older than its sources."""
    outdated = sources.is_checkout() and _is_outdated()
    if outdated:
        if shutil.which("c++") is None and shutil.which("g++") is None:
            raise Unsupported("no C++ compiler, and no compiled module")
        missing = [name for name in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
        if missing:
            raise Unsupported(f"the compiled module is outdated, and building it needs {', '.join(missing)}")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if capability:  # one architecture takes a quarter of the time of all of them
            command = ["env", f"TORCH_CUDA_ARCH_LIST={capability}", *command]
        done = subprocess.run(command, cwd=sources.ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        if done.returncode:
            return {"cases": 1, "failed": [["build", (done.stdout + done.stderr)[-1500:]]], "controls": {}}
    program = "from caref_kernels import _C; print(*sorted(n for n in vars(_C) if not n.startswith('__')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unsupported(f"no compiled module: {done.stderr.strip().splitlines()[-1]}")
    return {"cases": 1, "failed": [], "controls": {}, "built": outdated, "module": done.stdout.split()}


def _is_outdated() -> bool:
    built = [path.stat().st_mtime for path in (sources.ROOT / "caref_kernels").glob("_C*.so")]
    files = [path for path in (sources.ROOT / "csrc").rglob("*") if path.is_file()]
    return not built or max(built) < max(path.stat().st_mtime for path in files)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def suite(backend: str, seconds: float) -> dict:
    """The conformance suite of the source tree on the GPU, as many processes as the cores allow."""
    tests = sources.ROOT / "tests"
    if not (tests / "conftest.py").is_file():
        raise Unsupported("the tests are not installed with the package")
    missing = [name for name in ("pytest", "xdist", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(f"{', '.join(missing)} not installed")
    processes = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    ignored = [f"--ignore-glob=*/test_{name}*" for name in _NOT_ABOUT_KERNELS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", str(processes)]
    command += [
        "--require",
        backend,
        "-k",
        f"({backend} or test_on_cuda) and not emulated",
        "-rfE",
        *ignored,
        str(tests),
    ]
    done = subprocess.run(command, cwd=sources.ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    return read_pytest(done.returncode, done.stdout)


# Of the harness, the integrations, the tools.
_NOT_ABOUT_KERNELS = (
    "mutants", "gpucheck", "benchmarks", "demo", "smollm2", "private_cache", "data", "repository", "imports", "harness",
    "transformers", "heads", "model_l", "trl", "examples", "count_items", "documents", "build",
)  # fmt: skip


def read_pytest(code: int, output: str) -> dict:
    """What pytest -q -rfE said: passed tests are cases; failed ones, errors and anything odd are failures."""
    lines = output.strip().splitlines()
    words = lines[-1].replace(",", "").replace("=", " ").split() if lines else []
    counts = {word: int(number) for number, word in zip(words, words[1:], strict=False) if number.isdigit()}
    failed = [
        line.split(" ", 1)[1].split(" - ", 1)
        for line in lines
        if line.startswith(("FAILED ", "ERROR ")) and "::" in line
    ]
    failed = [[name, message[0] if message else ""] for name, *message in failed]
    if code != 0 and not failed:
        failed = [["pytest", f"ended with {code}: " + " ".join(lines[-3:])]]
    skipped = counts.get("skipped", 0)
    return {"cases": counts.get("passed", 0), "failed": failed, "controls": {}, "skipped_tests": skipped}


def root_hidden(text: str) -> str:
    """``text`` without the folders of this machine."""
    for path, name in ((sources.ROOT, "."), (Path(sys.prefix), "PREFIX"), (Path.home(), "~")):
        if len(path.parts) > 1:
            text = text.replace(str(path), name)
    return text
