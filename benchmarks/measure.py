"""`python -m benchmarks.measure SUITE`: time and memory of every implementation on every case, into one JSON file.

Every case is measured in processes of its own, one for each part: a crash costs that case, and the file is whole after
each.  On a CPU the parts have different settings of glibc's allocator, which reads them when a process starts:

- ``time``: the thresholds are out of the way for every implementation alike, so that memory is reused and arithmetic is
  compared with arithmetic.
- ``time-default``: as it is.  A temporary above 32 MiB is mapped and unmapped every time, and its pages are faulted in
  again: eager PyTorch, with about ten such temporaries, spends most of its time on that.
- ``memory``: not timed; freed memory goes back at once, so that the resident set shows what a call needs.

On a GPU one process measures time and memory.  The parent never touches the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import cases, implementations, step
from .implementations import COPY, Implementation
from .isolated import Limits, run
from .provenance import gpu_provenance, provenance
from .results_file import FOLDER, Results
from .sampling import Clock, interleave, times
from .workspaces import HeadWorkspace, LossWorkspace

_RAISED = str(2**30)
ALLOCATORS: dict[str, dict[str, str]] = {
    "time": {"MALLOC_MMAP_THRESHOLD_": _RAISED, "MALLOC_TRIM_THRESHOLD_": _RAISED},
    "time-default": {},
    "memory": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}
# They would change the allocator in spite of the settings above.
ALLOCATOR_VARIABLES = ("LD_PRELOAD", "GLIBC_TUNABLES")
WARM_UP = 2


class Suite(NamedTuple):
    """What ``python -m benchmarks.measure NAME`` measures."""

    file: str  # of the results
    device: str
    cases: tuple
    implementations: tuple[Implementation, ...]
    parts: tuple[str, ...]
    seconds: float  # measured time of a case
    time_limit: float  # seconds of all cases; what is left over is named
    work: Callable[[Job], dict]  # in the worker


class Job(NamedTuple):
    """One part of one case, as a worker measures it."""

    suite: Suite
    case: cases.Case | cases.HeadCase | step.StepCase
    part: str
    device: torch.device
    seconds: float


def measure_case(job: Job) -> dict:
    """Records of every implementation that can run the case, and the reasons of the others."""
    workspace = (HeadWorkspace if isinstance(job.case, cases.HeadCase) else LossWorkspace)(job.case, job.device)
    clock, on_gpu = Clock(job.device), job.device.type == "cuda"
    rows: dict[str, dict] = {}
    typical: dict[str, float] = {}

    def prepare(one: Implementation) -> str | None:
        reason = workspace.missing(one)
        if reason is not None:
            return reason
        calls, row = workspace.calls(one), {"case": job.case.name, "implementation": one.name}
        if job.part == "time":
            row |= workspace.describe(one) | {"errors": workspace.verify(one)}
        if job.part == "memory" or on_gpu:
            row["extra_bytes"] = clock.extra_memory(calls)
        if job.part != "memory":
            typical[one.name] = min(_seconds(lambda: clock.time(calls)) for _ in range(WARM_UP))
        rows[one.name] = row
        return None

    running, absent = runnable(job.suite.implementations, prepare)
    workspace.forget_oracle()
    repeat = {one.name: partial(clock.time, workspace.calls(one)) for one in running if one.name in typical}
    phases = ("forward", "backward", "both", "call") if on_gpu else ("forward", "backward", "both")
    for name, samples in interleave(repeat, typical, job.seconds).items():
        found = times(samples, ("both",) if name == COPY else phases)
        rows[name] |= {"default_allocator": found} if job.part == "time-default" else found
    return {"rows": list(rows.values()), "absent": absent}


def runnable(candidates: tuple, prepare: Callable) -> tuple[list, dict[str, str]]:
    """The candidates for which ``prepare`` returns ``None``, and the reasons of the others."""
    running, absent = [], {}
    for one in candidates:
        try:
            reason = prepare(one)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            reason = "out of memory"
        except AssertionError as error:
            reason = f"does not pass verification: {error}"
        except Exception as error:
            if "CUDA error" in str(error):  # the device is lost for this process
                raise
            reason = f"{type(error).__name__}: {str(error)[:300]}"
        if reason is None:
            running.append(one)
        else:
            absent[one.name] = reason
    return running, absent


def _heads_on_cpu(job: Job) -> dict:
    found = measure_case(job)
    return found | {"absent": found["absent"] | implementations.NOT_ON_CPU}


_CPU = ("time", "time-default", "memory")
SUITES: dict[str, Suite] = {
    "loss": Suite("loss_cpu", "cpu", cases.CASES, implementations.LOSSES, _CPU, 2.0, 400.0, measure_case),
    "linear": Suite(
        "linear_cpu", "cpu", cases.HEAD_CASES, implementations.HEADS, ("time", "memory"), 30.0, 900.0, _heads_on_cpu
    ),
    "sparse": Suite(
        "sparse_cpu", "cpu", cases.SPARSE_CASES, implementations.SPARSE_LOSSES, ("time",), 8.0, 400.0, measure_case
    ),
    "step": Suite("step_cpu", "cpu", step.CPU_CASES, step.LOSSES, ("time", "memory"), 3.0, 90.0, step.work),
    "gpu": Suite("loss_gpu", "cuda", cases.GPU_CASES, implementations.GPU_LOSSES, ("time",), 4.0, 280.0, measure_case),
    "heads-gpu": Suite(
        "heads_gpu", "cuda", cases.HEAD_GPU_CASES, implementations.GPU_HEADS, ("time",), 4.0, 140.0, measure_case
    ),
    "step-gpu": Suite("step_gpu", "cuda", step.GPU_CASES, step.LOSSES, ("time", "memory"), 3.0, 90.0, step.work),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results file after every case, so that a run that is cut off leaves what it has."""
    options = _parser().parse_args(arguments)
    suite = SUITES[options.suite]
    torch.set_num_threads(options.threads)
    try:
        chosen = cases.by_name(options.cases, suite.cases)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if options.rows:
        size = "batch" if suite.work is step.work else "rows"
        chosen = tuple(dataclasses.replace(case, **{size: options.rows}) for case in chosen)
    device = torch.device(options.device or suite.device)
    seconds = suite.seconds if options.seconds is None else options.seconds
    if options.worker:
        job = Job(suite, chosen[0], options.worker, device, seconds)
        found = suite.work(job)
        origin = gpu_provenance(device) if suite.device == "cuda" else provenance()
        made = {"provenance": origin, "cases": {job.case.name: job.case.title}}
        options.part.write_text(json.dumps(found | made | {"absent": {job.case.name: found["absent"]}}))
        return
    # Counted by the driver's library, without a context: the parent stays off the device.
    if device.type == "cuda" and torch.cuda.device_count() == 0:
        raise SystemExit("no CUDA device; nothing was measured")
    results = Results(datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    _run(suite, chosen, options, results)
    if not results.rows:
        raise SystemExit(f"nothing was measured: {results.left_out}")


def _run(suite: Suite, chosen: tuple, options: argparse.Namespace, results: Results) -> None:
    output = options.output or FOLDER / f"{suite.file}.json"
    passed = ["--threads", str(options.threads), "--rows", str(options.rows)]
    for name in ("device", "seconds"):
        if getattr(options, name) is not None:
            passed += [f"--{name}", str(getattr(options, name))]
    on_cpu = (options.device or suite.device) == "cpu"
    limits = Limits(options.time_limit or suite.time_limit, 400.0 if on_cpu else 150.0)
    for case in chosen:
        for part in suite.parts:
            command = [options.suite, "--worker", part, "--cases", case.name, *passed]
            environment = worker_environment(part, dict(os.environ)) if on_cpu else None
            found, reason = run("benchmarks.measure", command, limits, environment)
            if found is None:
                results.left_out[f"{case.name}/{part}"] = str(reason)
                sys.stderr.write(f"{case.name}/{part}: {reason}\n")
                if part == "time":
                    break
                continue
            failed = found["absent"][case.name] if part != "time" else {}
            failed = {name: why for name, why in failed.items() if name not in results.absent[case.name]}
            results.left_out |= {f"{case.name}/{part}/{name}": why for name, why in failed.items()}
            results.add(found | ({} if part == "time" else {"absent": {}}))
            results.write(output)
        sys.stdout.write(terminal_table(results, case) + "\n")
        sys.stdout.flush()
    results.write(output)
    sys.stderr.write(f"wrote {output}\n")


def worker_environment(part: str, inherited: dict[str, str]) -> dict[str, str]:
    """The environment of a worker: the inherited one with no allocator settings but those of its part."""
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith("MALLOC_") and name not in ALLOCATOR_VARIABLES
    }
    return kept | ALLOCATORS[part]


