"""The stages, in the order of their value: what each needs, how long it may take, and how it runs in its process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..testing import evaluate
from . import compiled_controls, environment, large_checks, run_checks, sanitizer, shape_checks, value_checks
from .subject import Check, Subject
from .subject import run_checks as run_all

# Processes that compile at the same time: more share the memory of the host and the start of the device.
MOST_WARMERS = 14


class Stage(NamedTuple):
    """One stage.

    ``checks`` gives the checks of a subject; ``function`` is a stage that is no list of checks.  ``seconds`` is the
    limit of its process, ``least`` the time below which it is not worth starting.
    """

    name: str
    meaning: str
    seconds: float
    checks: Callable[[Subject], Iterable[Check]] | None = None
    function: Callable[..., dict] | None = None
    per_backend: bool = True  # once for each backend of the GPU, else once, without a GPU
    on_host: bool = False  # for the CPU's compiled backend as well
    only: str = ""  # a backend that it is about
    alone: bool = False  # nothing beside it: it takes the memory or all cores
    least: float = 10.0
    open_ended: bool = False  # takes all the time that is left


def warm(backend: str, seconds: float) -> dict:
    """Compile every kernel of the accuracy stage, in parallel, into Triton's cache on disk."""
    count = max(1, min(MOST_WARMERS, len(os.sched_getaffinity(0)) - 1))
    command = [sys.executable, "-m", "caref_kernels.gpucheck", "--worker", "compile", "--backend", backend]
    running = [
        subprocess.Popen([*command, "--share", f"{index}/{count}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for index in range(count)
    ]
    failed = []
    for index, process in enumerate(running):
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            failed.append([f"process {index}", f"not done after {seconds:.0f} s"])
            continue
        if process.returncode:
            failed.append([f"process {index}", said.decode(errors="replace")[-600:]])
    calls = sum(1 for _ in value_checks.calls(Subject(backend, "cuda")))
    return {"cases": calls, "failed": failed, "controls": {}, "processes": count}


def compile_share(subject: Subject, share: str) -> None:
    """Run every n-th of the calls of the accuracy stage, unchecked; those of one dtype go to different processes."""
    index, count = map(int, share.split("/"))
    for place, call in enumerate(value_checks.calls(subject)):
        if place % count == index:
            logits, labels = call.tensors(subject)
            evaluate(logits, labels, ("loss",), backend=subject.backend, **call.options())
    subject.wait()


STAGES: tuple[Stage, ...] = (
    Stage("env", "versions, GPU, backends", 60, function=environment.environment, per_backend=False),
    Stage("build", "the compiled module", 240, function=environment.build, per_backend=False),
    Stage("warm", "compiles the Triton kernels", 120, function=warm, only="triton", alone=True),
    Stage("smoke", "two calls, all controls", 60, value_checks.smoke, on_host=True),
    Stage("accuracy", "every kernel against float64", 120, value_checks.accuracy, on_host=True),
    Stage("special", "NaN, infinities, ties, shifts", 60, value_checks.special, on_host=True),
    Stage("labels", "ignored rows, labels out of range", 60, value_checks.labels, on_host=True),
    Stage("layouts", "strides and alignments", 60, shape_checks.layouts, on_host=True),
    Stage("autograd", "gradcheck, reductions, mixed precision", 90, shape_checks.autograd, on_host=True),
    Stage("topk", "masks of SCED", 90, value_checks.topk, on_host=True),
    Stage("heads", "linear_caref_loss", 60, shape_checks.heads, on_host=True),
    Stage("graphs", "CUDA graphs", 60, run_checks.graphs),
    Stage("sync", "nothing waits", 60, run_checks.sync),
    Stage("streams", "streams and devices", 60, run_checks.streams),
    Stage("determinism", "the same bits", 60, run_checks.determinism),
    Stage("compile", "torch.compile", 120, run_checks.compiled),
    Stage("opcheck", "schemas and fakes", 90, run_checks.opcheck),
    Stage("controls", "mistakes in compiled kernels", 120, function=compiled_controls.controls, only="triton"),
    Stage("memory", "peak, leaks, out of memory", 60, run_checks.memory),
    Stage("large", "offsets beyond 32 bits", 120, large_checks.large, alone=True),
    Stage("sanitizer", "compute-sanitizer", 180, function=sanitizer.sanitizer, least=60),
    Stage("suite", "the conformance suite on the GPU", 240, function=environment.suite, least=60),
    Stage("fuzz", "random calls", 120, large_checks.fuzz, open_ended=True),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}


def run(stage: Stage, subject: Subject, seconds: float, capability: str = "", first_check: bool = False) -> dict:
    """What the process of a stage finds; ``first_check``: its first check alone, without planting anything."""
    if stage.checks is None:
        if stage.per_backend:
            return stage.function(subject.backend, seconds)
        extra = {} if stage.name == "env" else {"capability": capability}
        return stage.function(subject.device, seconds, **extra)
    checks = stage.checks(subject)
    if first_check:
        checks = [next(iter(checks))._replace(bugs=())]
    return run_all(subject, checks, seconds, stage.open_ended)
