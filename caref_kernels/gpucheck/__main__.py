"""``python -m caref_kernels.gpucheck``: what only a GPU, or only its compiler, can show, in one report.

Every stage runs in a process of its own.  Without a GPU its stages are unsupported, with the reason, and the others
run.  ``--aot`` alone compiles every Triton kernel without a GPU and prints what the machine code costs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ..backends.triton import INTERPRETED
from . import aot, conduct, environment, report, sanitizer, stages
from .subject import Subject, Unsupported

_HEADER = f"{'kernel':<56} {'per column':>10} {'budget':>7} {'registers':>9} {'stack':>6} {'spills':>6}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if nothing went wrong and what ``--require`` names has passed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(options)
    if options.aot:
        return _aot(parser, options)
    unknown = sorted(set(options.stage) - set(stages.BY_NAME))
    if unknown:
        parser.error(f"--stage must be among {', '.join(stages.BY_NAME)}; got {', '.join(unknown)}")
    if options.list:
        for stage in stages.STAGES:
            _say(f"{stage.name:<12} {stage.meaning}")
        return 0
    return _conduct(options)


def _conduct(options: argparse.Namespace) -> int:
    jobs = options.jobs or max(2, min(6, len(os.sched_getaffinity(0)) // 3))
    settings = conduct.Settings(tuple(options.stage), options.budget, jobs, options.device, options.scale)
    written = report.Report(options.out, environment.package_state(options.commit), settings._asdict())
    conduct.Conductor(settings, written, _say).run()
    counts = ", ".join(f"{count} {status}" for status, count in written.summary().items() if count)
    _say(f"{counts}{f'; {options.out}' if options.out else ''}")
    return written.exit_code(options.require)


def _work(options: argparse.Namespace) -> int:
    """The process of one stage, or of a part of one."""
    subject = Subject(options.backend, options.device, scale=options.scale)
    if options.device == "cpu":  # stages run side by side
        torch.set_num_threads(1)
    if options.worker == "drive":
        sanitizer.drive(subject)
        return 0
    if options.worker == "compile":
        stages.compile_share(subject, options.share)
        return 0
    stage = stages.BY_NAME[options.worker]
    try:
        found = stages.run(stage, subject, options.seconds, options.capability, options.first_check)
    except Unsupported as reason:
        found = {"unsupported": str(reason)}
    options.result.write_text(json.dumps(found))
    return 0


def _aot(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed (pip install triton, on Linux)")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    chosen = [variant for variant in aot.variants(options.arch) if options.only in str(variant)]
    return _machine_code(chosen, options.jobs or 2)


def _machine_code(chosen: list[aot.Variant], jobs: int) -> int:
    import triton

    _say(f"triton {triton.__version__}, {len(chosen)} kernels; instructions per column, shortest way round\n{_HEADER}")
    failed = 0
    with ProcessPoolExecutor(jobs) as pool:
        for result in pool.map(aot.check, chosen):
            code = result.code
            per_column = "" if result.per_column is None else f"{result.per_column:.1f}"
            budget = "" if result.budget is None else f"{result.budget:g}"
            _say(
                f"{result.variant!s:<56} {per_column:>10} {budget:>7} "
                f"{code.registers:>9} {code.stack:>6} {code.spills:>6}"
                f"{'  FAILS: ' if result.failures else ''}{'; '.join(result.failures)}"
            )
            failed += bool(result.failures)
    _say(f"{len(chosen) - failed} of {len(chosen)} within their budgets")
    return 1 if failed or not chosen else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m caref_kernels.gpucheck", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report, JSON, rewritten after every stage")
    parser.add_argument("--stage", nargs="+", default=[], metavar="NAME", help="these alone; --list shows them")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for all stages (540)")
    parser.add_argument("--require", nargs="+", default=[], metavar="NAME", help="stages that must pass, not only run")
    parser.add_argument("--jobs", type=int, default=0, help="stages, or with --aot kernels, at the same time")
    parser.add_argument("--commit", default="", help="the commit of a tree without its git folder")
    parser.add_argument("--list", action="store_true", help="show the stages and stop")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the stages out on the host"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: small shapes, to try the stages out")
    parser.add_argument("--aot", action="store_true", help="compile the Triton kernels ahead of time, and nothing else")
    parser.add_argument("--arch", type=int, nargs="+", default=list(aot.ARCHITECTURES), help="with --aot: 80 90 100")
    parser.add_argument("--only", default="", metavar="TEXT", help="with --aot: kernels whose line contains this")
    for name in ("worker", "backend", "capability", "share"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    parser.add_argument("--first-check", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