def terminal_table(results: Results, case) -> str:
    """One case for a terminal: median milliseconds of every phase, extra or peak memory."""
    lines = [case.title]
    for name, row in results.of(case.name).items():
        cells = [f"{key.removesuffix('_ms')} {value[1]:.4g} ms" for key, value in row.items() if key.endswith("_ms")]
        cells += [f"{row[key] / 2**20:.0f} MiB" for key in ("extra_bytes", "peak_bytes") if row.get(key) is not None]
        lines.append(f"  {name:<18} {', '.join(cells)}")
    absent = results.absent.get(case.name, {}).items()
    return "\n".join([*lines, *(f"  {name:<18} {reason}" for name, reason in absent)])


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=tuple(SUITES), help="what to measure")
    parser.add_argument("--cases", nargs="*", default=[], metavar="NAME", help="all of them by default")
    parser.add_argument("--seconds", type=float, help="measured time per case and part")
    parser.add_argument("--time-limit", type=float, help="seconds for all cases; what is left over is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu tries the suites for a GPU out")
    parser.add_argument("--rows", type=int, default=0, help="rows of every case, to try a command out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and the kernels")
    parser.add_argument("--output", type=Path, help="the results file")
    parser.add_argument("--worker", choices=tuple(ALLOCATORS), help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
