"""The benchmarks' own machinery: what is verified, how it is sampled, what a results file holds."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, implementations, isolated, measure, peers, provenance, sampling, sources
from benchmarks.cases import Case, HeadCase, by_name
from benchmarks.implementations import HEADS, LOSSES, SPARSE_LOSSES, Implementation, eager_loss
from benchmarks.results_file import Results, load
from benchmarks.workspaces import HeadWorkspace, LossWorkspace
from caref_kernels import TopK

SMALL = Case("small", 8, 300)
SMALL_HEAD = HeadCase("small", 40, 300, 16)
# torch.compile is left to the benchmark itself, which verifies it too: here it would cost more than all the rest.
CHECKED = [one for one in (*LOSSES, *SPARSE_LOSSES) if one.name != "compiled"]


def _runnable(workspace, one: Implementation) -> Implementation:
    reason = workspace.missing(one)
    if reason:
        pytest.skip(reason)
    return one


# ------------------------------------------------------------------------------------------------------- verification


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def workspace(request: pytest.FixtureRequest) -> LossWorkspace:
    return LossWorkspace(dataclasses.replace(SMALL, dtype=request.param))


@pytest.mark.parametrize("one", CHECKED, ids=lambda one: one.name)
def test_implementations_compute_what_they_are_timed_for(workspace, one: Implementation) -> None:
    errors = workspace.verify(_runnable(workspace, one))
    assert errors.keys() == ({"loss", "gradient"} if one.loss else set())


@pytest.mark.parametrize("backend", [None, "reference"], ids=["torch", "own backend"])
def test_verification_rejects_a_wrong_loss_and_a_wrong_gradient(workspace, backend: str | None) -> None:
    for loss in (
        lambda z, y: eager_loss(z, y) + 1e-3,
        lambda z, y: eager_loss(z, y) + 0.1 * (z - z.detach()).float().sum(),
    ):
        with pytest.raises(AssertionError, match="mutant"):
            workspace.verify(Implementation("mutant", "", loss, backend=backend))


def test_a_masked_loss_is_compared_with_the_masked_oracle(workspace) -> None:
    masked = next(one for one in implementations.of_backend("cpu") if one.sparsity is not None)
    workspace.verify(_runnable(workspace, masked))
    with pytest.raises(AssertionError, match="cpu-topk"):
        workspace.verify(dataclasses.replace(masked, sparsity=TopK(1)))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_heads_compute_what_they_are_timed_for(frozen: bool) -> None:
    workspace = HeadWorkspace(dataclasses.replace(SMALL_HEAD, frozen=frozen))
    for one in HEADS:
        errors = workspace.verify(one)
        assert errors.keys() == {"loss", "gradient of hidden"} | (set() if frozen else {"gradient of weight"})
        calls = workspace.calls(one)
        assert len(calls.backward(None, calls.forward(None))) == (1 if frozen else 2)
    wrong = Implementation("wrong", "", lambda hidden, weight, labels: (hidden @ weight.t()).mean())
    with pytest.raises(AssertionError, match="small, wrong"):
        workspace.verify(wrong)


# ----------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("one", [one for one in LOSSES if one.name != "compiled"], ids=lambda one: one.name)
def test_every_repetition_starts_from_the_same_logits(one: Implementation) -> None:
    workspace = LossWorkspace(SMALL)
    calls = workspace.calls(_runnable(workspace, one))
    losses = []
    for _ in range(2):
        sampling.Clock(torch.device("cpu")).time(calls)
        losses.append(calls.forward(calls.prepare()).detach().clone())
    assert torch.equal(*losses)
    assert torch.equal(workspace.refresh(), workspace.values)


def test_interleaving_samples_every_implementation() -> None:
    workspace, clock = LossWorkspace(SMALL), sampling.Clock(torch.device("cpu"))
    repeat = {one.name: lambda one=one: clock.time(workspace.calls(one)) for one in LOSSES[:3]}
    samples = sampling.interleave(repeat, dict.fromkeys(repeat, 1e-3), seconds=0.0)
    assert samples.keys() == {"copy", "cross-entropy", "eager"}
    assert all(len(one) >= sampling.LEAST_ROUNDS for one in samples.values())
    assert all(sample.call == sample.both == sample.forward + sample.backward > 0 for sample in samples["eager"])
    assert sampling.interleave({}, {}, seconds=1.0) == {}


def test_schedule_repeats_fast_calls_and_mixes_the_order() -> None:
    order = list(sampling.schedule({"slow": 1.0, "middle": 0.3, "fast": 0.001}, seconds=20.0))
    most = sampling.MOST_PER_ROUND
    rounds = int(20.0 / (1.0 + 3 * 0.3 + most * 0.001))
    assert [order.count(name) for name in ("slow", "middle", "fast")] == [rounds, 3 * rounds, most * rounds]
    every_round = [order[start : start + 4 + most] for start in range(0, len(order), 4 + most)]
    assert all(one.count("slow") == 1 for one in every_round)
    assert len({tuple(one) for one in every_round}) > 1
    assert len(list(sampling.schedule({"slow": 100.0}, seconds=1.0))) == sampling.LEAST_ROUNDS


def test_percentiles_and_the_fields_of_a_row() -> None:
    values = [float(value) for value in range(101)]
    random.Random(0).shuffle(values)
    assert sampling.percentiles_ms(values) == pytest.approx([20e3, 50e3, 80e3])
    with pytest.raises(ValueError, match="at least 2 values; got 1"):
        sampling.percentiles_ms([1.0])
    samples = [sampling.Sample(1.0, 2.0, 3.5, faults) for faults in (9, 1, 5)]
    row = sampling.times(samples, ("forward", "both", "call"))
    assert row == {
        "samples": 3,
        "page_faults": 5,
        "forward_ms": [1e3] * 3,
        "both_ms": [3e3] * 3,
        "call_ms": [3.5e3] * 3,
    }


MEMORY_SCRIPT = """
import json, sys, torch
from benchmarks.cases import Case
from benchmarks.implementations import LOSSES
from benchmarks.sampling import Clock
from benchmarks.workspaces import LossWorkspace
workspace, clock = LossWorkspace(Case("memory", 64, 32_768)), Clock(torch.device("cpu"))
chosen = [one for one in LOSSES if one.name in sys.argv[1:]]
json.dump({one.name: clock.extra_memory(workspace.calls(one)) for one in chosen}, sys.stdout)
"""


def test_the_fused_loss_needs_the_gradient_and_in_place_nothing() -> None:
    workspace = LossWorkspace(SMALL)
    for one in LOSSES:
        if one.name in ("cpu", "cpu-inplace"):
            _runnable(workspace, one)
    command = [sys.executable, "-c", MEMORY_SCRIPT, "copy", "cross-entropy", "cpu", "cpu-inplace"]
    environment = measure.worker_environment("memory", dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=sources.ROOT, capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr:
        pytest.skip("this kernel does not let a process reset the peak of its resident set")
    extra = json.loads(done.stdout)
    logits, slack = 64 * 32_768 * 4, 2**20
    assert extra["copy"] < slack
    assert extra["cpu-inplace"] < slack
    assert logits <= extra["cpu"] < logits + slack
    assert extra["cross-entropy"] > 2 * logits


# -------------------------------------------------------------------------------------------------- cases and origins


def test_cases_by_name_and_shape_by_title() -> None:
    assert by_name([], cases.CASES) == cases.CASES
    for suite in measure.SUITES.values():
        assert [one.name for one in by_name([suite.cases[1].name], suite.cases)] == [suite.cases[1].name]
        assert len({one.name for one in suite.implementations}) == len(suite.implementations)
        with pytest.raises(ValueError, match=f"cases must be among {suite.cases[0].name}, .*; got gpt-9"):
            by_name(["gpt-9"], suite.cases)
    for case in (*cases.CASES, *cases.GPU_CASES, *cases.HEAD_CASES):
        assert cases.shape_of(case.title) == (case.rows, case.vocab, str(case.dtype).removeprefix("torch."))
        assert cases.logits_bytes(case.title) == case.logits_bytes
    with pytest.raises(ValueError, match="the title of a case must be like"):
        cases.shape_of("llama-3")


def test_gpu_cases_repeat_drawn_rows() -> None:
    """On a device the drawn rows are repeated; meta stands for it."""
    logits, labels = Case("wide", 130, 40).tensors("meta")
    assert (logits.shape, labels.shape) == ((130, 40), (130,))
    assert logits.device.type == labels.device.type == "meta"


def test_the_source_hash_follows_kernels_and_build_but_not_documents(tmp_path: Path) -> None:
    measured = ("setup.py", "csrc/cpu/forward.cpp", "caref_kernels/ops.py", "caref_kernels/backends/cpu.py")
    for name in (*measured, "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    hashes = [sources.source_hash(tmp_path)]
    gpu = sources.source_hash(tmp_path, "gpu")
    for name in measured:
        (tmp_path / name).write_text(f"{name} changed")
        hashes.append(sources.source_hash(tmp_path))
    (tmp_path / "csrc/cpu/new.h").touch()
    hashes.append(sources.source_hash(tmp_path))
    assert len(set(hashes)) == len(hashes)
    (tmp_path / "README.md").write_text("changed")
    for name in ("csrc/cuda/forward.cu", "caref_kernels/backends/triton/forward.py"):
        changed = sources.source_hash(tmp_path, "gpu")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        assert sources.source_hash(tmp_path, "gpu") not in (changed, gpu)
    # each kind of kernel has results of its own
    assert sources.source_hash(tmp_path) == hashes[-1]


def test_the_processor_is_named_from_its_first_entry(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: One CPU\ncpu family\t: 6\nmodel\t\t: 7\n\nmodel name\t: Two\n")
    assert provenance.cpu_model(cpuinfo) == "One CPU (6-7)"
    assert provenance.cpu_model(tmp_path / "missing")


def test_a_part_owns_the_settings_of_the_allocator() -> None:
    inherited = {"PATH": "p", "MALLOC_ARENA_MAX": "1", "LD_PRELOAD": "other.so", "GLIBC_TUNABLES": "t"}
    assert measure.worker_environment("time-default", inherited) == {"PATH": "p"}
    raised = measure.worker_environment("time", inherited)
    assert raised.keys() == {"PATH", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    # Above every tensor of every case, also the float32 temporaries of 16-bit logits.
    assert int(raised["MALLOC_MMAP_THRESHOLD_"]) > max(4 * case.rows * case.vocab for case in cases.CASES)


# ------------------------------------------------------------------------------------------------------- results files


def _part(case: str, implementation: str, **fields) -> dict:
    row = {"case": case, "implementation": implementation, **fields}
    return {"provenance": {"machine": "m", "commit": "c"}, "cases": {case: case}, "absent": {}, "rows": [row]}


def test_a_results_file_has_a_record_per_line(tmp_path: Path) -> None:
    results = Results("2026-01-01")
    results.add(_part("a", "cpu", both_ms=[1.0, 2.0, 3.0]))
    results.add(_part("a", "eager", both_ms=[4.0, 5.0, 6.0]))
    results.add(_part("a", "cpu", extra_bytes=7))
    assert results.of("a")["cpu"] == {
        "case": "a", "implementation": "cpu", "both_ms": [1.0, 2.0, 3.0], "extra_bytes": 7,
    }  # fmt: skip
    path = tmp_path / "new" / "results.json"
    results.write(path)
    assert [path.name for path in path.parent.iterdir()] == ["results.json"]
    assert load(path) == results
    before = path.read_text().splitlines()
    results.of("a")["eager"]["both_ms"] = [4.0, 5.5, 6.0]
    assert sum(one != other for one, other in zip(before, results.text().splitlines(), strict=True)) == 1
    assert load(tmp_path / "missing.json") is None
    path.write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="must have schema"):
        load(path)


def test_results_without_machine_or_commit_are_rejected(tmp_path: Path) -> None:
    for name in ("machine", "commit"):
        results = Results("2026-01-01")
        results.add(_part("a", "cpu"))
        results.provenance[name] = ""
        with pytest.raises(ValueError, match=f"{name} must not be empty"):
            results.write(tmp_path / "results.json")


def test_a_record_belongs_to_a_case_and_occurs_once() -> None:
    results = Results("2026-01-01")
    results.add(_part("a", "cpu"))
    results.check()
    for rows, known in ((2 * results.rows, results.cases), (results.rows, {})):
        with pytest.raises(ValueError, match="must belong to a case and occur once"):
            dataclasses.replace(results, rows=rows, cases=known).check()


# ----------------------------------------------------------------------------------------------------------- processes

CHILD = """
import argparse, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("what")
parser.add_argument("--part", type=Path)
options = parser.parse_args()
if options.what == "slow":
    time.sleep(60)
