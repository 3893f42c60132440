"""The block of the committed run of the harness, made from its rows alone."""

from __future__ import annotations

import pytest

pytest.importorskip("filelock")

from benchmarks.harness import FOLDER, Study, block, study
from benchmarks.tables import Page
from caref_kernels.harness.results import Reading

PAGE = Page("../", "", "")


def rows(variant: str, figures: list[float]) -> list[dict]:
    metrics = ("accuracy", "nbert", "choice_accuracy", "ece", "brier", "label_nll", "label_entropy", "unparsable")
    origin = {"model": "tiny", "device": "CPU AVX2, 1 threads", "alpha": 2.0, "beta": 1.0, "dataset": "comve"}
    return [
        origin | {"variant": variant, "seed": seed, "metrics": dict.fromkeys(metrics, figure)}
        for seed, figure in enumerate(figures)
    ]


def test_the_block_says_what_is_resolved_and_what_it_would_take() -> None:
    caref, ce = [50.0, 51.0, 52.0, 53.0, 54.0, 55.0], [49.0, 49.5, 50.5, 52.0, 52.5, 54.0]
    text = block(Study(Reading((*rows("CAREF-AQ", caref), *rows("CE-AQ", ce)))), PAGE)
    resolved, _, still_open = text.partition("**Not resolved**")
    assert "comve accuracy, CAREF-AQ minus CE-AQ: +1.25 ± 0.11" in resolved
    assert "nothing." in still_open
    assert "cannot resolve" not in text
    text = block(Study(Reading((*rows("CAREF-AQ", caref[:2]), *rows("CE-AQ", [49.0, 52.0])))), PAGE)
    resolved, _, still_open = text.partition("**Not resolved**")
    assert "nothing." in resolved
    assert "CAREF-AQ minus CE-AQ: +0.00 ± 1.00, not known" in still_open
    assert "With 2 paired splits sign flips cannot resolve anything; it takes 6." in text
    assert "(../benchmarks/results/harness/report.csv)" in text
    assert block(None, PAGE).startswith("This run has not been made yet")


def test_the_report_is_what_the_rows_say() -> None:
    found = study()
    assert found is not None
    assert (FOLDER / "report.md").read_text(encoding="utf-8") == found.markdown()
