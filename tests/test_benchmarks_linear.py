"""The benchmark of heads: what is verified, what a row carries, what the README may say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import linear_cases, measure_linear, provenance, report, report_linear

SMALL = linear_cases.HeadCase("small", 40, 300, 16, must_hold=True)


def test_providers_compute_what_they_are_timed_for():
    errors = linear_cases.verify(SMALL)
    assert set(errors) == {provider.name for provider in linear_cases.PROVIDERS}
    frozen = dataclasses.replace(SMALL, frozen=True)
    assert linear_cases.verify(frozen).keys() == errors.keys()


def test_a_wrong_provider_is_noticed(monkeypatch):
    wrong = linear_cases.HeadProvider("wrong", "", lambda hidden, weight, labels: (hidden @ weight.t()).mean())
    monkeypatch.setattr(linear_cases, "PROVIDERS", (wrong,))
    with pytest.raises(AssertionError, match="small, wrong"):
        linear_cases.verify(SMALL)


def test_cases_by_name():
    assert linear_cases.by_name([]) == linear_cases.CASES
    assert [case.name for case in linear_cases.by_name(["must-hold"])] == ["must-hold"]
    with pytest.raises(ValueError, match="cases must be among must-hold, .*; got nonsense"):
        linear_cases.by_name(["nonsense"])
    hidden, weight, labels = dataclasses.replace(SMALL, frozen=True).tensors(7)
    assert (hidden.shape, weight.shape, labels.shape) == ((7, 16), (300, 16), (7,))
    assert hidden.requires_grad
    assert not weight.requires_grad
    assert torch.equal(hidden, SMALL.tensors()[0][:7])


def test_a_row_without_machine_or_commit_is_rejected():
    with pytest.raises(ValueError, match="commit must not be empty"):
        measure_linear.HeadRow("machine", "", "small", "fused", 1.0, 2.0, 3.0, 3, 100)


def _results(fused: float = 1.0, extra: int = 10) -> dict:
    rows = [
        measure_linear.HeadRow(
            "m", "c", "must-hold", one.name, 1.0, fused if one.name == "fused" else 4.0, 9.0, 3, extra
        )
        for one in linear_cases.PROVIDERS
    ]
    errors = {"must-hold": {one.name: {"loss": 1e-7, "gradient": 1e-6} for one in linear_cases.PROVIDERS}}
    made = {"machine": "m", "cores": 2, "threads": 2, "cpu_backend": "b", "torch": "t", "isa": "i", "python": "p"}
    made |= {"libc": "l", "commit": "c" * 40, "dirty": False, "source_sha256": "s"}
    base = {"date": "2026-01-01", "provenance": made, "cases": {"must-hold": "title"}, "errors": errors, "rows": rows}
    return base | {"logits_bytes": {"must-hold": 100}, "missing": [{"peer": "another", "reason": "a GPU"}]}


def test_the_block_says_what_held_what_is_missing_and_what_is_stale():
    text = report_linear.readme_block(_results(), "s")
    assert all(f"| {provider.name} |" in text for provider in linear_cases.PROVIDERS)
    assert "Not measured: another (a GPU)" in text
    assert "missed" not in text
    assert "Stale" not in text
    assert report_linear.readme_block(_results(), "other").startswith("**Stale:**")
    assert report_linear.readme_block(_results(fused=3.0), "s").count("(missed)") == 1
    assert report_linear.readme_block(_results(extra=25), "s").count("(missed)") == 1
    assert report_linear.readme_block(None, "s").startswith("Not yet measured: `make bench-linear`")


def test_the_readme_shows_the_committed_results():
    """If this fails, run `python -m benchmarks.report_linear`."""
    results = report_linear.load(measure_linear.RESULTS)
    text = report_linear.README.read_text()
    block = report_linear.readme_block(results, provenance.source_hash())
    assert text == report.splice(text, block, report_linear.BEGIN, report_linear.END)
    assert report_linear.FULL_TABLE.exists() is (results is not None)
    if results is not None:
        assert report_linear.FULL_TABLE.read_text() == report_linear.full_table(results)
