"""`python -m benchmarks.measure_linear`: time and memory of heads, in two regimes of benchmarks/measure.py.

A repetition is a forward and a backward pass; contestants are interleaved.  ``memory`` is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .linear_cases import CASES, MISSING, PROVIDERS, HeadCase, HeadWorkspace, by_name, verify
from .measure import REGIMES, worker_environment
from .provenance import ROOT, provenance
from .sampling import percentiles, resident_bytes

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results" / "linear_cpu.json"
TIMED = "raised"
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class HeadRow:
    """One line of the results: seconds of forward and backward together are percentiles.

    Raises:
        ValueError: machine or commit is empty, so that nobody could say what was measured where.
    """

    machine: str
    commit: str
    case: str
    provider: str
    p20_s: float
    p50_s: float
    p80_s: float
    samples: int
    extra_bytes: int  # peak of the resident set during forward and backward, above the tensors that are given

    def __post_init__(self) -> None:
        for name in ("machine", "commit"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty in a row of results; got {getattr(self, name)!r}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results file."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = by_name(options.cases)
    if options.worker:
        work = _memory if options.worker == "memory" else _times
        json.dump({case.name: work(case, options.seconds) for case in cases}, options.output.open("w"))
        return
    made = provenance()
    errors = {}
    for case in cases:
        errors[case.name] = verify(case)
        sys.stderr.write(f"verified: {case.title}\n")
    parts = {regime: _run_worker(regime, options) for regime in (TIMED, "memory")}
    rows = [
        HeadRow(made["machine"], made["commit"], case.name, provider, *times, parts["memory"][case.name][provider])
        for case in cases
        for provider, times in parts[TIMED][case.name].items()
    ]
    results = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "provenance": made,
        "cases": {case.name: case.title for case in cases},
        "logits_bytes": {case.name: case.logits_bytes for case in cases},
        "errors": errors,
        "rows": [asdict(row) for row in rows],
        "missing": [{"peer": peer, "reason": reason} for peer, reason in MISSING],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    sys.stderr.write(f"wrote {options.output}\n")


def _times(case: HeadCase, seconds: float) -> dict[str, list[float]]:
    """p20, p50, p80 and the number of samples of every provider, interleaved in random order."""
    workspace = HeadWorkspace(case)
    typical = {provider.name: _repeat(workspace, provider) for provider in PROVIDERS}
    rounds = max(LEAST_ROUNDS, int(seconds / sum(typical.values())))
    samples: dict[str, list[float]] = {provider.name: [] for provider in PROVIDERS}
    order, chance = list(PROVIDERS), random.Random(0)
    gc.collect()
    for _ in range(rounds):
        chance.shuffle(order)
        for provider in order:
            samples[provider.name].append(_repeat(workspace, provider))
    sys.stderr.write(f"  {case.title}: {rounds} rounds\n")
    return {name: [*(float(f"{value:.4g}") for value in percentiles(own)), len(own)] for name, own in samples.items()}


def _repeat(workspace: HeadWorkspace, provider) -> float:
    start = time.perf_counter()
    gradients = workspace.backward(workspace.forward(provider))
    end = time.perf_counter()
    del gradients
    return end - start


def _memory(case: HeadCase, _seconds: float) -> dict[str, int]:
    """Extra bytes of every provider; see :func:`benchmarks.sampling.extra_memory`."""
    workspace = HeadWorkspace(case)
    found = {}
    _repeat(workspace, PROVIDERS[0])  # whatever is made once
    for provider in PROVIDERS:
        gc.collect()
        before = resident_bytes(reset_peak=True)
        result = workspace.forward(provider)
        gradients = workspace.backward(result)
        found[provider.name] = max(0, resident_bytes(peak=True) - before)
        del result, gradients
    return found


def _run_worker(regime: str, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.measure_linear", "--worker", regime, "--output", str(output)]
        command += ["--seconds", str(options.seconds), "--threads", str(options.threads), "--cases", *options.cases]
        environment = worker_environment(regime, dict(os.environ))
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL)
        return json.loads(output.read_text())


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure_linear", description=description)
    parser.add_argument("--cases", nargs="*", default=[], metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--seconds", type=float, default=30.0, help="measured time per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and the kernels")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--worker", choices=tuple(REGIMES), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
