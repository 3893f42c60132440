"""The command line, in processes of its own where that matters, and shards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for name in ("filelock", "peft", "torchmetrics", "transformers", "typer", "yaml"):
    pytest.importorskip(name)

import yaml  # noqa: E402
from tiny_experiments import EXAMPLES, save_model  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from caref_kernels.harness import __main__ as command  # noqa: E402
from caref_kernels.harness.results import Results, Shard  # noqa: E402
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
        "variants": ["ZERO-STEP", "CAREF-AQ", "CE-AQ"],
        "splits": [0, 2],
        "train_size": 8,
        "dev_size": 6,
        "max_steps": 4,
        "warmup_steps": 1,
        "logging_steps": 2,
        "save_steps": 2,
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
    assert (done.exit_code, done.stdout) == (0, "6 finished, 0 there already, 0 busy, 0 failed\n")
    done = invoke("resume", config, "--results", folder)
    assert "0 finished, 6 there already" in done.stdout
    done = invoke(
        "grid", config, "--results", folder, "--alphas", "1,2", "--betas", "0,1", "--set", "variants=[CAREF-AQ]"
    )
    assert "6 finished, 2 there already" in done.stdout
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


def test_params_prints_the_papers_percentages() -> None:
    done = invoke("params")
    assert done.exit_code == 0
    assert all(
        text in done.stdout for text in ("52.2275", "19.2805", "6.4428", "6.4268", "4.4628", "15.7383", "0.5803")
    )


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_resume(number: int, code: int, config: Path, tmp_path: Path) -> None:
    """In the C locale, at the other end of the world, with a home that cannot be written."""
    folder = tmp_path / "results"
    environment = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "HOME": "/proc", "PYTHONUTF8": "0"}
    long = ["--set", "max_steps=100000", "--set", "variants=[CAREF-AQ]", "--set", "save_steps=100000"]
    child = process("run", config, "--results", folder, *long, **environment)
    work = folder / "work"
    for _ in range(1200):
        if work.is_dir() and any(work.iterdir()):
            break
        time.sleep(0.05)
    time.sleep(1.0)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert "resume with: python -m caref_kernels.harness run" in err
    assert "0 finished" in out
    (run,) = work.iterdir()
    assert [path.name.startswith("checkpoint-") for path in run.iterdir()] == [True]


def test_two_processes_share_a_folder(config: Path, tmp_path: Path) -> None:
    children = [process("run", config, "--results", tmp_path) for _ in range(2)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert len(Results(tmp_path).read().rows) == 6
    # DeepSpeed, where it is installed, prints a line of its own before.
    finished = [int(re.search(r"(\d+) finished", out)[1]) for out, _ in outputs]
    assert sum(finished) == 6


def test_kill_9_at_random_instants() -> None:
    """A handful of kills; tests/crash_harness.py takes their number."""
    command_line = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "crash_harness.py"), "6", "7"]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows equal those of the undisturbed run" in done.stdout


def test_shards_are_disjoint_and_whole() -> None:
    jobs = Settings().jobs()
    parts = [Shard(index, 7).of(jobs) for index in range(7)]
    assert sorted(job for part in parts for job in part) == sorted(jobs)
    assert Shard.parse("3/8") == (3, 8)
    for text in ("8/8", "3", "-1/2", "a/b", "1/0", ""):
        with pytest.raises(ValueError, match="shard must be index/count"):
            Shard.parse(text)


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
    opened, sizes = [], []
    for round_ in range(3):
        folder = tmp_path / str(round_)
        assert invoke("run", config, "--results", folder, "--set", "splits=[0, 1]").exit_code == 0
        opened.append(len(os.listdir("/proc/self/fd")))
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    assert opened[1] == opened[2]
    # Times are a few bytes longer or shorter.
    assert abs(sizes[2] - sizes[1]) < 200
