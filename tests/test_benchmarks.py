"""The benchmarks' own machinery: what is verified, how it is sampled, what a row carries, what the README may say."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, measure_sparse, plots, provenance, report, sampling
from benchmarks.cases import CASES, Case, by_name
from benchmarks.providers import PROVIDERS, Provider, eager_loss, expectation, verify
from caref_kernels import backends

SMALL = Case("small", 8, 300)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
# torch.compile is left to the benchmark itself, which verifies it too: here it would cost more than all the rest.
CHECKED = [name for name in BY_NAME if name not in ("copy", "compiled")]


def _runnable(name: str) -> Provider:
    provider = BY_NAME[name]
    reason = provider.backend and backends.get(provider.backend).unsupported(torch.empty(1, 2))
    if reason:
        pytest.skip(reason)
    return provider


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def verified_inputs(request: pytest.FixtureRequest):
    logits, labels = dataclasses.replace(SMALL, dtype=request.param).tensors()
    return logits, labels, expectation(logits, labels)


@pytest.mark.parametrize("name", CHECKED)
def test_providers_compute_what_they_are_timed_for(verified_inputs, name: str) -> None:
    verify(_runnable(name), *verified_inputs)


@pytest.mark.parametrize("backend", [None, "reference"], ids=["competitor", "own backend"])
def test_verification_rejects_a_wrong_loss_and_a_wrong_gradient(verified_inputs, backend: str | None) -> None:
    wrong_loss = Provider("mutant", "", lambda z, y: eager_loss(z, y) + 1e-3, backend=backend)
    wrong_gradient = Provider(
        "mutant", "", lambda z, y: eager_loss(z, y) + 0.1 * (z - z.detach()).float().sum(), backend=backend
    )
    for mutant in (wrong_loss, wrong_gradient):
        with pytest.raises(AssertionError, match="mutant"):
            verify(mutant, *verified_inputs)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "compiled"])
def test_every_repetition_starts_from_the_same_logits(name: str) -> None:
    provider = _runnable(name)
    workspace = sampling.Workspace(SMALL)
    losses = []
    for _ in range(2):
        workspace.repeat(provider)
        losses.append(workspace.forward(provider, workspace.refresh()).detach().clone())
    assert torch.equal(*losses)
    assert torch.equal(workspace.refresh(), workspace.values)


def test_interleaving_samples_every_provider() -> None:
    chosen = tuple(BY_NAME[name] for name in ("copy", "cross-entropy", "eager"))
    samples = sampling.interleave(sampling.Workspace(SMALL), chosen, seconds=0.0)
    assert samples.keys() == {"copy", "cross-entropy", "eager"}
    assert all(len(one) >= sampling.LEAST_ROUNDS for one in samples.values())
    assert all(sample.both == sample.forward + sample.backward > 0 for one in samples.values() for sample in one)
    rows = measure.rows_of_case(SMALL, "raised", samples)
    assert [(row["provider"], row["phase"]) for row in rows].count(("copy", "both")) == 1
    assert next(row["copies"] for row in rows if row["provider"] == "copy") == 1
    assert {row["phase"] for row in rows if row["provider"] == "eager"} == set(sampling.PHASES)
    assert all(measure.Row(machine="m", commit="c", **row) for row in rows)


def test_schedule_repeats_fast_providers_and_mixes_the_order() -> None:
    order = list(sampling.schedule({"slow": 1.0, "middle": 0.3, "fast": 0.001}, seconds=20.0))
    per_round = 1 + 3 + sampling.MOST_PER_ROUND
    rounds = int(20.0 / (1.0 + 3 * 0.3 + sampling.MOST_PER_ROUND * 0.001))
    assert [order.count(name) for name in ("slow", "middle", "fast")] == [
        rounds,
        3 * rounds,
        sampling.MOST_PER_ROUND * rounds,
    ]
    every_round = [order[start : start + per_round] for start in range(0, len(order), per_round)]
    assert all(one.count("slow") == 1 for one in every_round)
    assert len({tuple(one) for one in every_round}) > 1
    assert len(list(sampling.schedule({"slow": 100.0}, seconds=1.0))) == sampling.LEAST_ROUNDS


def test_percentiles() -> None:
    values = [float(value) for value in range(101)]
    random.Random(0).shuffle(values)
    assert sampling.percentiles(values) == pytest.approx((20.0, 50.0, 80.0))
    with pytest.raises(ValueError, match="at least 2 values; got 1"):
        sampling.percentiles([1.0])


def test_useful_bytes_count_each_pass_once() -> None:
    case = Case("any", 3, 5, torch.bfloat16)
    assert [sampling.useful_bytes(case, phase) for phase in (*sampling.PHASES, "copy")] == [30, 60, 90, 60]


def test_a_row_without_machine_or_commit_is_rejected() -> None:
    fields = {field.name: 1 for field in dataclasses.fields(measure.Row)} | {"machine": "m", "commit": "c"}
    assert measure.Row(**fields).commit == "c"
    for name in ("machine", "commit"):
        with pytest.raises(ValueError, match=f"{name} must not be empty"):
            measure.Row(**(fields | {name: ""}))


def test_rows_need_the_copy_of_the_same_run() -> None:
    samples = {"eager": [sampling.Sample(1.0, 1.0, 0)] * 2}
    with pytest.raises(ValueError, match="must hold the provider 'copy'"):
        measure.rows_of_case(SMALL, "raised", samples)


def test_a_regime_owns_the_allocator_settings() -> None:
    inherited = {"PATH": "p", "MALLOC_ARENA_MAX": "1", "LD_PRELOAD": "other.so", "GLIBC_TUNABLES": "t"}
    assert measure.worker_environment("glibc", inherited) == {"PATH": "p"}
    raised = measure.worker_environment("raised", inherited)
    assert raised.keys() == {"PATH", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    # Above every tensor of every case, also the float32 temporaries of 16-bit logits.
    assert int(raised["MALLOC_MMAP_THRESHOLD_"]) > max(4 * case.rows * case.vocab for case in CASES)


def test_unknown_cases_are_named() -> None:
    assert by_name([]) == CASES
    with pytest.raises(ValueError, match="cases must be among flan-t5, .*; got gpt-9"):
        by_name(["gpt-9"])


def test_the_source_hash_follows_kernels_and_build_but_not_documents(tmp_path: Path) -> None:
    for name in (
        "setup.py",
        "csrc/cpu/forward.cpp",
        "caref_kernels/ops.py",
        "caref_kernels/backends/cpu.py",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    hashes = [provenance.source_hash(tmp_path)]
    gpu = provenance.source_hash(tmp_path, "gpu")
    for name in ("setup.py", "csrc/cpu/forward.cpp", "caref_kernels/ops.py", "caref_kernels/backends/cpu.py"):
        (tmp_path / name).write_text(f"{name} changed")
        hashes.append(provenance.source_hash(tmp_path))
    (tmp_path / "csrc/cpu/new.h").touch()
    hashes.append(provenance.source_hash(tmp_path))
    assert len(set(hashes)) == len(hashes)
    (tmp_path / "README.md").write_text("changed")
    for name in ("csrc/cuda/forward.cu", "caref_kernels/backends/triton/forward.py"):
        changed = provenance.source_hash(tmp_path, "gpu")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        assert provenance.source_hash(tmp_path, "gpu") not in (changed, gpu)
    # each kind of kernel has results of its own
    assert provenance.source_hash(tmp_path) == hashes[-1]


def test_gpu_cases_repeat_drawn_rows() -> None:
    """On a device the drawn rows are repeated; meta stands for it."""
    logits, labels = Case("wide", 130, 40).tensors("meta")
    assert logits.shape == (130, 40)
    assert labels.shape == (130,)
    assert logits.device.type == labels.device.type == "meta"


def test_the_processor_is_named_from_its_first_entry(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: One CPU\ncpu family\t: 6\nmodel\t\t: 7\n\nmodel name\t: Two\n")
    assert provenance.cpu_model(cpuinfo) == "One CPU (6-7)"
    assert provenance.cpu_model(tmp_path / "missing")


MEMORY_SCRIPT = """
import json, sys
from benchmarks.cases import Case
from benchmarks.measure import memory_of_case
from benchmarks.providers import PROVIDERS
chosen = tuple(provider for provider in PROVIDERS if provider.name in sys.argv[1:])
json.dump(memory_of_case(Case("memory", 64, 32_768), chosen), sys.stdout)
"""


def test_the_fused_loss_needs_the_gradient_and_in_place_nothing() -> None:
    for name in ("cpu", "cpu-inplace"):
        _runnable(name)
    command = [sys.executable, "-c", MEMORY_SCRIPT, "copy", "cross-entropy", "cpu", "cpu-inplace"]
    environment = measure.worker_environment("memory", dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=provenance.ROOT, capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr:
        pytest.skip("this kernel does not let a process reset the peak of its resident set")
    extra = json.loads(done.stdout)
    logits, slack = 64 * 32_768 * 4, 2**20
    assert extra["copy"] < slack
    assert extra["cpu-inplace"] < slack
    assert logits <= extra["cpu"] < logits + slack
    assert extra["cross-entropy"] > 2 * logits


# ------------------------------------------------------------------------------------------------------------- report


def _results(cpu_ms: float = 1.0, source: str = "current") -> dict:
    """Results in which eager takes 10 ms, the copy 1, cpu what is asked for and everything else 5."""
    times = {"copy": 1.0, "eager": 10.0, "cpu": cpu_ms}
    rows = [
        measure.Row("m", "c", case.name, name, regime, phase, time, time, time, 9, 1.0, time, 0)
        for case in CASES
        for name in BY_NAME
        for time in [times.get(name, 5.0)]
        for regime in measure.TIMED_REGIMES
        for phase in (("both",) if name == "copy" else sampling.PHASES)
    ]
    every = {case.name: dict.fromkeys(BY_NAME, 2**20) for case in CASES}
    error = {"loss": 1e-7, "gradient": 1e-7}
    origin = dict.fromkeys(("machine", "cores", "threads", "isa", "cpu_backend", "libc", "python", "torch"), "x")
    return {
        "date": "2026-01-01",
        "provenance": origin | {"commit": "c" * 40, "dirty": False, "source_sha256": source},
        "cases": {case.name: case.title for case in CASES},
        "rows": rows,
        "errors": {name: dict.fromkeys(one.keys() - {"copy"}, error) for name, one in every.items()},
        "extra_bytes": every,
    }


def test_the_block_shows_every_provider_and_only_the_cases_of_the_targets() -> None:
    block = report.readme_block(_results(), "current")
    for case in CASES:
        assert (case.title in block) == case.must_hold
    for name in BY_NAME:
        assert f"\n| {name} | " in block
    assert report.readme_block(None, "current") == report.NOT_MEASURED


def test_results_of_other_sources_are_marked_stale() -> None:
    assert report.STALE not in report.readme_block(_results(), "current")
    assert report.STALE in report.readme_block(_results(source="older"), "current")


def test_the_sentence_of_masks_has_ratios_and_staleness() -> None:
    names = {measure_sparse.DENSE: 2.0} | {f"fused {name}": 3.0 for name in measure_sparse.POLICIES}
    names |= {f"eager {name}": 30.0 for name in measure_sparse.POLICIES} | {"eager exp(H)": 60.0}
    rows = [{"case": "a", "contestant": name, "both_ms": [0.0, time, 0.0]} for name, time in names.items()]
    results = _results() | {"cases": {"a": "A"}, "rows": rows}
    text = measure_sparse.readme_block(results, "current")
    assert "1.5 to 1.5 times the dense loss" in text
    assert "10 to 20 times as long as that, 20 to 20 times for" in text
    assert "Stale" not in text
    assert "uncommitted" not in text
    assert measure_sparse.readme_block(results, "other").startswith("**Stale:**")
    assert measure_sparse.readme_block(None, "current").startswith("Not yet measured")


def test_uncommitted_changes_are_mentioned() -> None:
    results = _results()
    assert "uncommitted" not in report.readme_block(results, "current")
    results["provenance"]["dirty"] = True
    assert "uncommitted" in report.readme_block(results, "current")


def test_a_missed_target_says_so() -> None:
    held = [line for line in report.target_table(_results(cpu_ms=1.0)) if "faster than eager" in line]
    missed = [line for line in report.target_table(_results(cpu_ms=2.0)) if "faster than eager" in line]
    assert held == ["| times that cpu is faster than eager | >= 8 | 10.00 | 10.00 |"]
    assert missed == ["| times that cpu is faster than eager | >= 8 | 5.00 (missed) | 5.00 (missed) |"]


def test_splice_replaces_the_block_alone() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.splice(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    for broken in ("", text + report.BEGIN, f"{report.END}{report.BEGIN}"):
        with pytest.raises(ValueError, match="README.md must hold"):
            report.splice(broken, "new")


def test_the_plot_is_reproducible_and_names_its_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    report.draw(_results(), first)
    report.draw(_results(), second)
    assert first.read_bytes() == second.read_bytes()
    assert report.fingerprint(_results()) in first.read_text()
    assert report.fingerprint(_results(cpu_ms=2.0)) not in first.read_text()


# -------------------------------------------------------------------------------------------- what is in the repository


def test_the_readme_shows_the_committed_results() -> None:
    """If this fails, run `python -m benchmarks.report`: figures come from the results and say when they are stale."""
    text = report.README.read_text()
    assert text == report.readme(text)
    assert all(f"<!-- {name}:begin -->" in text for name in report.blocks())


def test_table_and_plot_were_made_from_the_committed_results() -> None:
    results = report.load(report.RESULTS)
    if results is None:
        assert not report.FULL_TABLE.exists()
        assert not report.PLOT.exists()
        return
    assert report.FULL_TABLE.read_text() == report.full_table(results)
    assert report.fingerprint(results) in report.PLOT.read_text()
    for path in report.drawings():
        measured = path.with_name(re.sub("_(scaling|roofline)", "", path.name)).with_suffix(".json")
        assert plots.fingerprint(report.load_json(measured)) in path.read_text()
    assert re.fullmatch("[0-9a-f]{64}", results["provenance"]["source_sha256"])
