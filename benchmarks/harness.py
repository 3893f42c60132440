"""`python -m benchmarks.harness`: the README block of the real run whose report.csv is committed.

The run itself is `caref-harness run smollm2 --results DIR`, its report `caref-harness report --results DIR`.
Nothing is measured here, and no figure enters the README by hand.
"""

from __future__ import annotations

import sys

from caref_kernels.harness.report import Study, read_report
from caref_kernels.harness.summary import FEWEST_SPLITS, LEVEL, Difference, cell, values

from .provenance import ROOT

README = ROOT / "README.md"
FOLDER = ROOT / "benchmarks" / "results" / "harness"
BEGIN, END = "<!-- harness:begin -->", "<!-- harness:end -->"
NOT_RUN = "The real run is not in this checkout yet: `caref-harness run smollm2 --results benchmarks/results/harness`."
SHOWN = ("accuracy", "nbert", "choice_accuracy", "ece", "brier", "label_nll", "label_entropy", "unparsable")
COMPARED = ("accuracy",)  # the report has the others


def main() -> None:
    """Write the block in the README."""
    study = committed()
    README.write_text(splice(README.read_text(encoding="utf-8"), block(study)), encoding="utf-8")
    sys.stdout.write(f"{0 if study is None else len(study.rows)} rows\n")


def committed() -> Study | None:
    """The run that is in this checkout."""
    file = FOLDER / "report.csv"
    return Study(read_report(file)) if file.is_file() else None


def splice(text: str, inside: str) -> str:
    """``text`` with ``inside`` between the markers.

    Raises:
        ValueError: there is not exactly one pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the README must have exactly one pair of markers {BEGIN} {END}")
    return f"{before}{BEGIN}\n{inside}\n{END}{after}"


def block(study: Study | None) -> str:
    """What the README says about the run."""
    if study is None or not study.rows:
        return NOT_RUN
    lines = [_introduction(study), "", *_table(study), "", *_differences(study)]
    return "\n".join([*lines, "", f"Rows, report and plots: [{_relative()}]({_relative()}/report.md)."])


def _relative() -> str:
    return FOLDER.relative_to(ROOT).as_posix()


def _introduction(study: Study) -> str:
    row = study.rows[0]
    counts = sorted({len(values(study.rows, d, v, "accuracy")) for d in study.datasets for v in study.variants})
    splits = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"A real run, on {row['device'].split(',')[0]}: {row['model']}, query projections only, the official files of "
        f"{' and '.join(study.datasets)}, {splits} of FEB's 60 splits. It checks the harness and the loss on "
        "a small model, not the paper: the model, the steps and the scorer of nBERT are others. Mean ± standard error:"
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


if __name__ == "__main__":
    main()
