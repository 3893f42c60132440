"""``make gpucheck`` without a GPU: every test of tests/gpu rehearsed on a fake device, the report, the helpers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cuda_emulated
import pytest
import torch
import triton_interpreter
from gpu import conftest as gpu_conftest
from gpu import faults, report, sanitizer
from gpu.guard_zones import GUARD_BYTES, GuardZones
from gpu.target import Target

from caref_kernels import backends

ROOT = Path(__file__).parents[1]
if triton_interpreter.ACTIVE:
    pytest.skip("nothing here is interpreted", allow_module_level=True)


def _pytest(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "CAREF_KERNELS_COMMIT": "c" * 40}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=variables)


def test_no_device_is_an_error_with_its_reason(tmp_path):
    done = _pytest("-m", "gpu", "tests/gpu", "--gpucheck", tmp_path / "report.json")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--gpucheck: no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_rehearsal_passes_and_every_fault_is_noticed(tmp_path):
    """All tests of tests/gpu on a fake device."""
    reason = backends.get("cpu").unsupported(torch.empty(1, 2))
    if reason is not None:
        pytest.skip(reason)
    path = tmp_path / "report.json"
    done = _pytest("-n", "2", "--dist", "loadgroup", "--fake-device", "--gpucheck", path, "tests/gpu")
    assert done.returncode == 0, done.stdout[-3000:]
    written = json.loads(path.read_text())
    assert set(written["summary"]) == {"passed", "skipped"}
    assert written["provenance"]["commit"] == "c" * 40
    names = [test["test"] for test in written["tests"] if test["outcome"] == "passed"]
    assert {fault for fault in faults.BY_NAME if any(fault in name for name in names)} == set(faults.BY_NAME)
    skipped = {test["test"].split("::")[1].split("[")[0] for test in written["tests"] if test["outcome"] == "skipped"}
    assert skipped == {"test_second_device", "test_sanitizer_reports_nothing", "test_fault_in_a_kernel_is_noticed"}
    assert str(ROOT) not in path.read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_marked_tests_are_those_of_a_device():
    listed = _pytest("-m", "gpu", "--collect-only", "tests/test_determinism.py", "tests/test_on_cuda.py", "tests/gpu")
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    assert {name.split("::")[0].split("/")[-2] for name in names} == {"tests", "gpu"}
    assert any("test_results_are_identical_run_to_run[triton]" in name for name in names)
    assert not [name for name in names if "[cpu" in name or "emulated" in name or "reference" in name]


def test_a_fault_is_noticed_by_an_assertion_alone():
    """Not by a test that passes, nor by an error of the test itself, which would notice everything."""
    item = SimpleNamespace(callspec=SimpleNamespace(params={"fault": "Noisy"}))

    def outcome(error: Exception | None):
        hook = gpu_conftest.pytest_pyfunc_call(item)
        next(hook)
        try:
            hook.send(None) if error is None else hook.throw(error)
        except StopIteration as end:
            return end.value

    assert outcome(AssertionError("differs")) is True
    with pytest.raises(pytest.fail.Exception, match="the injected fault Noisy was not noticed"):
        outcome(None)
    with pytest.raises(TypeError):
        outcome(TypeError("of the test"))


# ------------------------------------------------------------------------------------------------------- the report

CONFTEST = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from gpu import report
def pytest_configure(config):
    config.pluginmanager.register(report.LostDevice())
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(report.Report(Path("report.json"), {{}}))
"""
SUITE = """
import os, pytest, time, torch
def test_passes(): pass
def test_fails(): assert 1 == 2, "in " + {root!r} + "x" * 1000
def test_skips(): pytest.skip("too small")
def test_dies(): os._exit(9)
def test_loses_the_device():
    def lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), lost
def test_after_the_loss():
    assert not torch.cuda.is_initialized()
def test_fails_at_its_end(request): request.addfinalizer(lambda: 1 / 0)
"""


def _suite(folder: Path, text: str, *arguments: object) -> tuple[int, dict]:
    (folder / "conftest.py").write_text(CONFTEST.format(tests=str(ROOT / "tests")))
    (folder / "test_odd.py").write_text(text)
    done = _pytest(*arguments, cwd=folder)
    return done.returncode, json.loads((folder / "report.json").read_text())


def test_outcomes(tmp_path):
    """A test whose process dies, or that breaks the device, has failed; the others run in a new process."""
    code, written = _suite(tmp_path, SUITE.format(root=str(ROOT)), "-n", "1")
    tests = {test["test"].split("::")[1]: test for test in written["tests"]}
    assert code == 1
    assert written["summary"] == {"passed": 2, "failed": 4, "skipped": 1}
    assert {name for name, test in tests.items() if test["outcome"] == "failed"} == {
        "test_fails", "test_dies", "test_loses_the_device", "test_fails_at_its_end",
    }  # fmt: skip
    assert len(tests["test_fails"]["detail"]) == report.MOST_CHARACTERS
    assert "crashed" in tests["test_dies"]["detail"]
    assert written["files"][0] == {
        "file": "test_odd.py",
        **written["summary"],
        "seconds": written["files"][0]["seconds"],
    }
    assert str(ROOT) not in (tmp_path / "report.json").read_text()


