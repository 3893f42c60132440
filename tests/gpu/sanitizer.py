"""compute-sanitizer: its command, its output, and the calls that it watches (``python -m gpu.sanitizer BACKEND``)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from caref_kernels import EntropyTopK, TopK
from caref_kernels.testing import evaluate

from .guard_zones import GuardZones
from .target import Target

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERRORS = 99  # the exit code for errors that were found
# In float32, more than the shared memory of any multiprocessor: the CUDA kernels select its top k from global memory.
_WIDEST = 66_001
# One thread writes an element past the end of an allocation.
_FAULT = """
__global__ void beyond(int* memory) { memory[64 + threadIdx.x] = 1; }
int main() {
  int* memory = nullptr;
  if (cudaMalloc(&memory, 64 * sizeof(int)) != cudaSuccess) return 1;
  beyond<<<1, 1>>>(memory);
  return cudaDeviceSynchronize() != cudaSuccess;
}
"""
# Without torch's cache the sanitizer sees every allocation.
_ENVIRONMENT = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_PLACE = re.compile(r"^=+\s+at (\S+?)[(+]", re.MULTILINE)


def run(tool: str, *program: str, **options) -> tuple[int, str]:
    """(exit code, output) of ``program`` under ``tool``."""
    path = f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}"
    command = ["env", path, *_ENVIRONMENT, find("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(ERRORS)]
    done = subprocess.run([*command, *program], capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout + done.stderr


def errors(code: int, output: str) -> str:
    """The errors that the tool reports, or ""; a run without a summary is an error too."""
    summaries = [int(first or second) for first, second in _SUMMARY.findall(output)]
    if not summaries:
        return f"no summary, exit status {code}: {output.strip()[-600:]}"
    if summaries[-1] or code:
        places = ", ".join(sorted(set(_PLACE.findall(output))))
        return f"{summaries[-1]} errors, exit status {code}, at {places}: {output[:600]}"
    return ""


def find(program: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    return shutil.which(program) or shutil.which(f"/usr/local/cuda/bin/{program}")


def unusable(folder: Path) -> str | None:
    """Why the sanitizer proves nothing here, or ``None``: it must report an injected fault."""
    for program in ("compute-sanitizer", "nvcc"):
        if find(program) is None:
            return f"{program} is not installed"
    source, binary = folder / "fault.cu", folder / "fault"
    source.write_text(_FAULT)
    subprocess.run([find("nvcc"), "-arch=native", "-o", str(binary), str(source)], check=True, capture_output=True)
    code, output = run("memcheck", str(binary), timeout=60)
    if code != ERRORS or "Invalid __global__ write" not in output:
        return f"a write past the end was not reported: {output.strip()[-400:]}"
    return None


def calls(target: Target) -> None:
    """All variants of the kernels on a few rows: tails, one pass and two, top-k masks, shared rows, bad labels."""
    masks = ({"sparsity": EntropyTopK()}, {"sparsity": TopK(5)})
    options = ({}, {"alpha": 1.5, "beta": 0.5}, *masks)
    made = [(rows, columns, one) for columns in (33, 1025, 4097) for rows in (3, 200) for one in options]
    made += [(3, _WIDEST, one) for one in masks]
    zones = GuardZones()
    for rows, columns, one in made[:: 5 if target.small else 1]:
        for dtype in (torch.float32, torch.bfloat16):
            logits, labels = target.case("normal_1", rows, columns, dtype)
            labels[1] = columns
            guarded = zones.constant(logits), zones.constant(labels)
            with zones.watch():
                evaluate(*guarded, ("loss",), backend=target.backend, **one)


if __name__ == "__main__":
    calls(Target(sys.argv[1], sys.argv[1], "cuda"))
    torch.cuda.synchronize()
