"""`python -m benchmarks.measure_gpu`: every GPU case and provider on one device, into one JSON file.

A repetition is timed by events on the stream, behind a pause that is long enough for the host to queue all of it: what
counts is the device's time, without the host's.  Before each, the second-level cache is filled with something else and
the logits are restored.  "call" is the wall clock of a forward and backward pass with the host's part, nothing queued
before it.  Contestants are interleaved in random order, and memory is the peak above what was allocated before.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from caref_kernels import backends

from .cases import GPU_CASES, Case, by_name
from .measure import UNIT
from .provenance import ROOT, gpu_provenance
from .providers import GPU_PROVIDERS, Provider, expectation, verify
from .sampling import Workspace, percentiles, useful_bytes

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results" / "loss_gpu.json"
PHASES = ("forward", "backward", "both", "call")
WARM_UP = 3
# Larger than any second-level cache, 50 MiB on an H200.
FLUSHED_BYTES = 2**28
# Of the device's clock, about a millisecond: the host queues forward and backward of any contestant in less.
PAUSE_CYCLES = 2_000_000
# The oracle holds about ten float64 copies of what it looks at.
VERIFIED_ROWS = 32


@dataclass(frozen=True)
class GpuRow:
    """One line of the results: one provider on one case in one phase; milliseconds are percentiles."""

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


class GpuSample(NamedTuple):
    """Seconds of one repetition."""

    forward: float
    backward: float
    both: float
    call: float


class Bench:
    """The tensors of one case on one device, and the clock."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.workspace = Workspace(case, device)
        self._device = device
        self._cache = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def repeat(self, provider: Provider) -> GpuSample:
        """Run ``provider`` twice: once for the device's time, once for the wall clock."""
        logits = self._fresh()
        if self._device.type == "cuda":
            torch.cuda._sleep(PAUSE_CYCLES)
        marks = [self._mark()]
        result = self.workspace.forward(provider, logits)
        marks.append(self._mark())
        gradient = self.workspace.backward(provider, logits, result)
        marks.append(self._mark())
        self._wait()
        forward, backward = (self._between(*pair) for pair in zip(marks, marks[1:], strict=False))
        del result, gradient
        logits = self._fresh()
        self._wait()
        start = time.perf_counter()
        result = self.workspace.forward(provider, logits)
        gradient = self.workspace.backward(provider, logits, result)
        self._wait()
        call = time.perf_counter() - start
        del gradient
        return GpuSample(forward, backward, forward + backward, call)

    def extra_memory(self, provider: Provider) -> int | None:
        """Bytes by which allocated memory peaks during a forward and backward pass; ``None`` off a CUDA device."""
        if self._device.type != "cuda":
            return None
        logits = self.workspace.refresh()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = self.workspace.forward(provider, logits)
        gradient = self.workspace.backward(provider, logits, result)
        torch.cuda.synchronize()
        del gradient
        return torch.cuda.max_memory_allocated() - before

    def _fresh(self) -> torch.Tensor:
        logits = self.workspace.refresh()
        if self._cache is not None:
            self._cache.zero_()
        return logits

    def _mark(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results file after every case, so that a run that is cut off leaves what it has."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; nothing was measured")
    made = gpu_provenance(device)
    cases = by_name(options.cases, GPU_CASES)
    results: dict = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "provenance": made,
        "cases": {},
        "absent": {},
        "errors": {},
        "extra_bytes": {},
        "rows": [],
    }
    for case in cases:
        if options.rows:
            case = dataclasses.replace(case, rows=options.rows)
        measured = measure_case(case, device, options.seconds)
        results["cases"][case.name] = case.title
        for name in ("absent", "errors", "extra_bytes"):
            results[name][case.name] = measured[name]
        results["rows"] += [
            asdict(GpuRow(machine=made["machine"], commit=made["commit"], **row)) for row in measured["rows"]
        ]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        partial = options.output.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(options.output)
        sys.stdout.write(table(case, measured) + "\n")
        sys.stdout.flush()
    sys.stderr.write(f"wrote {options.output}\n")


def measure_case(case: Case, device: torch.device, seconds: float) -> dict:
    """Rows, errors and memory of every provider that can run ``case``; ``absent`` has the reasons of the others."""
    bench = Bench(case, device)
    absent, errors, extra, running = {}, {}, {}, []
    few = slice(0, min(VERIFIED_ROWS, case.rows))
    expected = expectation(bench.workspace.values[few], bench.workspace.labels[few])
    for provider in GPU_PROVIDERS:
        try:
            reason = _missing(provider, bench.workspace.values)
            if reason is None and provider.loss is not None:
                few_rows = bench.workspace.values[few], bench.workspace.labels[few]
                errors[provider.name] = verify(provider, *few_rows, expected)._asdict()
            if reason is None:
                for _ in range(WARM_UP):
                    bench.repeat(provider)
                extra[provider.name] = bench.extra_memory(provider)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            reason = "out of memory"
        if reason is None:
            running.append(provider)
        else:
            absent[provider.name] = reason
    samples: dict[str, list[GpuSample]] = {provider.name: [] for provider in running}
    order, end = random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[UNIT]) < 3:
        order.shuffle(running)
        for provider in running:
            samples[provider.name].append(bench.repeat(provider))
    return {"rows": rows_of(case, samples), "errors": errors, "absent": absent, "extra_bytes": extra}


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
    return [{key: _rounded(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def table(case: Case, measured: dict) -> str:
    """One case for a terminal: milliseconds by phase, bandwidth, memory."""
    by_provider: dict[str, dict[str, dict]] = {}
    for row in measured["rows"]:
        by_provider.setdefault(row["provider"], {})[row["phase"]] = row
    lines = [case.title, f"{'':<18}" + "".join(f"{phase:>10}" for phase in PHASES) + "   GB/s  % of copy  extra MiB"]
    for provider, phases in by_provider.items():
        cells = "".join(f"{phases[phase]['p50_ms']:>10.4g}" if phase in phases else f"{'':>10}" for phase in PHASES)
        extra = measured["extra_bytes"][provider]
        mebibytes = "" if extra is None else f"{extra / 2**20:.0f}"
        both = phases["both"]
        lines.append(
            f"{provider:<18}{cells}{both['gigabytes_per_second']:>7.4g}{both['percent_of_copy']:>11.4g}{mebibytes:>11}"
        )
    lines += [f"{provider:<18}{reason}" for provider, reason in measured["absent"].items()]
    return "\n".join(lines)


def _missing(provider: Provider, logits: torch.Tensor) -> str | None:
    return None if provider.backend is None else backends.get(provider.backend).unsupported(logits)


def _rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure_gpu", description=(__doc__ or "").splitlines()[0]
    )
    names = ", ".join(case.name for case in GPU_CASES)
    parser.add_argument("--cases", nargs="*", default=[], metavar="NAME", help=names)
    parser.add_argument("--seconds", type=float, default=8.0, help="measured time per case")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command out")
    parser.add_argument("--rows", type=int, default=0, help="rows of every case, to try the command out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    return parser


if __name__ == "__main__":
    main()
