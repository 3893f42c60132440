"""The parent: one process per stage and backend, in the order of their value, within a budget.

It never touches the GPU: what it knows of one comes from the process of the stage ``env``.  A stage that crashes,
hangs or breaks the device takes nothing with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from .. import backends
from . import environment, report
from .stages import STAGES, Stage

HOST_BACKEND = "cpu"
# Kept back for the report and the end of a process that is over its limit.
_RESERVE = 5.0
# An open-ended stage ends by itself this long before its process would be stopped.
_GRACE = 15.0
# Of these, the others depend on what they find.
_FIRST = ("env", "build")


class Settings(NamedTuple):
    """The command line."""

    stages: tuple[str, ...]
    budget: float
    jobs: int
    device: str = "cuda"
    scale: float = 1.0


class Job(NamedTuple):
    """A stage for one backend, or the reason why it cannot run."""

    stage: Stage
    backend: str
    device: str
    reason: str = ""

    @property
    def name(self) -> str:
        """As in the report."""
        return f"{self.stage.name}/{self.backend}" if self.backend else self.stage.name


class Conductor:
    """Runs jobs and enters what became of them."""

    def __init__(self, settings: Settings, written: report.Report, say: Callable[[str], None]) -> None:
        self._settings, self._report, self._say = settings, written, say
        self._end = time.monotonic() + settings.budget - _RESERVE
        self._lock = Lock()
        self._capability = ""

    def run(self) -> None:
        """Every chosen stage; the environment always, because the others are chosen by it."""
        first, build = (Job(stage, "", self._settings.device) for stage in STAGES[: len(_FIRST)])
        self._run(first)
        self._capability = self._report.content["host"].get("cc", "")
        if self._is_chosen(build.stage):
            self._run(build)
            self._look_again(first)
        jobs = [job for stage in STAGES[len(_FIRST) :] if self._is_chosen(stage) for job in self._jobs(stage)]
        for job in jobs:
            if job.reason:
                self._enter(job, "unsupported", job.reason, 0.0)
        able = [job for job in jobs if not job.reason]
        for group, alone in _groups(able):
            with ThreadPoolExecutor(1 if alone else self._settings.jobs) as pool:
                list(pool.map(self._run, group))

    def _look_again(self, first: Job) -> None:
        """After a build other backends may run."""
        if self._report.content["stages"][-1].get("built"):
            with tempfile.TemporaryDirectory(prefix="caref-gpucheck-") as folder:
                _, _, found = self._start(first, first.stage.seconds, Path(folder, "result.json"))
            self._report.content["host"] |= (found or {}).get("host", {})

    def _is_chosen(self, stage: Stage) -> bool:
        return not self._settings.stages or stage.name in self._settings.stages

    def _jobs(self, stage: Stage) -> list[Job]:
        if not stage.per_backend:
            return [Job(stage, "", "cpu")]
        jobs = [Job(stage, HOST_BACKEND, "cpu", self._reason("cpu", HOST_BACKEND))] if stage.on_host else []
        device = self._settings.device
        if device == "cpu":  # to try the stages out
            return jobs
        names = [name for name in backends.ORDER if name not in (HOST_BACKEND, "reference")]
        names = [name for name in names if stage.only in ("", name)]
        return jobs + [Job(stage, name, device, self._reason(device, name)) for name in names]

    def _reason(self, device: str, backend: str) -> str:
        host = self._report.content["host"]
        if device not in host.get("backends", {}):
            missing = host.get("gpu_missing", "the stage env did not end well")
            return f"no CUDA device: {missing}"
        reason = host["backends"][device][backend]
        return "" if reason == "runs" else reason

    def _run(self, job: Job) -> None:
        left = self._end - time.monotonic()
        if left < job.stage.least:
            self._enter(
                job, "skipped", f"{max(left, 0):.0f} s are left of the budget, it needs {job.stage.least:g}", 0.0
            )
            return
        limit = min(job.stage.seconds, left)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="caref-gpucheck-") as folder:
            result = Path(folder, "result.json")
            status, detail, found = self._start(job, limit, result)
        self._enter(job, status, detail, time.monotonic() - start, found)

    def _start(self, job: Job, limit: float, result: Path) -> tuple[str, str, dict | None]:
        inside = max(limit - _GRACE, limit / 2)
        command = [sys.executable, "-m", "caref_kernels.gpucheck", "--worker", job.stage.name, "--result", str(result)]
        command += ["--backend", job.backend, "--device", job.device, "--seconds", f"{inside:.0f}"]
        command += ["--capability", self._capability, "--scale", str(self._settings.scale)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=limit, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace") if isinstance(error.stderr, bytes) else ""
            return "timeout", f"stopped after {limit:.0f} s {said[-300:]}", None
        return verdict(done.returncode, done.stdout + done.stderr, result)

    def _enter(self, job: Job, status: str, detail: str, seconds: float, found: dict | None = None) -> None:
        with self._lock:
            entry = self._report.add(job.name, status, environment.root_hidden(detail), seconds, _hidden(found))
            self._say(report.line(entry))


def verdict(code: int, output: str, result: Path) -> tuple[str, str, dict | None]:
    """(status, detail, what was found) of a process that has ended: without a result it has crashed."""
    if code != 0 or not result.is_file():
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return "crash", f"{how}: {output.strip()[-report.MOST_CHARACTERS + 40 :]}", None
    found = json.loads(result.read_text())
    return *report.judge(found), found


def _groups(jobs: list[Job]) -> list[tuple[list[Job], bool]]:
    """Consecutive jobs that may run side by side, and each of the others by itself."""
    groups: list[tuple[list[Job], bool]] = []
    for job in jobs:
        if groups and not groups[-1][1] and not job.stage.alone:
            groups[-1][0].append(job)
        else:
            groups.append(([job], job.stage.alone))
    return groups


def _hidden(found: dict | None) -> dict | None:
    return None if found is None else json.loads(environment.root_hidden(json.dumps(found)))
