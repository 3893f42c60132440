"""The command line, in processes of its own where that matters, and shards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("filelock", "peft", "torchmetrics", "transformers", "typer", "yaml"):
    pytest.importorskip(name)

import yaml  # noqa: E402
from tiny_experiments import EXAMPLES, save_model  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from caref_kernels.harness import __main__ as command  # noqa: E402
from caref_kernels.harness import training  # noqa: E402
from caref_kernels.harness.results import Results, take_shard  # noqa: E402
from caref_kernels.harness.runs import DeviceLostError  # noqa: E402
from caref_kernels.harness.settings import Settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    options = {
        "model": str(save_model(folder / "model")),
        "data": str(EXAMPLES),
        "datasets": ["comve"],
        "variants": ["CAREF-AQ", "CE-AQ"],
        "splits": [0, 2],
        "train_size": 8,
        "dev_size": 6,
        "max_steps": 4,
        "warmup_steps": 1,
        "logging_steps": 2,
        "max_new_tokens": 2,
        "scorer": "none",
        "device": "cpu",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return folder / "tiny.yaml"


def invoke(*arguments: object):
    return CliRunner().invoke(command.app, [*map(str, arguments)])


def process(*arguments: object, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command_line = [sys.executable, "-m", "caref_kernels.harness", *map(str, arguments)]
    return subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def test_run_report_table_and_grid(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    done = invoke("run", config, "--results", folder)
    assert (done.exit_code, done.stdout) == (0, "4 finished, 0 there already, 0 busy, 0 failed\n")
    done = invoke("resume", config, "--results", folder)
    assert "0 finished, 4 there already" in done.stdout
    done = invoke(
        "grid", config, "--results", folder, "--alphas", "2", "--betas", "0,1", "--set", "variants=[CAREF-AQ]"
    )
    assert "2 finished, 2 there already" in done.stdout
    done = invoke("report", "--results", folder, "--expect", "2", "--strict")
    assert done.exit_code == 0, done.output
    assert "CAREF-AQ on ComVE, accuracy by exponents" in (folder / "report.md").read_text(encoding="utf-8")
    assert "CAREF-AQ minus CE-AQ" in (folder / "report.md").read_text(encoding="utf-8")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "report.csv").write_bytes((folder / "report.csv").read_bytes())
    printed = [invoke("table", "--results", place).stdout for place in (folder, kept)]
    assert printed[0] == printed[1]
    assert "CAREF-AQ" in printed[0]
    done = invoke("table", "--results", folder, "--strict")
    assert done.exit_code == 1
    assert "incomplete: comve CAREF-AQ: 2/60 splits" in done.output
    assert "not run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml", "--results", "{out}"], "No such file or directory: 'none.yaml'"),
        (["run", "{config}", "--results", "{out}", "--set", "alpha"], "--set must be option=value; got 'alpha'"),
        (
            ["run", "{config}", "--results", "{out}", "--set", "variants=[os.system]"],
            "variants must be different names",
        ),
        (
            ["run", "{config}", "--results", "{out}", "--shard", "2/2"],
            "shard must be index/count with 0 <= index < count",
        ),
        (["grid", "{config}", "--results", "{out}", "--alphas", "x"], "comma-separated numbers; got 'x'"),
        (["grid", "{config}", "--results", "{out}", "--alphas", "0.5"], r"alpha must be in \[1, 16\]"),
        (["report", "--results", "{out}/none"], "--results: no such folder"),
        (["params", "--model", "no/model"], "must be a folder with a config.json"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, config: Path, tmp_path: Path) -> None:
    done = invoke(*(text.format(config=config, out=tmp_path / "out") for text in arguments))
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("caref_kernels.harness: error: ")
    assert re.search(message, line)


def test_a_lost_device_goes_on_in_a_fresh_process(config: Path, tmp_path: Path, monkeypatch) -> None:
    from caref_kernels.harness import runs

    def lost(*arguments, **options):
        raise DeviceLostError("gone")

    started = []
    monkeypatch.setattr(runs, "run_jobs", lost)
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["caref-harness", "resume", str(config), "--results", str(tmp_path)])
    assert invoke("resume", config, "--results", tmp_path).exit_code == 0
    # Not "resume", which would try the same job for ever.
    assert started == [[sys.executable, "-m", "caref_kernels.harness", "run", str(config), "--results", str(tmp_path)]]


def test_a_signal_stops_and_says_how_to_continue(config: Path, tmp_path: Path) -> None:
    """In the C locale, at the other end of the world, with a home that cannot be written."""
    environment = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "HOME": "/proc", "PYTHONUTF8": "0"}
    long = ["--set", "max_steps=100000", "--set", "variants=[CAREF-AQ]"]
    child = process("run", config, "--results", tmp_path, *long, **environment)
    # Not a terminal: the name of a run is printed when it begins.
    while "comve.CAREF-AQ" not in (line := child.stderr.readline()):
        assert line, child.communicate()
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 143, err
    assert "continue with: python -m caref_kernels.harness run" in err
    assert "0 finished" in out
    assert Results(tmp_path).read().rows == ()


def test_an_interrupt_keeps_finished_runs_and_the_next_command_continues(config: Path, tmp_path: Path, capfd) -> None:
    real = training.StepCallback.on_step_end
    options = "run", config, "--results", tmp_path, "--set", "splits=[0, 1]"

    def interrupt_the_second_run(self, args, state, control, **kwargs):
        if len(Results(tmp_path).read().rows) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.StepCallback, "on_step_end", interrupt_the_second_run)
        done = invoke(*options)
    assert (done.exit_code, done.stdout) == (130, "1 finished, 0 there already, 0 busy, 0 failed\n")
    assert "stopped; continue with: python -m caref_kernels.harness" in done.stderr
    assert "stopping after this step; once more to stop at once" in capfd.readouterr().err
    done = invoke(*options)
    assert (done.exit_code, done.stdout) == (0, "1 finished, 1 there already, 0 busy, 0 failed\n")


def test_kill_9_at_random_instants_and_two_processes_share_a_folder() -> None:
    """A handful of kills, then two processes finish what is left; tests/crash_harness.py takes the number of kills."""
    command_line = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "crash_harness.py"), "6", "7"]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows equal those of the undisturbed run" in done.stdout


def test_shards_are_disjoint_and_whole() -> None:
    jobs = Settings().jobs()
    parts = [take_shard(jobs, f"{index}/7") for index in range(7)]
    assert sorted(job for part in parts for job in part) == sorted(jobs)
    assert parts[3] == jobs[3::7]
    for text in ("8/8", "3", "-1/2", "a/b", "1/0", ""):
        with pytest.raises(ValueError, match="shard must be index/count"):
            take_shard(jobs, text)


def test_missing_packages_are_named() -> None:
    program = "import sys; sys.modules['typer'] = None; import runpy; runpy.run_module('caref_kernels.harness')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "typer is not installed; run: pip install 'caref_kernels[harness]'"


def test_resources_do_not_grow(config: Path, tmp_path: Path) -> None:
    """A short stand-in for a day's soak: open files and the size of the results do not grow from round to round."""
    opened, sizes, one = [], [], ("--set", "splits=[0, 1]", "--set", "variants=[CAREF-AQ]")
    for round_ in range(3):
        folder = tmp_path / str(round_)
        assert invoke("run", config, "--results", folder, *one).exit_code == 0
        opened.append(len(os.listdir("/proc/self/fd")))
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    assert opened[1] == opened[2]
    # Times are a few bytes longer or shorter.
    assert abs(sizes[2] - sizes[1]) < 200
