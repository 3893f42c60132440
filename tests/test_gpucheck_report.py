"""The parent of gpucheck: statuses, budget, crashes, the file; what other tools say; without a GPU nothing passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_device
import pytest
import torch
import triton_interpreter

from caref_kernels import backends
from caref_kernels.gpucheck import __main__ as command
from caref_kernels.gpucheck import compiled_controls, conduct, environment, report, sanitizer, sources, stages

ROOT = Path(__file__).parents[1]
SETTINGS = conduct.Settings((), 600.0, 2, "cpu", 0.5)


@pytest.fixture
def without_gpu():
    if cuda_device.missing() is None:
        pytest.skip("there is a CUDA device")


def test_without_a_gpu_its_stages_are_unsupported_and_the_others_run(without_gpu, tmp_path, capsys, monkeypatch):
    """And the parent never asks for a device: only the processes of the stages may."""
    for name in ("is_available", "get_device_properties", "device_count", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("the parent touched the device"))
    out = tmp_path / "report" / "gpucheck.json"
    arguments = ["--out", str(out), "--stage", "smoke", "graphs", "fuzz", "--scale", "0.5", "--budget", "200"]
    assert command.main([*arguments, "--commit", "c" * 40]) == 0
    written = json.loads(out.read_text())
    assert not list(out.parent.glob("*.partial"))
    by_name = {stage["name"]: stage for stage in written["stages"]}
    gpu_backends = [name for name in backends.ORDER if name not in ("cpu", "reference")]
    for name in gpu_backends:
        for stage in ("smoke", "graphs", "fuzz"):
            assert by_name[f"{stage}/{name}"]["status"] == "unsupported"
            assert by_name[f"{stage}/{name}"]["detail"].startswith("no CUDA device: ")
    assert by_name["env"]["status"] == "pass"
    reason = backends.get("cpu").unsupported(torch.empty(1, 2))
    assert by_name["smoke/cpu"]["status"] == ("unsupported" if reason else "pass")
    assert written["host"]["gpu"] is None
    assert written["package"]["git"] == "c" * 40
    assert written["package"]["source_sha256"] == sources.source_hash(kind="gpu")
    assert written["summary"]["unsupported"] == 3 * len(gpu_backends) + bool(reason)
    assert str(ROOT) not in out.read_text()
    assert "smoke/cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "required", "code"),
    [
        ({"smoke/triton": "pass"}, [], 0),
        ({"smoke/triton": "unsupported", "large/triton": "skipped"}, [], 0),
        *(({"smoke/triton": "pass", "large/triton": bad}, [], 1) for bad in ("fail", "invalid", "timeout", "crash")),
        ({"smoke/triton": "pass"}, ["smoke"], 0),
        ({"smoke/triton": "pass", "smoke/cuda": "unsupported"}, ["smoke"], 1),
        ({"smoke/triton": "pass", "smoke/cuda": "unsupported"}, ["smoke/triton"], 0),
        ({"smoke/triton": "skipped"}, ["smoke"], 1),
        ({"smoke/triton": "pass"}, ["sanitizer"], 1),
        ({"smokeless": "pass"}, ["smoke"], 1),
    ],
)
def test_exit_code(statuses, required, code):
    written = report.Report(None, {}, {})
    for name, status in statuses.items():
        written.add(name, status, "", 0.0)
    assert written.exit_code(required) == code


def test_a_status_is_one_of_the_seven():
    with pytest.raises(ValueError, match="status must be one of pass, fail, .*; got 'ok'"):
        report.Report(None, {}, {}).add("smoke", "ok", "", 0.0)


def test_the_report_is_bounded(tmp_path):
    written = report.Report(tmp_path / "r.json", {}, {})
    found = {"cases": 99, "failed": [[str(index), "x" * 10_000] for index in range(99)], "controls": {}}
    written.add("fuzz/triton", *report.judge(found), 1.0, found)
    stage = json.loads((tmp_path / "r.json").read_text())["stages"][0]
    assert stage["detail"] == "99 of 99 cases failed"
    assert len(stage["failed"]) == report.MOST_FAILURES
    assert max(len(message) for _, message in stage["failed"]) == report.MOST_CHARACTERS


def _conductor(**changes):
    lines = []
    written = report.Report(None, {}, {})
    return conduct.Conductor(SETTINGS._replace(**changes), written, lines.append), written, lines


def _entry(job, **changes):
    conductor, written, lines = _conductor(**changes)
    conductor._run(job)
    (entry,) = written.content["stages"]
    assert entry["name"] in lines[0]
    return entry


@pytest.mark.parametrize(
    ("stage", "changes", "status", "detail"),
    [
        (stages.Stage("nothing-like-it", "", 60), {}, "crash", "exit status 1"),
        (stages.BY_NAME["smoke"]._replace(seconds=0.05, least=0), {}, "timeout", "stopped after 0 s"),
        (stages.BY_NAME["smoke"], {"budget": 12.0}, "skipped", "it needs 10"),
    ],
)
def test_what_a_stage_can_become(stage, changes, status, detail):
    entry = _entry(conduct.Job(stage, "cpu", "cpu"), **changes)
    assert entry["status"] == status
    assert detail in entry["detail"]


def test_a_process_that_dies_or_leaves_nothing_has_crashed(tmp_path):
    result = tmp_path / "result.json"
    result.write_text('{"cases": 1, "failed": [], "controls": {}}')
    assert conduct.verdict(0, "", result)[0] == "pass"
    assert conduct.verdict(-11, "said", result)[:2] == ("crash", "signal 11: said")
    assert conduct.verdict(0, "said", tmp_path / "missing")[0] == "crash"


def test_stages_that_need_the_device_alone_get_it():
    jobs = [
        conduct.Job(stages.BY_NAME[name], "triton", "cuda") for name in ("warm", "smoke", "labels", "large", "fuzz")
    ]
    groups = [([job.stage.name for job in group], alone) for group, alone in conduct._groups(jobs)]
    assert groups == [(["warm"], True), (["smoke", "labels"], False), (["large"], True), (["fuzz"], False)]


def test_stages_of_a_gpu_are_found_by_the_names_of_the_backends(monkeypatch):
    conductor, written, _ = _conductor(device="cuda")
    written.content["host"]["backends"] = {
        "cuda": {"triton": "runs", "other": "built without it"},
        "cpu": {"cpu": "runs"},
    }
    monkeypatch.setattr(backends, "ORDER", ("triton", "other", "cpu", "reference"))
    jobs = {job.name: job.reason for stage in stages.STAGES for job in conductor._jobs(stage)}
    assert jobs["graphs/triton"] == jobs["smoke/triton"] == jobs["smoke/cpu"] == ""
    assert jobs["graphs/other"] == "built without it"
    assert "warm/triton" in jobs
    assert "warm/other" not in jobs
    assert "graphs/cpu" not in jobs


def test_the_time_of_all_stages_is_known():
    """Every stage is worth starting within its limit, and the first ones fit a short budget."""
    assert all(stage.least <= stage.seconds for stage in stages.STAGES)
    assert [stage.name for stage in stages.STAGES][:2] == list(conduct._FIRST)
    assert stages.STAGES[-1].open_ended


def test_command_line_names_the_stages(capsys):
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in stages.BY_NAME)
    with pytest.raises(SystemExit):
        command.main(["--stage", "nonsense"])
    assert "--stage must be among env, build" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what others report


def test_pytest_is_read():
    passed = environment.read_pytest(0, "....\n12 passed, 3 skipped, 9 deselected in 4.2s\n")
    assert passed == {"cases": 12, "failed": [], "controls": {}, "skipped_tests": 3}
    failed = environment.read_pytest(
        1, "FAILED tests/test_a.py::test_b[triton] - AssertionError: 2\n1 failed, 2 passed in 1s\n"
    )
    assert failed["failed"] == [["tests/test_a.py::test_b[triton]", "AssertionError: 2"]]
    assert report.judge(environment.read_pytest(4, "ERROR: usage\n"))[0] == "fail"
    assert report.judge(environment.read_pytest(5, "9 deselected in 1s\n"))[0] == "fail"
    assert report.judge(environment.read_pytest(0, "9 skipped in 1s\n"))[0] == "invalid"


@pytest.mark.parametrize(
    ("code", "output", "errors", "message"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", 0, ""),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, ""),
        (99, "=========     at row_kernel+0x1 in f.py:3\n========= ERROR SUMMARY: 2 errors", 2, "at row_kernel"),
        (99, "========= ERROR SUMMARY: 0 errors", 0, "exit status 99"),
        (1, "========= Error: Device not supported", None, "no summary"),
        (0, "nothing", None, "no summary"),
    ],
)
def test_the_sanitizer_is_read(code, output, errors, message):
    found, said = sanitizer.read(code, output)
    assert found == errors
    assert message in said
    assert bool(said) == bool(message)


def test_the_sanitizer_is_unsupported_unless_it_reports_what_is_planted(monkeypatch, tmp_path):
    fakes = {"compute-sanitizer": tmp_path / "compute-sanitizer", "nvcc": tmp_path / "nvcc"}
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(fakes[name]) if name in fakes else None)
    fakes["nvcc"].write_text("#!/bin/sh\nexit 0\n")
    for said, code, message in (
        ("Error: Device not supported", 1, "Device not supported"),
        ("ERROR SUMMARY: 0 errors", 0, "was not reported"),
        ("Invalid __global__ write", 0, "was not reported"),
    ):
        fakes["compute-sanitizer"].write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
        for fake in fakes.values():
            fake.chmod(0o755)
        with pytest.raises(sanitizer.Unsupported, match=message):
            sanitizer.sanitizer("triton", 60)
    del fakes["compute-sanitizer"]
    with pytest.raises(sanitizer.Unsupported, match="not installed"):
        sanitizer.sanitizer("triton", 60)


# ----------------------------------------------------------------------------------------- mistakes in compiled kernels


def test_the_patches_fit_the_kernels_of_today(tmp_path):
    for number, (name, patch) in enumerate(compiled_controls.PATCHES.items()):
        copy = compiled_controls.plant(patch, tmp_path / str(number))
        original = compiled_controls.PACKAGE / patch.path
        assert (copy / patch.path).read_text() != original.read_text(), name
        assert patch.stage in stages.BY_NAME
    absent = next(iter(compiled_controls.PATCHES.values()))._replace(old="no such text")
    with pytest.raises(ValueError, match="exactly once; it does 0 times"):
        compiled_controls.plant(absent, tmp_path / "absent")


INTERPRETED = """
import json, sys
from caref_kernels.gpucheck import compiled_controls
json.dump(compiled_controls.controls("triton", 240, "cpu", ("unmasked tail",)), sys.stdout)
"""


@pytest.mark.skipif(triton_interpreter.ACTIVE, reason="started in a process of its own")
def test_a_mistake_in_a_compiled_kernel_is_caught():
    """Here by Triton's interpreter; on a GPU by its compiler."""
    pytest.importorskip("triton")
    variables = {**_environment(), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=ROOT, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["controls"] == {"unmasked tail": "caught"}


def _environment():
    # The patched copy must not find the package of this tree first.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