def test_no_test_that_passes_is_a_failure(tmp_path):
    code, written = _suite(tmp_path, "import pytest\ndef test_skips(): pytest.skip('no GPU')\n")
    assert (code, written["summary"]) == (1, {"skipped": 1})


def test_a_run_that_is_killed_leaves_its_outcomes(tmp_path):
    text = "import time\ndef test_first(): time.sleep(1.1)\ndef test_hangs(): time.sleep(600)\n"
    (tmp_path / "conftest.py").write_text(CONFTEST.format(tests=str(ROOT / "tests")))
    (tmp_path / "test_odd.py").write_text(text)
    path, end = tmp_path / "report.json", time.monotonic() + 120
    running = subprocess.Popen([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (path.is_file() and "passed" in path.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    running.kill()
    running.wait()
    assert json.loads(path.read_text())["summary"] == {"passed": 1, "not run": 1}


def test_tests_after_the_time_limit_are_not_run(tmp_path):
    pytest.importorskip("pytest_timeout")
    text = "import pytest, time\n@pytest.mark.parametrize('n', range(9))\ndef test_slow(n): time.sleep(1)\n"
    code, written = _suite(tmp_path, text, "-n", "1", "--timeout", "20", "--session-timeout", "2")
    assert code != 0
    assert written["summary"]["passed"] >= 1
    assert written["summary"]["not run"] >= 3


# -------------------------------------------------------------------------------------------------------- guard zones


@pytest.mark.parametrize("offset", [-1, 0, GUARD_BYTES // 4 - 1])
def test_a_write_outside_an_output_is_found(offset):
    def write():
        with GuardZones().watch():
            out = torch.empty(10, dtype=torch.float32)
            place = out.storage_offset() + (10 + offset if offset >= 0 else offset)
            torch.as_strided(out, (1,), (1,), place).fill_(1)

    with pytest.raises(AssertionError, match="4 bytes .* of 40 bytes were overwritten"):
        write()


def test_fresh_memory_is_nan_and_constants_are_guarded():
    original, zones = torch.empty, GuardZones()
    values = torch.arange(12.0).view(3, 4)
    constant = zones.constant(values)
    assert torch.equal(constant, values)
    assert constant.is_contiguous()
    assert constant._base is None
    with zones.watch():
        assert torch.empty(2, 3, dtype=torch.bfloat16).isnan().all()
        assert torch.empty((4,), dtype=torch.float64).shape == (4,)
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.empty(0).numel() == 0
        assert torch.as_strided(constant, (13,), (1,), constant.storage_offset())[12] > 1e15
    assert torch.empty is original
    constant = zones.constant(values)
    with pytest.raises(AssertionError, match=r"an input of shape \(3, 4\) was changed"), zones.watch():
        constant[1, 1] = -5
    with pytest.raises(KeyError, match="inside"), zones.watch():
        raise KeyError("inside")
    assert torch.empty is original


# ---------------------------------------------------------------------------------------------------------- sanitizer


@pytest.mark.parametrize(
    ("code", "output", "message"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", ""),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", ""),
        (99, "=========     at row_kernel+0x1 in f.py:3\n========= ERROR SUMMARY: 2 errors", "at row_kernel"),
        (99, "========= ERROR SUMMARY: 0 errors", "exit status 99"),
        (1, "========= Error: Device not supported", "no summary"),
        (0, "nothing", "no summary"),
    ],
)
def test_output_of_the_sanitizer(code, output, message):
    found = sanitizer.errors(code, output)
    assert message in found
    assert bool(found) == bool(message)


def test_sanitizer_must_report_an_injected_fault(monkeypatch, tmp_path):
    fakes = {name: tmp_path / name for name in ("compute-sanitizer", "nvcc")}
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(fakes[name]) if name in fakes else None)
    fakes["nvcc"].write_text("#!/bin/sh\nexit 0\n")
    for said, code, message in (
        ("Error: Device not supported", 1, "Device not supported"),
        ("ERROR SUMMARY: 0 errors", 0, "was not reported"),
        ("Invalid __global__ write", 0, "was not reported"),
        ("Invalid __global__ write", 99, ""),
    ):
        fakes["compute-sanitizer"].write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
        for fake in fakes.values():
            fake.chmod(0o755)
        assert message in (sanitizer.unusable(tmp_path) or "")
    del fakes["compute-sanitizer"]
    assert sanitizer.unusable(tmp_path) == "compute-sanitizer is not installed"


@pytest.mark.skipif(cuda_emulated.compiler() is None, reason="no C++ compiler")
def test_calls_under_the_sanitizer_run(monkeypatch):
    """On the emulated device, which like a GPU yields NaN for a label out of range; every fifth call."""
    sanitizer.calls(Target(cuda_emulated.NAME, cuda_emulated.NAME, "cpu", small=True))
    monkeypatch.setitem(backends._BACKENDS, "faulty", faults.StrayWrite(cuda_emulated.BACKEND))
    with pytest.raises(AssertionError, match="were overwritten"):
        sanitizer.calls(Target("faulty", cuda_emulated.NAME, "cpu", small=True))
