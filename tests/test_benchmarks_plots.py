"""Plots and README blocks of what was measured on a GPU, from made-up results."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, plots, report_gpu


def _results():
    """As measured on a GPU: two providers, three vocabularies, three numbers of rows."""
    shown = [case for case in cases.GPU_CASES if case.dtype == torch.bfloat16]
    rows = [
        {"case": case.name, "provider": name, "phase": phase, "p50_ms": 1.5 * index, "gigabytes_per_second": 9 / index}
        for case in shown
        for index, name in enumerate(("copy", "eager", "triton"), 1)
        for phase in (("both",) if name == "copy" else ("forward", "backward", "both", "call"))
    ]  # fmt: skip
    extra = {case.name: {"copy": 0, "eager": 10 * case.logits_bytes, "triton": case.logits_bytes} for case in shown}
    made = {"clock": 1_980_000, "multiprocessors": 132}
    titles = {case.name: case.title for case in shown}
    return {"cases": titles, "rows": rows, "extra_bytes": extra, "provenance": made}


def test_the_axes_of_the_plots():
    axes = plots.axes_of(_results())
    assert [cases.shape_of(_results()["cases"][name])[1] for name in axes["V"]] == [
        32_128, 49_152, 128_256, 151_936, 262_144,
    ]  # fmt: skip
    assert axes["V"][2] == "llama-3"
    assert [cases.shape_of(_results()["cases"][name])[0] for name in axes["N"]] == [8, 64, 512, 4096, 16_384]
    with pytest.raises(ValueError, match="the title of a case must be like"):
        cases.shape_of("llama-3")


@pytest.mark.parametrize("draw", [plots.draw_scaling, plots.draw_roofline])
def test_plots_are_reproducible_and_name_their_results(draw, tmp_path):
    pytest.importorskip("matplotlib")
    results = _results()
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    draw(results, first)
    draw(results, second)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    assert plots.fingerprint(results) in text
    assert "triton" in text
    assert ("instructions per column" in text) == (draw is plots.draw_roofline)
    results["rows"][0]["p50_ms"] += 1
    assert plots.fingerprint(results) not in text


def test_gpucheck_in_the_readme():
    made = {"machine": "NVIDIA H200", "driver": "580", "torch": "2", "triton": "3", "python": "3.11", "dirty": True}
    results = {
        "date": "2026-01-02",
        "provenance": {**made, "commit": "c" * 40, "source_sha256": "old"},
        "files": [{"file": "tests/gpu/test_large.py", "passed": 2, "failed": 1, "seconds": 3.2}],
        "tests": [
            {"test": "tests/gpu/test_large.py::test_a", "outcome": "passed", "seconds": 1.0},
            {"test": "tests/gpu/test_large.py::test_b", "outcome": "failed", "seconds": 1.0, "detail": "differs"},
            {"test": "tests/gpu/test_large.py::test_c", "outcome": "not run", "seconds": 0.0},
        ],
    }
    block = report_gpu.gpucheck_block(results, "new")
    assert block.startswith("**Stale:**")
    assert (
        "Run on 2026-01-02: NVIDIA H200, driver 580, triton 3; torch 2, Python 3.11; commit cccccccccccc, with" in block
    )
    assert "| tests/gpu/test_large.py | 2 | 1 | 0 | 0 | 3 |" in block
    assert "- tests/gpu/test_large.py::test_b: failed. differs\n- tests/gpu/test_large.py::test_c: not run." in block
    assert "test_a" not in block
    assert "Stale" not in report_gpu.gpucheck_block(results, "old")
    assert report_gpu.gpucheck_block(None, "new").startswith("Not yet run on a GPU")
