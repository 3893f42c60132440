"""The benchmarks that are meant for a GPU, tried on the CPU: peers, heads, steps, processes, reports, plots."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import cuda_device
import pytest
import torch
from torch.nn import functional

from benchmarks import (
    cases,
    isolated,
    measure_gpu,
    measure_heads_gpu,
    measure_step,
    peers,
    providers,
    report_gpu,
    step_models,
)
from benchmarks.linear_cases import HeadCase
from benchmarks.providers import GPU_PROVIDERS, PEERS, Provider, expectation, verify
from caref_kernels import TopK, backends

ROOT = Path(__file__).parents[1]
TINY_HEAD = HeadCase("tiny", 24, 300, 16)


@pytest.fixture
def in_process(monkeypatch):
    """Cases measured here instead of in processes of their own."""

    def run_cases(module, names, arguments, _budget, _limit, done, _environment=None):
        for name in names:
            part = Path(arguments[-1]).parent / "part.json"
            sys.modules[module].main(["--worker", name, "--part", str(part), *arguments[:-1]])
            done(name, json.loads(part.read_text()))
        return {}

    return run_cases


def _main(module, in_process, monkeypatch, tmp_path, *arguments):
    output = tmp_path / "results.json"

    def run_cases(name, names, extra, *rest):
        return in_process(name, names, [*extra, str(output)], *rest)

    monkeypatch.setattr(measure_gpu, "run_cases", run_cases)
    module.main(["--device", "cpu", "--seconds", "0", "--output", str(output), *arguments])
    assert not list(tmp_path.glob("*.partial"))
    return json.loads(output.read_text())


def test_the_loss_on_the_cpu(in_process, tmp_path, capsys, monkeypatch):
    """Everything but the device: which providers are absent and why, rows, units, the file, the README's block."""
    kept = tuple(one for one in GPU_PROVIDERS if "compiled" not in one.name)
    monkeypatch.setattr(measure_gpu, "GPU_PROVIDERS", kept)
    results = _main(measure_gpu, in_process, monkeypatch, tmp_path, "--rows", "2", "--cases", "flan-t5")
    rows = [measure_gpu.GpuRow(**row) for row in results["rows"]]
    phases = {(row.provider, row.phase) for row in rows}
    names = ("cross-entropy", "eager", "eager-topk")
    assert phases == {("copy", "both")} | {(name, phase) for name in names for phase in measure_gpu.PHASES}
    own = {f"{name}{kind}" for name in ("triton",) for kind in ("", "-inplace", "-ce", "-ce-inplace", "-topk")}
    assert own | {one.name for one in PEERS} <= set(results["absent"]["flan-t5"])
    by_phase = {(row.provider, row.phase): row for row in rows}
    assert by_phase["copy", "both"].percent_of_copy == 100
    both = by_phase["eager", "both"]
    assert both.gigabytes_per_second == pytest.approx(3 * 2 * 32_128 * 2 / both.p50_ms / 1e6, rel=1e-2)
    assert results["provenance"]["peers"].keys() == set(peers.DISTRIBUTIONS.values())
    assert "eager" in capsys.readouterr().out
    block = report_gpu.loss_block(results, "another hash")
    assert report_gpu.STALE.format(command="make bench-gpu") in block
    assert f"| {results['absent']['flan-t5']['liger']}" not in block
    assert f"- liger: {results['absent']['flan-t5']['liger']}" in block
    assert "Stale" not in report_gpu.loss_block(results, results["provenance"]["source_sha256"])


@pytest.mark.parametrize("module", [measure_gpu, measure_heads_gpu, measure_step])
def test_without_a_gpu_nothing_is_measured(module):
    if cuda_device.missing() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device; nothing was measured"):
        module.main(["--device", "cuda"])


