"""`python -m benchmarks.measure_step`: a training step of T5 and SmolLM2 with each loss: time, memory, largest batch.

The losses take turns on one model.  On the CPU time is measured with the allocator's threshold raised and memory in a
process of its own (see benchmarks/measure.py); on a GPU both come from the device.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .isolated import run_cases, write
from .measure import worker_environment
from .provenance import ROOT, gpu_provenance, provenance
from .sampling import percentiles, resident_bytes
from .step_models import CPU_CASES, GPU_CASES, LOSSES, Step, StepCase, largest_batch, step_loss

SCHEMA = 1
RESULTS = {kind: ROOT / "benchmarks" / "results" / f"step_{kind}.json" for kind in ("cpu", "gpu")}
CASES = {"cpu": CPU_CASES, "gpu": GPU_CASES}
PARTS = ("time", "memory")
CASE_LIMIT = 150.0
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class StepRow:
    """One line of the results: one loss on one model; seconds of a step are percentiles.

    Raises:
        ValueError: machine or commit is empty, so that nobody could say what was measured where.
    """

    machine: str
    commit: str
    case: str
    loss: str
    p20_s: float
    p50_s: float
    p80_s: float
    samples: int
    peak_bytes: int | None  # of a step, model and optimiser included, the interpreter not
    largest_batch: int | None  # within limit_bytes
    largest_peak_bytes: int | None
    limit_bytes: int | None

    def __post_init__(self) -> None:
        if not (self.machine and self.commit):
            raise ValueError(f"machine and commit must not be empty; got {self.machine!r} and {self.commit!r}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results file after every model."""
    options = _parser().parse_args(arguments)
    kind = "gpu" if options.device == "cuda" else "cpu"
    torch.set_num_threads(options.threads)
    known = {case.name: case for case in CASES[kind]}
    if options.worker:
        name, part = options.worker.split("/")
        work = _time_part if part == "time" else _memory_part
        options.part.write_text(json.dumps(work(known[name], torch.device(options.device), options)))
        return
    if kind == "gpu" and torch.cuda.device_count() == 0:
        raise SystemExit("no CUDA device; nothing was measured")
    unknown = sorted(set(options.cases) - set(known))
    if unknown:
        raise SystemExit(f"cases must be among {', '.join(known)}; got {', '.join(unknown)}")
    _measure([known[name] for name in options.cases or known], options, kind)


def _measure(cases: list[StepCase], options: argparse.Namespace, kind: str) -> None:
    output = options.output or RESULTS[kind]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    results: dict = {
        "schema": SCHEMA,
        "date": today,
        "provenance": {},
        "cases": {},
        "losses": {},
        "left_out": {},
        "rows": [],
    }
    extra = ["--device", options.device, "--seconds", str(options.seconds), "--threads", str(options.threads)]
    end = time.monotonic() + options.budget
    for case in cases:
        parts: dict[str, dict] = {}
        for part, regime in zip(PARTS, ("raised", "memory"), strict=True):
            environment = worker_environment(regime, dict(os.environ)) if kind == "cpu" else None
            results["left_out"] |= run_cases(
                "benchmarks.measure_step", [f"{case.name}/{part}"], extra, end - time.monotonic(), CASE_LIMIT,
                lambda name, found, parts=parts: parts.update({name.split("/")[1]: found}), environment,
            )  # fmt: skip
        if "time" in parts:
            made = results["provenance"] = parts["time"]["provenance"]
            results["cases"][case.name] = case.title
            results["losses"][case.name] = parts["time"]["losses"]
            results["rows"] += [asdict(row) for row in _rows(made, case, parts)]
            write(output, results)
    if not results["rows"]:
        raise SystemExit(f"nothing was measured: {results['left_out']}")
    write(output, results)
    sys.stdout.write("\n".join(table(results)) + "\n")
    sys.stderr.write(f"wrote {output}\n")


def _rows(made: dict, case: StepCase, parts: dict[str, dict]) -> list[StepRow]:
    memory = parts.get("memory", {"peaks": {}, "largest": {}})
    return [
        StepRow(
            made["machine"], made["commit"], case.name, loss, *times,
            memory["peaks"].get(loss), *memory["largest"].get(loss, (None, None)), case.limit,
        )
        for loss, times in parts["time"]["times"].items()
    ]  # fmt: skip


def _time_part(case: StepCase, device: torch.device, options: argparse.Namespace) -> dict:
    step = Step(case, device)
    batch = case.make_batch(case.batch, device)
    losses = step.verify(batch)
    samples: dict[str, list[float]] = {name: [] for name in LOSSES}

    def once(name: str) -> float:
        with step_loss(name, step.model) as loss:
            _wait(device)
            start = time.perf_counter()
            step.run(loss, batch)
            _wait(device)
            return time.perf_counter() - start

    for name in LOSSES:
        once(name)
    order, chance, end = list(LOSSES), random.Random(0), time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(samples[order[0]]) < LEAST_ROUNDS:
        chance.shuffle(order)
        for name in order:
            samples[name].append(once(name))
    times = {name: [*(float(f"{one:.4g}") for one in percentiles(own)), len(own)] for name, own in samples.items()}
    made = gpu_provenance(device) if device.type == "cuda" else provenance()
    return {"times": times, "losses": losses, "provenance": made}


def _memory_part(case: StepCase, device: torch.device, _options: argparse.Namespace) -> dict:
    """The peak of a step, and the largest batch; a batch that runs out of memory does not fit."""
    case.classes()
    before = 0 if device.type == "cuda" else resident_bytes()
    step = Step(case, device)
    peaks, largest = {}, {}
    for name in LOSSES:
        with ExitStack() as stack:
            loss = stack.enter_context(step_loss(name, step.model))

            def peak(size: int, loss=loss) -> int | None:
                try:
                    return _peak_of(step, loss, size, device) - before
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    return None

            peak(case.batch)  # the optimiser makes its state, kernels are compiled
            peaks[name] = peak(case.batch)
            if case.limit is not None:
                largest[name] = largest_batch(peak, case.batch, case.limit)
    return {"peaks": peaks, "largest": largest}


def _peak_of(step: Step, loss, size: int, device: torch.device) -> int:
    batch = step.case.make_batch(size, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step.run(loss, batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    resident_bytes(reset_peak=True)
    step.run(loss, batch)
    return resident_bytes(peak=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(results: dict) -> list[str]:
    """For a terminal: one line for each loss of each model."""
    lines = []
    for name, title in results["cases"].items():
        lines += [title, f"{'':<16}{'step, s':>10}{'peak, MiB':>11}{'largest batch':>15}"]
        for row in results["rows"]:
            if row["case"] == name:
                peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
                batch = "" if row["largest_batch"] is None else str(row["largest_batch"])
                lines.append(f"{row['loss']:<16}{row['p50_s']:>10.4g}{peak:>11}{batch:>15}")
    return lines + [f"{name}: {reason}" for name, reason in results["left_out"].items()]


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure_step", description=description)
    names = ", ".join(dict.fromkeys(case.name for cases in CASES.values() for case in cases))
    parser.add_argument("--cases", nargs="*", default=[], metavar="NAME", help=names)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the model lies")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time per model")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds for all of it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and the kernels")
    parser.add_argument("--output", type=Path, help="the results file")
    parser.add_argument("--worker", metavar="CASE/PART", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
