"""The report and the block of the committed run of the harness; nothing is measured here.

The run itself is `caref-harness run smollm2 --results DIR`; `caref-harness report --results DIR` writes its rows into
report.csv, which is committed.
"""

from __future__ import annotations

from caref_kernels.harness.report import Study, read_report
from caref_kernels.harness.summary import FEWEST_SPLITS, LEVEL, Difference, cell, values

from .results_file import FOLDER as RESULTS
from .tables import Page

FOLDER = RESULTS / "harness"
NOT_RUN = "This run has not been made yet: `caref-harness run smollm2 --results DIR`."
SHOWN = ("accuracy", "nbert", "choice_accuracy", "ece", "brier", "label_nll", "label_entropy", "unparsable")
COMPARED = ("accuracy",)  # the report has the others


def study() -> Study | None:
    """The committed rows, if there are any."""
    file = FOLDER / "report.csv"
    found = Study(read_report(file)) if file.is_file() else None
    return found if found is not None and found.rows else None


def write_report() -> None:
    """Write report.md beside the rows."""
    found = study()
    if found is not None:
        (FOLDER / "report.md").write_text(found.markdown(), encoding="utf-8")


def block(found: Study | None, page: Page) -> str:
    """What the documents say about the run."""
    if found is None:
        return NOT_RUN
    lines = [_introduction(found), "", *_table(found), "", *_differences(found)]
    return "\n".join([*lines, "", f"Data: {page.link('harness/report.csv')}, {page.link('harness/report.md')}."])


def _introduction(study: Study) -> str:
    row = study.rows[0]
    counts = sorted({len(values(study.rows, d, v, "accuracy")) for d in study.datasets for v in study.variants})
    splits = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"One run on {row['device'].split(',')[0]}: {row['model']}, query projections only, a subset of the official "
        f"files of {' and '.join(study.datasets)}, {splits} of FEB's 60 splits. It tests the harness and the loss on a "
        "small model and does not reproduce the paper, whose model, number of steps and scorer of nBERT differ. "
        "Mean ± standard error:"
    )


def _table(study: Study) -> list[str]:
    rows = [("dataset", "row", "splits", *SHOWN), ("---",) * (3 + len(SHOWN))]
    for dataset in study.datasets:
        for variant in study.variants:
            cells = [cell(values(study.rows, dataset, variant, metric).values()) for metric in SHOWN]
            count = len(values(study.rows, dataset, variant, "accuracy"))
            shown = ("not run" if one is None else f"{one.mean:.2f}{_error(one.error)}" for one in cells)
            rows.append((dataset, variant, str(count), *shown))
    return [f"| {' | '.join(row)} |" for row in rows]


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2f}"


def _differences(study: Study) -> list[str]:
    """What is resolved, what is not, and how many splits it would take."""
    found = list(study.differences(COMPARED))
    resolved = [item for item in found if item[2].p < LEVEL]
    open_ = [item for item in found if item[2].p >= LEVEL]
    fewest = min((item[2].splits for item in found), default=0)
    lines = [f"**Resolved in accuracy** (paired over splits, sign flips, p < {LEVEL}): {_listed(resolved)}", ""]
    lines.append(f"**Not resolved** (points, and the splits that the observed difference would take): {_listed(open_)}")
    if fewest < FEWEST_SPLITS:
        paired = f"{fewest} paired {'split' if fewest == 1 else 'splits'}"
        lines += ["", f"With {paired} sign flips cannot resolve anything; it takes {FEWEST_SPLITS}."]
    return lines


def _listed(items: list[tuple[str, str, Difference]]) -> str:
    if not items:
        return "nothing."
    texts = []
    for dataset, metric, one in items:
        needed = "" if one.p < LEVEL else f", {'not known' if one.needed is None else f'{one.needed} splits'}"
        texts.append(f"{dataset} {metric}, {one.first} minus {one.second}: {one.mean:+.2f}{_error(one.error)}{needed}")
    return "; ".join(texts) + "."
