"""The command line: ``python -m caref_kernels.harness``, or ``caref-harness``."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import rich  # noqa: F401
    import typer
    import yaml  # noqa: F401
except ImportError as error:
    raise SystemExit(f"{error.name} is not installed; run: pip install 'caref_kernels[harness]'") from None

if TYPE_CHECKING:
    from .report import Study
    from .settings import Settings

_EXPECTED = (ValueError, OSError, ImportError)
_FAILED, _USAGE, _INCOMPLETE = 3, 2, 1

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="YAML file of the experiment, or flan-t5-large or smollm2")]
Folder = Annotated[Path, typer.Option("--results", help="folder of the results; several processes may share it")]
Set = Annotated[list[str] | None, typer.Option("--set", help="option=value, on top of the file; repeatable")]
Part = Annotated[str, typer.Option("--shard", help="index/count: only this part of the runs, counted from 0")]
Alpha = Annotated[float, typer.Option(help="exponent of the rows to report")]
Beta = Annotated[float, typer.Option(help="exponent of the rows to report")]
Expect = Annotated[int, typer.Option(help="splits that make a cell complete", min=1)]
Strict = Annotated[bool, typer.Option("--strict", help="exit with 1 if a cell is incomplete")]
Numbers = Annotated[str, typer.Option(help="comma-separated")]


def _one_line(command: Callable) -> Callable:
    """Errors that a user can mend become one line and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except _EXPECTED as error:
            text = " ".join(str(error).split()) or type(error).__name__
            sys.stderr.write(f"caref_kernels.harness: error: {text}\n")
            raise typer.Exit(_USAGE) from None

    return wrapped


@app.command()
@_one_line
def run(config: Config, results: Folder, set_: Set = None, shard: Part = "0/1") -> None:
    """Run what has no result yet; runs that failed before are left alone."""
    _execute(_settings(config, set_), results, shard)


@app.command()
@_one_line
def resume(config: Config, results: Folder, set_: Set = None, shard: Part = "0/1") -> None:
    """As run, and try again what failed."""
    _execute(_settings(config, set_), results, shard, retry_failed=True)


@app.command()
@_one_line
def grid(
    config: Config,
    results: Folder,
    set_: Set = None,
    alphas: Numbers = "1.0,1.5,2.0,2.5",
    betas: Numbers = "0,0.5,1,2",
    shard: Part = "0/1",
) -> None:
    """Run every combination of alpha and beta (by default the official code's grid)."""
    settings = _settings(config, set_)
    exponents = tuple(tuple(_number(part) for part in text.split(",")) for text in (alphas, betas))
    _execute(settings, results, shard, exponents=exponents)


@app.command()
@_one_line
def report(
    results: Folder,
    out: Annotated[Path | None, typer.Option(help="where the files go; the results folder by default")] = None,
    alpha: Alpha = 2.0,
    beta: Beta = 1.0,
    expect: Expect = 60,
    strict: Strict = False,
) -> None:
    """Write report.md and report.csv; from report.csv alone where the rows themselves are not kept."""
    from .results import write_atomically

    study = _study(results, alpha, beta, expect)
    folder = results if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.md", study.markdown())
    write_atomically(folder / "report.csv", study.csv())
    sys.stdout.write(f"{folder / 'report.md'}: {len(study.rows)} rows\n")
    _check_complete(study, strict)


@app.command()
@_one_line
def table(results: Folder, alpha: Alpha = 2.0, beta: Beta = 1.0, expect: Expect = 60, strict: Strict = False) -> None:
    """Print the paper's table with what was measured."""
    study = _study(results, alpha, beta, expect)
    for remark in study.remarks():
        sys.stdout.write(f"{remark}\n")
    for one in study.main_tables():
        _print(one)
    _check_complete(study, strict)


@app.command()
@_one_line
def params(
    model: Annotated[str, typer.Option(help="folder with a config.json, or a known name")] = "google/flan-t5-large",
) -> None:
    """Print how many parameters every variant trains, from the model's configuration alone."""
    from .parameters import parameter_table
    from .report import parameter_markdown

    _print(parameter_markdown(parameter_table(model), model))


def _settings(config: Path, changes: Sequence[str] | None) -> Settings:
    import yaml

    from .settings import read_settings

    options = {}
    for change in changes or ():
        name, found, value = change.partition("=")
        if not found:
            raise ValueError(f"--set must be option=value; got {change!r}")
        options[name] = yaml.safe_load(value)
    shipped = Path(__file__).with_name("configs") / f"{config}.yaml"
    return read_settings(shipped if not config.exists() and shipped.is_file() else config, options)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"alphas and betas must be comma-separated numbers; got {text!r}") from None


def _execute(
    settings: Settings, folder: Path, shard: str, *, exponents: tuple = ((), ()), retry_failed: bool = False
) -> None:
    from transformers.utils import logging

    from .console import ConsoleCallbacks
    from .results import Results, take_shard
    from .runs import DeviceLostError, run_jobs

    jobs, results = take_shard(settings.jobs(*exponents), shard), Results(folder)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with ConsoleCallbacks(len(jobs)) as callbacks:
        try:
            summary = run_jobs(settings, jobs, results, callbacks, retry_failed=retry_failed)
        except DeviceLostError as error:
            callbacks.note(f"{error}; going on in a fresh process")
            # The job is marked as failed, so the next process passes it over; "resume" would try it for ever.
            command = ["run" if part == "resume" else part for part in sys.argv[1:]]
            os.execv(sys.executable, [sys.executable, "-m", "caref_kernels.harness", *command])
    counts = (("finished", "finished"), ("found", "there already"), ("busy", "busy"), ("failed", "failed"))
    sys.stdout.write(", ".join(f"{len(getattr(summary, field))} {name}" for field, name in counts) + "\n")
    if summary.stopped:
        sys.stderr.write(f"stopped; continue with: python -m caref_kernels.harness {' '.join(sys.argv[1:])}\n")
        raise typer.Exit(128 + callbacks.signal)
    if summary.failed:
        raise typer.Exit(_FAILED)


def _study(folder: Path, alpha: float, beta: float, expect: int) -> Study:
    from .report import Study, read_report
    from .results import Results

    if not folder.is_dir():
        raise FileNotFoundError(f"--results: no such folder: {folder}")
    results = Results(folder)
    has_rows = results.file.is_file() or not (folder / "report.csv").is_file()
    return Study(results.read() if has_rows else read_report(folder / "report.csv"), alpha, beta, expect)


def _check_complete(study: Study, strict: bool) -> None:
    missing = study.incomplete()
    for line in missing:
        sys.stderr.write(f"incomplete: {line}\n")
    if strict and (missing or not study.rows):
        raise typer.Exit(_INCOMPLETE)


def _print(one: Any) -> None:
    """A table for the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=one.title)
    for name in one.header:
        shown.add_column(name, overflow="fold")
    for row in one.rows:
        shown.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 200).print(shown)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
