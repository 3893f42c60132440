"""`python -m benchmarks.measure`: every case and provider in two regimes of the allocator, into one JSON file.

Each regime is a process of its own, because glibc reads its thresholds when a process starts.

- ``glibc``: as it is.  A temporary above 32 MiB is mapped and unmapped every time, and its pages are faulted in again:
  eager PyTorch, with about ten such temporaries, spends most of its time on that.
- ``raised``: the threshold is out of the way for every provider, so that memory is reused and arithmetic is compared
  with arithmetic.
- ``memory``: not timed; freed memory goes back at once, so that the resident set shows what a call needs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import sampling
from .cases import CASES, Case, by_name
from .provenance import ROOT, provenance
from .providers import PROVIDERS, Provider, expectation, verify

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results" / "loss_cpu.json"

_RAISED = str(2**30)
REGIMES: dict[str, dict[str, str]] = {
    "glibc": {},
    "raised": {"MALLOC_MMAP_THRESHOLD_": _RAISED, "MALLOC_TRIM_THRESHOLD_": _RAISED},
    "memory": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}
TIMED_REGIMES = ("glibc", "raised")
# Would change the allocator behind the regime's back.
ALLOCATOR_VARIABLES = ("LD_PRELOAD", "GLIBC_TUNABLES")
UNIT = "copy"


@dataclass(frozen=True)
class Row:
    """One line of the results: one provider on one case, in one regime and phase; milliseconds are percentiles.

    Raises:
        ValueError: machine or commit is empty, so that nobody could say what was measured where.
    """

    machine: str
    commit: str
    case: str
    provider: str
    regime: str
    phase: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    gigabytes_per_second: float
    copies: float  # the median in units of the median copy of the same run
    page_faults: int

    def __post_init__(self) -> None:
        for name in ("machine", "commit"):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} must not be empty in a row of results; got {getattr(self, name)!r} "
                    f"for {self.provider} on {self.case}"
                )


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results file."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.worker:
        json.dump(_work(options), options.output.open("w"))
        return
    made = provenance()
    errors = verified(by_name(options.cases))
    results: dict = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "provenance": made,
        "cases": {case.name: case.title for case in by_name(options.cases)},
        "errors": errors,
        "rows": [],
    }
    for regime in REGIMES:
        sys.stderr.write(f"regime {regime}: {REGIMES[regime] or 'environment as it is'}\n")
        part = _run_worker(regime, options)
        if regime == "memory":
            results["extra_bytes"] = part["extra_bytes"]
        else:
            results["rows"] += [
                asdict(Row(**row, machine=made["machine"], commit=made["commit"])) for row in part["rows"]
            ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    sys.stderr.write(f"wrote {options.output}\n")


def worker_environment(regime: str, inherited: dict[str, str]) -> dict[str, str]:
    """The environment of a regime's process: the inherited one with no allocator settings but the regime's."""
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith("MALLOC_") and name not in ALLOCATOR_VARIABLES
    }
    return kept | REGIMES[regime]


def rows_of_case(case: Case, regime: str, samples: dict[str, list[sampling.Sample]]) -> list[dict]:
    """The fields of :class:`Row`, machine and commit excepted, for every provider and phase of one case.

    Raises:
        ValueError: the copy, the unit of all ratios, was not measured in the same run.
    """
    if UNIT not in samples:
        raise ValueError(f"samples must hold the provider {UNIT!r}, the unit of every ratio; got {', '.join(samples)}")
    unit = sampling.percentiles([sample.both for sample in samples[UNIT]])[1]
    rows = []
    for provider, measured in samples.items():
        faults = sorted(sample.faults for sample in measured)[len(measured) // 2]
        for phase in ("both",) if provider == UNIT else sampling.PHASES:
            low, middle, high = sampling.percentiles([getattr(sample, phase) for sample in measured])
            moved = sampling.useful_bytes(case, "copy" if provider == UNIT else phase)
            rows.append(
                {
                    "case": case.name,
                    "provider": provider,
                    "regime": regime,
                    "phase": phase,
                    "p20_ms": _rounded(1e3 * low),
                    "p50_ms": _rounded(1e3 * middle),
                    "p80_ms": _rounded(1e3 * high),
                    "samples": len(measured),
                    "gigabytes_per_second": _rounded(moved / middle / 1e9),
                    "copies": _rounded(middle / unit),
                    "page_faults": faults,
                }
            )
    return rows


def _work(options: argparse.Namespace) -> dict:
    """What one process measures: memory, or errors and times."""
    cases = by_name(options.cases)
    if options.worker == "memory":
        return {"extra_bytes": {case.name: memory_of_case(case, PROVIDERS) for case in cases}}
    rows = []
    for case in cases:
        workspace = sampling.Workspace(case)
        samples = sampling.interleave(workspace, PROVIDERS, options.seconds)
        rows += rows_of_case(case, options.worker, samples)
        sys.stderr.write(f"  {case.title}\n")
    return {"rows": rows}


def verified(cases: tuple[Case, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Errors by case and provider; nothing is timed that has not passed here.

    Raises:
        AssertionError: a provider misses its budget.
    """
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        logits, labels = case.tensors()
        expected = expectation(logits, labels)
        losses = [provider for provider in PROVIDERS if provider.loss is not None]
        errors[case.name] = {one.name: verify(one, logits, labels, expected)._asdict() for one in losses}
        sys.stderr.write(f"verified: {case.title}\n")
    return errors


def memory_of_case(case: Case, providers: tuple[Provider, ...]) -> dict[str, int]:
    """Extra bytes of forward and backward of each provider; see :func:`sampling.extra_memory`."""
    workspace = sampling.Workspace(case)
    return {provider.name: sampling.extra_memory(workspace, provider) for provider in providers}


def run_memory_worker(names: list[str], threads: int) -> dict[str, dict[str, int]]:
    """Extra bytes by case and provider, measured in a process of the "memory" regime."""
    options = _parser().parse_args(["--threads", str(threads), "--cases", *names])
    return _run_worker("memory", options)["extra_bytes"]


def _run_worker(regime: str, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.measure", "--worker", regime, "--output", str(output)]
        command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
        command += ["--cases", *options.cases]
        environment = worker_environment(regime, dict(os.environ))
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL)
        return json.loads(output.read_text())


def _rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=[], metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--seconds", type=float, default=2.0, help="measured time per case and regime")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch and of the kernels"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--worker", choices=tuple(REGIMES), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
