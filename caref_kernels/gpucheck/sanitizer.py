"""compute-sanitizer over a small driver: trusted only where it finds a planted mistake."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import sources
from .subject import Subject, Unsupported, fenced_evaluation

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERRORS = 99
# Of float32, more than the shared memory of any multiprocessor.
_WIDEST = 66_001
# One thread writes an element past the end of an allocation.
_PLANTED = """
__global__ void beyond(int* memory) { memory[64 + threadIdx.x] = 1; }
int main() {
  int* memory = nullptr;
  if (cudaMalloc(&memory, 64 * sizeof(int)) != cudaSuccess) return 1;
  beyond<<<1, 1>>>(memory);
  return cudaDeviceSynchronize() != cudaSuccess;
}
"""
# The sanitizer sees every allocation for itself.
_ENVIRONMENT = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_PLACE = re.compile(r"^=+\s+at (\S+?)[(+]", re.MULTILINE)


def sanitizer(backend: str, seconds: float) -> dict:
    """Each tool over :func:`drive` in a process of its own."""
    program = _program()
    _require_working(program)
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        results = dict(zip(TOOLS, pool.map(lambda tool: _run(program, tool, backend, seconds), TOOLS), strict=True))
    failed = [[tool, message] for tool, (_, message) in results.items() if message]
    found = {tool: errors for tool, (errors, _) in results.items()}
    return {"cases": len(TOOLS), "failed": failed, "controls": {"planted write": "caught"}, "errors": found}


def _run(program: str, tool: str, backend: str, seconds: float) -> tuple[int | None, str]:
    command = ["env", *_ENVIRONMENT, program, "--tool", tool, "--error-exitcode", str(ERRORS)]
    command += [sys.executable, "-m", "caref_kernels.gpucheck", "--worker", "drive", "--backend", backend]
    try:
        done = subprocess.run(command, cwd=sources.ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"not done after {seconds:.0f} s"
    return read(done.returncode, done.stdout + done.stderr)


def read(code: int, output: str) -> tuple[int | None, str]:
    """(errors that the tool counted, what is wrong or "") of one run; a run without a summary has shown nothing."""
    summaries = [int(first or second) for first, second in _SUMMARY.findall(output)]
    if not summaries:
        return None, f"no summary, exit status {code}: {output.strip()[-600:]}"
    places = sorted(set(_PLACE.findall(output)))
    if summaries[-1] or code:
        return summaries[-1], f"{summaries[-1]} errors, exit status {code}, at {', '.join(places)}: {output[:600]}"
    return 0, ""


def _program() -> str:
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        raise Unsupported("compute-sanitizer is not installed")
    return found


def _require_working(program: str) -> None:
    """Raise Unsupported with the tool's own words unless it reports the planted write."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise Unsupported("no nvcc to compile the planted mistake with")
    with tempfile.TemporaryDirectory(prefix="caref-sanitizer-") as folder:
        source, binary = Path(folder, "planted.cu"), Path(folder, "planted")
        source.write_text(_PLANTED)
        subprocess.run([nvcc, "-arch=native", "-o", str(binary), str(source)], check=True, capture_output=True)
        command = [program, "--tool", "memcheck", "--error-exitcode", str(ERRORS), str(binary)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    if done.returncode != ERRORS or "Invalid __global__ write" not in said:
        raise Unsupported(f"a planted write past the end was not reported: {said.strip()[-400:]}")


def drive(subject: Subject) -> None:
    """All code paths on small rows: tails, one pass and two, masks, shared rows, labels that are no column.

    The widest row is one whose mask the CUDA kernels select without the row in shared memory.
    """
    import torch

    from .. import EntropyTopK, TopK

    masks = ({"sparsity": EntropyTopK()}, {"sparsity": TopK(5)})
    options = ({}, {"alpha": 1.5, "beta": 0.5}, *masks)
    calls = [(rows, columns, one) for columns in (33, 1025, 4097) for rows in (3, 200) for one in options]
    calls += [(3, _WIDEST, one) for one in masks]
    for rows, columns, one in calls[:: max(1, round(1 / subject.scale))]:
        for dtype in (torch.float32, torch.bfloat16):
            logits, labels = subject.case("normal_1", rows, columns, dtype)
            labels[1] = columns
            fenced_evaluation(subject, logits, labels, ("loss",), **one)
    subject.wait()