if options.what == "dies":
    os.kill(os.getpid(), 9)
if options.what == "raises":
    sys.exit("no such luck")
if options.what != "silent":
    options.part.write_text(json.dumps({"name": options.what}))
"""


def test_a_process_that_breaks_costs_itself(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(isolated, "ROOT", tmp_path)
    limits = isolated.Limits(60.0, 3.0)
    found = {what: isolated.run("child", [what], limits) for what in ("fine", "dies", "raises", "silent", "slow")}
    assert found.pop("fine") == ({"name": "fine"}, None)
    assert all(part is None for part, _ in found.values())
    assert found["dies"][1].startswith("signal 9")
    assert "no such luck" in found["raises"][1]
    assert found["silent"][1] == "no result"
    assert found["slow"][1] == "stopped after 3 s"
    assert isolated.run("child", ["fine"], isolated.Limits(1.9, 3.0)) == (None, "left out: 2 s were left")


def test_candidates_that_fail_are_absent_with_their_reason():
    def fail(error):
        raise error

    reasons = {
        "missing": lambda: "x is not installed",
        "fine": lambda: None,
        "wrong": lambda: fail(AssertionError("off by 0.1")),
        "broken": lambda: fail(TypeError("unexpected argument")),
        "large": lambda: fail(torch.cuda.OutOfMemoryError("2 GiB")),
    }
    candidates = tuple(Implementation(name, "", None) for name in reasons)
    running, absent = measure.runnable(candidates, lambda one: reasons[one.name]())
    assert [one.name for one in running] == ["fine"]
    assert absent == {
        "missing": "x is not installed",
        "wrong": "does not pass verification: off by 0.1",
        "broken": "TypeError: unexpected argument",
        "large": "out of memory",
    }
    with pytest.raises(RuntimeError, match="CUDA error"):
        measure.runnable(running, lambda one: fail(RuntimeError("CUDA error: illegal address")))


# --------------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("package", sorted(peers.DISTRIBUTIONS))
def test_a_peer_runs_or_is_named_as_missing(package, monkeypatch):
    reason = peers.missing(package)
    assert reason is None or peers.DISTRIBUTIONS[package] in reason
    if package == "torch":
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
        assert "does not have it" in peers.missing(package)
    else:
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
        assert peers.missing(package) == f"{peers.DISTRIBUTIONS[package]} is not installed"