def test_a_row_without_machine_or_commit_is_rejected():
    for row in (measure_gpu.GpuRow, measure_heads_gpu.HeadGpuRow, measure_step.StepRow):
        fields = {field.name: 1 for field in dataclasses.fields(row)} | {"machine": "m", "commit": "c"}
        assert row(**fields).commit == "c"
        for name in ("machine", "commit"):
            with pytest.raises(ValueError, match="must not be empty"):
                row(**(fields | {name: ""}))


# ------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("package", sorted(peers.DISTRIBUTIONS))
def test_a_peer_runs_or_is_named_as_missing(package, monkeypatch):
    reason = peers.missing(package)
    assert reason is None or peers.DISTRIBUTIONS[package] in reason
    if package == "torch":
        monkeypatch.delattr(functional, "linear_cross_entropy")
        assert "does not have it" in peers.missing(package)
    else:
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
        assert peers.missing(package) == f"{peers.DISTRIBUTIONS[package]} is not installed"


def test_a_peer_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    assert peers.missing("quack").startswith("quack-kernels cannot be imported: ModuleNotFoundError: ")


def _module(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_peers_are_called_as_they_are_documented(monkeypatch):
    """Stand-ins with the signatures of the versions that peers.py names; what they get is what they should."""
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8)
    labels = torch.arange(6)
    expected = functional.cross_entropy(hidden @ weight.t(), labels)

    def rows(logits, target, ignore_index=-100, reduction="mean", inplace_backward=False):
        return functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    def head(e, c, targets, impl="cce", chunk_size=4096):
        assert e.shape == (6, 8)
        assert c.shape == (11, 8)
        return functional.cross_entropy(e @ c.t(), targets)

    class Function:
        @staticmethod
        def apply(*arguments):
            """The nine arguments of trl 1.16's ChunkedLogProbFunction."""
            e, c, bias, targets, temperature, chunk_size, softcap, scale, outputs = arguments
            assert (bias, temperature, softcap, scale, outputs) == (None, 1.0, None, 1.0, ())
            assert chunk_size > 0
            return (e @ c.t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0], None, None, None, None

    functions = {"liger_cross_entropy": rows, "liger_fused_linear_cross_entropy": head}
    _module(monkeypatch, "liger_kernel.transformers.functional", **functions)
    _module(monkeypatch, "quack.cross_entropy", cross_entropy=rows)
    _module(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=head)
    _module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=head)
    _module(monkeypatch, "trl.kernels", ChunkedLogProbFunction=Function)
    for name in ("liger_rows", "quack_rows", "quack_rows_inplace"):
        assert torch.allclose(getattr(peers, name)(hidden @ weight.t(), labels), expected), name
    for name in ("liger_head", "cut_head", "cut_head_exact", "trl_head", "quack_head", "torch_head"):
        assert torch.allclose(getattr(peers, name)(hidden, weight, labels), expected), name


def test_a_peer_may_be_imprecise_but_not_wrong():
    logits, labels = cases.Case("small", 8, 300, torch.bfloat16).tensors()
    expected = expectation(logits, labels)
    rough = Provider("rough", "", lambda z, y: functional.cross_entropy(z, y), "ce", package="torch")
    assert verify(rough, logits, labels, expected).loss > 1e-5
    own = dataclasses.replace(rough, package=None)
    with pytest.raises(AssertionError, match="rough"):
        verify(own, logits, labels, expected)
    for wrong_loss in (
        lambda z, y: functional.cross_entropy(z.float(), y) + 0.5,
        lambda z, y: functional.cross_entropy(z.float(), y) + 0.1 * (z - z.detach()).float().sum(),
    ):
        with pytest.raises(AssertionError, match="identity peer"):
            verify(dataclasses.replace(rough, loss=wrong_loss), logits, labels, expected)


def test_a_masked_contestant_is_held_to_the_masked_loss():
    logits, labels = cases.Case("small", 8, 300, torch.float32).tensors()
    expected = expectation(logits, labels)
    masked = next(one for one in providers._of_backend("cpu") if one.sparsity is not None)
    verify(masked, logits, labels, expected)
    with pytest.raises(AssertionError, match="cpu-topk"):
        verify(dataclasses.replace(masked, sparsity=TopK(1)), logits, labels, expected)


