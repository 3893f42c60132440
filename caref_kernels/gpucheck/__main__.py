"""``python -m caref_kernels.gpucheck``: what only a GPU, or only its compiler, can show, in one report.

Every stage runs in a process of its own.  Without a GPU its stages are unsupported, with the reason, and the others
run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from . import conduct, environment, report, sanitizer, stages
from .subject import Subject, Unsupported


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if nothing went wrong and what ``--require`` names has passed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(options)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m caref_kernels.gpucheck", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report, JSON, rewritten after every stage")
    parser.add_argument("--stage", nargs="+", default=[], metavar="NAME", help="these alone; --list shows them")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for all stages (540)")
    parser.add_argument("--require", nargs="+", default=[], metavar="NAME", help="stages that must pass, not only run")
    parser.add_argument("--jobs", type=int, default=0, help="stages, at the same time")
    parser.add_argument("--commit", default="", help="the commit of a tree without its git folder")
    parser.add_argument("--list", action="store_true", help="show the stages and stop")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the stages out on the host"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: small shapes, to try the stages out")
    for name in ("worker", "backend", "capability", "share"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    parser.add_argument("--first-check", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
