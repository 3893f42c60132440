"""Handing the list of runs to an engine that somebody else keeps: nothing here schedules anything.

A SLURM array needs no engine: every task runs ``run ... --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .results import Job
from .settings import Settings


class Shard(NamedTuple):
    """The ``index``-th of ``count`` equal parts of a list of runs, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"``.

        Raises:
            ValueError: not two whole numbers with 0 <= index < count.
        """
        first, slash, second = text.partition("/")
        if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
            return cls(int(first), int(second))
        raise ValueError(f"shard must be index/count with 0 <= index < count; got {text!r}")

    def of(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of this part; the parts are disjoint and hold every job."""
        return list(jobs[self.index :: self.count])


def run_on_ray(settings: Settings, jobs: Sequence[Job], folder: Path, workers: int, gpus: float) -> list[str]:
    """Give ``workers`` Ray tasks a shard each; what each of them reports.

    Args:
        folder: the results folder, at the same path on every machine of the cluster.
        gpus: of each task, a fraction to share one.
    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ModuleNotFoundError("ray is not installed; run: pip install 'caref_kernels[ray]'") from None

    if not ray.is_initialized():
        ray.init()  # joins the cluster that RAY_ADDRESS names, or starts one on this machine
    task = ray.remote(num_gpus=gpus, max_retries=3)(_run_shard)
    shards = [Shard(index, workers).of(jobs) for index in range(workers)]
    return ray.get([task.remote(settings, shard, str(folder)) for shard in shards])


def _run_shard(settings: Settings, jobs: list[Job], folder: str) -> str:
    from .results import Results
    from .runs import Watch, run_jobs

    tally = run_jobs(settings, jobs, Results(folder), Watch())
    return f"{len(tally.finished)} finished, {len(tally.found)} found, {len(tally.failed)} failed"