def test_contestants_that_fail_are_absent_with_their_reason():
    reasons = {
        "missing": lambda: "x is not installed",
        "fine": lambda: None,
        "wrong": lambda: _raise(AssertionError("off by 0.1")),
        "broken": lambda: _raise(TypeError("unexpected argument")),
        "large": lambda: _raise(torch.cuda.OutOfMemoryError("2 GiB")),
    }
    running, absent = measure_gpu.contestants(
        [types.SimpleNamespace(name=name) for name in reasons], lambda one: reasons[one.name]()
    )
    assert [one.name for one in running] == ["fine"]
    assert absent == {
        "missing": "x is not installed",
        "wrong": "does not pass verification: off by 0.1",
        "broken": "TypeError: unexpected argument",
        "large": "out of memory",
    }
    with pytest.raises(RuntimeError, match="CUDA error"):
        measure_gpu.contestants(running, lambda one: _raise(RuntimeError("CUDA error: illegal address")))


def _raise(error):
    raise error


def test_backends_of_gpus_are_found_by_name():
    expected = [name for name in backends.ORDER if name not in ("cpu", "reference")]
    assert list(dict.fromkeys(one.backend for one in GPU_PROVIDERS if one.backend)) == expected
    assert len({one.name for one in GPU_PROVIDERS}) == len(GPU_PROVIDERS)


# ------------------------------------------------------------------------------------------------------------- heads


def test_heads_on_the_cpu(in_process, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure_heads_gpu, "CASES", (TINY_HEAD, dataclasses.replace(TINY_HEAD, name="f", frozen=True)))
    results = _main(measure_heads_gpu, in_process, monkeypatch, tmp_path)
    rows = [measure_heads_gpu.HeadGpuRow(**row) for row in results["rows"]]
    for case in ("tiny", "f"):
        ran = {row.provider for row in rows if row.case == case}
        assert {"eager", "logits", "fused", "fused-ce", "cross-entropy"} <= ran
        assert ran | set(results["absent"][case]) == {one.name for one in measure_heads_gpu.CONTESTANTS}
        assert set(results["errors"][case]["fused"]) == {"loss", "gradient of hidden", "gradient of weight"} - (
            {"gradient of weight"} if case == "f" else set()
        )
    both = next(row for row in rows if (row.case, row.provider, row.phase) == ("f", "fused", "both"))
    assert both.teraflops == pytest.approx(2 * 2 * 24 * 300 * 16 / both.p50_ms / 1e9, rel=1e-2)
    assert "TFLOP/s" in capsys.readouterr().out
    assert "| fused | " in report_gpu.heads_block(results, "")


def test_a_head_that_is_wrong_is_not_timed(monkeypatch):
    wrong = measure_heads_gpu.Contestant(
        "wrong", "", lambda hidden, weight, labels: 1.1 * functional.cross_entropy(hidden @ weight.t(), labels), "ce"
    )
    monkeypatch.setattr(measure_heads_gpu, "CONTESTANTS", (measure_heads_gpu.CONTESTANTS[0], wrong))
    measured = measure_heads_gpu.measure_case(TINY_HEAD, torch.device("cpu"), 0.0)
    assert measured["absent"]["wrong"].startswith("does not pass verification: wrong")
    assert {row["provider"] for row in measured["rows"]} == {"eager"}


# ------------------------------------------------------------------------------------------------------------- steps


def _tiny_steps():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32_128}
    return step_models.StepCase("tiny-t5", "t5", shape, 2, 4, 6, torch.float32, None)


