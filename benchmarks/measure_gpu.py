"""`python -m benchmarks.measure_gpu`: every GPU case and provider on one device, into one JSON file.

A repetition is timed by events on the stream, behind a pause that is long enough for the host to queue all of it: what
counts is the device's time, without the host's.  Before each, the second-level cache is filled with something else and
the logits are restored.  "call" is the wall clock of a forward and backward pass with the host's part, nothing queued
before it.  Contestants are interleaved in random order, and memory is the peak above what was allocated before.  Each
case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .cases import GPU_CASES, Case, by_name
from .gpu_clock import Clock, GpuSample
from .isolated import run_cases, write
from .measure import UNIT
from .provenance import ROOT, gpu_provenance
from .providers import GPU_PROVIDERS, Provider, expectation, verify
from .sampling import Workspace, percentiles, useful_bytes

SCHEMA = 2
RESULTS = ROOT / "benchmarks" / "results" / "loss_gpu.json"
PHASES = ("forward", "backward", "both", "call")
WARM_UP = 3
# The oracle holds about ten float64 copies of what it looks at.
VERIFIED_ROWS = 32
# Seconds of one case: a dozen compilations and the measurement.
CASE_LIMIT = 120.0


@dataclass(frozen=True)
class GpuRow:
    """One line of the results: one provider on one case in one phase; milliseconds are percentiles.

    Raises:
        ValueError: machine or commit is empty, so that nobody could say what was measured where.
    """

    machine: str
    commit: str
    case: str
    provider: str
    phase: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    gigabytes_per_second: float
    percent_of_copy: float  # of the bandwidth of the copy in the same run

    def __post_init__(self) -> None:
        for name in ("machine", "commit"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty in a row of results; got {getattr(self, name)!r}")


class Bench:
    """The tensors of one case on one device, and the clock."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.workspace = Workspace(case, device)
        self.clock = Clock(device)

    def repeat(self, provider: Provider) -> GpuSample:
        """Seconds of ``provider``."""
        return self.clock.repeat(*self._parts(provider))

    def extra_memory(self, provider: Provider) -> int | None:
        """Bytes by which allocated memory peaks during a forward and backward pass."""
        return self.clock.extra_memory(*self._parts(provider))

    def _parts(self, provider: Provider) -> tuple[Callable, Callable, Callable]:
        work = self.workspace
        return (
            work.refresh,
            lambda logits: work.forward(provider, logits),
            lambda logits, result: work.backward(provider, logits, result),
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results file after every case, so that a run that is cut off leaves what it has."""
    options = parser("benchmarks.measure_gpu", __doc__, RESULTS, GPU_CASES).parse_args(arguments)
    if options.worker:
        (case,) = by_name([options.worker], GPU_CASES)
        if options.rows:
            case = dataclasses.replace(case, rows=options.rows)
        measured = measure_case(case, torch.device(options.device), options.seconds)
        measured["title"] = case.title
        options.part.write_text(json.dumps(measured))
        return
    results = new_results(options.device)

    def done(name: str, measured: dict) -> None:
        made = results["provenance"] = results["provenance"] or measured["provenance"]
        results["cases"][name] = measured["title"]
        for part in ("absent", "errors", "extra_bytes"):
            results[part][name] = measured[part]
        results["rows"] += [asdict(GpuRow(made["machine"], made["commit"], **row)) for row in measured["rows"]]
        write(options.output, results)
        sys.stdout.write(table(measured["title"], measured) + "\n")
        sys.stdout.flush()

    finish("benchmarks.measure_gpu", [case.name for case in by_name(options.cases, GPU_CASES)], options, results, done)


def new_results(device: str) -> dict:
    """Results without a case.

    Raises:
        SystemExit: there is no CUDA device to measure.
    """
    if device == "cuda" and not _has_gpu():
        raise SystemExit("no CUDA device; nothing was measured")
    empty: dict = {name: {} for name in ("provenance", "cases", "left_out", "absent", "errors", "extra_bytes")}
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **empty,
        "rows": [],
    }


def finish(
    module: str, names: list[str], options: argparse.Namespace, results: dict, done: Callable[[str, dict], None]
) -> None:
    """Run every case in its process, then enter the ones without a result.

    Raises:
        SystemExit: no case has one.
    """
    extra = ["--device", options.device, "--seconds", str(options.seconds), "--rows", str(options.rows)]
    results["left_out"] = run_cases(module, names, extra, options.budget, CASE_LIMIT, done)
    for name, reason in results["left_out"].items():
        sys.stderr.write(f"{name}: {reason}\n")
    if not results["rows"]:
        raise SystemExit("no case was measured")
    write(options.output, results)
    sys.stderr.write(f"wrote {options.output}\n")


def _has_gpu() -> bool:
    """Counted by the driver's library, without a context: the parent stays off the device."""
    return torch.cuda.device_count() > 0


def measure_case(case: Case, device: torch.device, seconds: float) -> dict:
    """Rows, errors and memory of every provider that can run ``case``; ``absent`` has the reasons of the others."""
    bench = Bench(case, device)
    few = slice(0, min(VERIFIED_ROWS, case.rows))
    inputs = bench.workspace.values[few], bench.workspace.labels[few]
    expected = expectation(*inputs)
    errors: dict[str, dict[str, float]] = {}
    extra: dict[str, int | None] = {}

    def prepare(provider: Provider) -> str | None:
        reason = provider.missing(bench.workspace.values)
        if reason is not None:
            return reason
        if provider.loss is not None:
            errors[provider.name] = verify(provider, *inputs, expected)._asdict()
        for _ in range(WARM_UP):
            bench.repeat(provider)
        extra[provider.name] = bench.extra_memory(provider)
        return None

    running, absent = contestants(GPU_PROVIDERS, prepare)
    samples = interleaved(running, bench.repeat, seconds)
    measured = {"rows": rows_of(case, samples), "errors": errors, "absent": absent, "extra_bytes": extra}
    return measured | {"provenance": gpu_provenance(device)}


def contestants(providers, prepare: Callable) -> tuple[list, dict[str, str]]:
    """Those for which ``prepare`` returns ``None``, and why the others are absent: missing, out of memory, wrong."""
    running, absent = [], {}
    for provider in providers:
        try:
            reason = prepare(provider)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            reason = "out of memory"
        except AssertionError as error:
            reason = f"does not pass verification: {error}"
        except Exception as error:  # noqa: BLE001
            if "CUDA error" in str(error):  # the device is lost for this process
                raise
            reason = f"{type(error).__name__}: {str(error)[:300]}"
        if reason is None:
            running.append(provider)
        else:
            absent[provider.name] = reason
    return running, absent


def interleaved(running: list, repeat: Callable, seconds: float) -> dict[str, list[GpuSample]]:
    """Samples by name: whole rounds in random order for ``seconds``, at least three."""
    samples: dict[str, list[GpuSample]] = {provider.name: [] for provider in running}
    order, end, rounds = random.Random(0), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < 3:
        order.shuffle(running)
        for provider in running:
            samples[provider.name].append(repeat(provider))
        rounds += 1
    return samples


def rows_of(case: Case, samples: dict[str, list[GpuSample]]) -> list[dict]:
    """The fields of :class:`GpuRow`, machine and commit excepted."""
    copy = useful_bytes(case, "copy") / percentiles([sample.both for sample in samples[UNIT]])[1]
    rows = []
    for provider, measured in samples.items():
        for phase in ("both",) if provider == UNIT else PHASES:
            low, middle, high = percentiles([getattr(sample, phase) for sample in measured])
            moved = useful_bytes(case, "copy" if provider == UNIT else "both" if phase == "call" else phase)
            fields = (1e3 * low, 1e3 * middle, 1e3 * high, len(measured), moved / middle / 1e9)
            rows.append(
                {"case": case.name, "provider": provider, "phase": phase}
                | dict(zip(("p20_ms", "p50_ms", "p80_ms", "samples", "gigabytes_per_second"), fields, strict=True))
                | {"percent_of_copy": 100 * moved / middle / copy}
            )
    return [{key: rounded(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def table(title: str, measured: dict) -> str:
    """One case for a terminal: milliseconds by phase, bandwidth, memory."""
    by_provider: dict[str, dict[str, dict]] = {}
    for row in measured["rows"]:
        by_provider.setdefault(row["provider"], {})[row["phase"]] = row
    lines = [title, f"{'':<18}" + "".join(f"{phase:>10}" for phase in PHASES) + "   GB/s  % of copy  extra MiB"]
    for provider, phases in by_provider.items():
        cells = "".join(f"{phases[phase]['p50_ms']:>10.4g}" if phase in phases else f"{'':>10}" for phase in PHASES)
        extra = measured["extra_bytes"][provider]
        mebibytes = "" if extra is None else f"{extra / 2**20:.0f}"
        both = phases["both"]
        speed = f"{both['gigabytes_per_second']:>7.4g}{both['percent_of_copy']:>11.4g}"
        lines.append(f"{provider:<18}{cells}{speed}{mebibytes:>11}")
    lines += [f"{provider:<18}{reason}" for provider, reason in measured["absent"].items()]
    return "\n".join(lines)


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def parser(module: str, text: str | None, output: Path, cases: tuple) -> argparse.ArgumentParser:
    """The command line of a measurement on a GPU."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=(text or "").splitlines()[0])
    names = ", ".join(case.name for case in cases)
    made.add_argument("--cases", nargs="*", default=[], metavar="NAME", help=names)
    made.add_argument("--seconds", type=float, default=4.0, help="measured time per case")
    made.add_argument("--budget", type=float, default=300.0, help="seconds for all cases; what is left over is named")
    made.add_argument("--device", default="cuda", help="cuda, or cpu to try the command out")
    made.add_argument("--rows", type=int, default=0, help="rows of every case, to try the command out")
    made.add_argument("--output", type=Path, default=output, help="the results file")
    made.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)
    made.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