def test_a_step_with_each_loss(tmp_path):
    """The losses that are one objective agree, every loss trains, and the table shows them."""
    pytest.importorskip("transformers")
    case = _tiny_steps()
    options = measure_step._parser().parse_args(["--seconds", "0"])
    measured = measure_step._time_part(case, torch.device("cpu"), options)
    assert measured["times"].keys() == step_models.LOSSES.keys() == measured["losses"].keys()
    assert measured["losses"]["cross-entropy"] < measured["losses"]["eager"]
    memory = {"peaks": dict.fromkeys(step_models.LOSSES, 2**20), "largest": {"fused": [9, 2**19]}}
    limited = dataclasses.replace(case, limit=2**30)
    rows = measure_step._rows(measured["provenance"], limited, {"time": measured, "memory": memory})
    assert [row.loss for row in rows] == list(step_models.LOSSES)
    assert {row.loss: row.largest_batch for row in rows}["fused"] == 9
    results = {"date": "2026-01-01", "provenance": measured["provenance"], "cases": {case.name: case.title}}
    results |= {"rows": [dataclasses.asdict(row) for row in rows], "left_out": {"smollm2/memory": "stopped after 9 s"}}
    block = report_gpu.step_block(results, "", "make bench")
    assert "largest batch within 1 GiB" in block
    assert "smollm2/memory: stopped after 9 s." in block
    assert "tiny-t5" in "\n".join(measure_step.table(results))


def test_every_step_changes_the_model():
    pytest.importorskip("transformers")
    step = step_models.Step(_tiny_steps(), torch.device("cpu"))
    batch = step.case.make_batch(2, torch.device("cpu"))
    weight = step.model.lm_head.weight
    for name in step_models.LOSSES:
        before = weight.detach().clone()
        with step_models.step_loss(name, step.model) as loss:
            assert torch.isfinite(step.run(loss, batch))
        assert not torch.equal(weight, before), name
        assert weight.grad is None


@pytest.mark.parametrize(("slope", "fixed", "limit"), [(100, 1000, 5000), (1, 0, 77), (10, 0, 10_000)])
def test_the_largest_batch_is_found(slope, fixed, limit):
    tried = []

    def peak(size):
        tried.append(size)
        return None if slope * size > 2 * limit else fixed + slope * size

    found, found_peak = step_models.largest_batch(peak, 2, limit)
    exact = (limit - fixed) // slope
    assert found <= exact <= found + max(1, found // 16)
    assert found_peak == fixed + slope * found <= limit
    assert max(tried) <= 2 * exact
    with pytest.raises(ValueError, match="a batch of 2 does not fit"):
        step_models.largest_batch(peak, 2, fixed)


# --------------------------------------------------------------------------------------------------------- processes

CHILD = """
import argparse, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--worker")
parser.add_argument("--part", type=Path)
options = parser.parse_args()
if options.worker == "slow":
    time.sleep(60)
if options.worker == "dies":
    os.kill(os.getpid(), 9)
if options.worker == "raises":
    sys.exit("no such luck")
if options.worker != "silent":
    options.part.write_text(json.dumps({"name": options.worker}))
"""


def test_a_case_that_breaks_costs_itself(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(isolated, "ROOT", tmp_path)
    parts = {}
    names = ("fine", "dies", "raises", "silent", "slow", "after")
    left_out = isolated.run_cases("child", names, [], 60.0, 3.0, parts.__setitem__)
    assert parts == {"fine": {"name": "fine"}, "after": {"name": "after"}}
    assert left_out["dies"].startswith("signal 9")
    assert "no such luck" in left_out["raises"]
    assert left_out["silent"] == "no result"
    assert left_out["slow"] == "stopped after 3 s"
    assert isolated.run_cases("child", ["fine"], [], 1.0, 3.0, parts.__setitem__) == {
        "fine": "left out: 1 s of the budget were left"
    }


def test_commands_say_what_they_take():
    for module in ("measure_gpu", "measure_heads_gpu", "measure_step"):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        assert "--budget" in done.stdout
        assert "--worker" not in done.stdout
