"""Tables of a results folder, in Markdown and CSV: measured figures, the paper's beside them, "not run" elsewhere."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import paper
from .data import DATASETS
from .results import Reading
from .summary import EXTENSIONS, MAIN, Cell, Difference, cell, difference, pairs, select, values
from .variants import VARIANTS

NOT_RUN = "not run"
_TITLES = {"cos_e": "COS-E", "ecqa": "ECQA", "comve": "ComVE", "esnli": "e-SNLI"}
# What report.csv has of a row.
_COLUMNS = ("dataset", "variant", "seed", "alpha", "beta", "percent", "model", "scorer", "device", "protocol")
_METRICS = (*MAIN, *EXTENSIONS)
# A spreadsheet would take a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(map(_escape, line))} |" for line in lines)]) + "\n"


@dataclass(frozen=True)
class Study:
    """The rows of a results folder with one pair of exponents, and how many splits make it complete."""

    reading: Reading
    alpha: float = 2.0
    beta: float = 1.0
    expected: int = paper.SPLITS

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows with these exponents."""
        return select(self.reading.rows, self.alpha, self.beta)

    @property
    def variants(self) -> list[str]:
        """The variants that have a row, in the order of the variants' table."""
        present = {row["variant"] for row in self.rows}
        return [name for name in VARIANTS if name in present]

    @property
    def datasets(self) -> list[str]:
        """The datasets that have a row."""
        present = {row["dataset"] for row in self.rows}
        return [name for name in DATASETS if name in present]

    def incomplete(self) -> list[str]:
        """What is missing of the expected splits, for the datasets and variants that were begun."""
        found = []
        for dataset in self.datasets:
            for variant in self.variants:
                count = len({r["seed"] for r in self.rows if (r["dataset"], r["variant"]) == (dataset, variant)})
                if count < self.expected:
                    found.append(f"{dataset} {variant}: {count}/{self.expected} splits")
        return found

    def remarks(self) -> list[str]:
        """What a reader must know before comparing with the paper."""
        models, scorers = self._distinct("model"), self._distinct("scorer")
        remarks = [
            f"Model: {', '.join(models)}. Scorer of nBERT: {', '.join(scorers)}. Device: "
            f"{', '.join(self._distinct('device'))}. Protocol: {', '.join(self._distinct('protocol'))}."
        ]
        if models != [paper.MODEL]:
            remarks.append(f"The paper's figures are of {paper.MODEL}: they do not compare with these.")
        if not all("roberta-large" in scorer for scorer in scorers):
            remarks.append("The paper's nBERT is of raw roberta-large: it does not compare with this nBERT.")
        if self.reading.torn:
            remarks.append(f"A torn last line of {self.reading.torn} bytes was left out.")
        missing = self.incomplete()
        if missing:
            remarks.append(f"Incomplete, {len(missing)} cells below {self.expected} splits.")
        return remarks

    def _distinct(self, field: str) -> list[str]:
        return sorted({str(row[field]) for row in self.rows})

    def main_tables(self) -> list[Table]:
        """The layout of the paper's table 1, once for each of its two figures."""
        return [self._main(metric) for metric in MAIN]

    def _main(self, metric: str) -> Table:
        names = [name for name, row in VARIANTS.items() if row.paper or name in self.variants]
        header = ("variant", "parameters %", *(_TITLES[name] for name in DATASETS), "mean", "paper's mean")
        rows = []
        for name in names:
            reported = paper.TABLE.get(VARIANTS[name].paper or "")
            cells = {d: cell(values(self.rows, d, name, metric).values()) for d in DATASETS}
            shown = []
            for dataset in DATASETS:
                value = reported.value(metric, dataset) if reported else None
                shown.append(f"{_show(cells[dataset])}{'' if value is None else f' [paper {value:.2f}]'}")
            known = [one.mean for one in cells.values() if one is not None]
            mean = f"{sum(known) / len(known):.2f}" if len(known) == len(DATASETS) else NOT_RUN
            mean_paper = reported.value(metric, None) if reported else None
            rows.append((name, self._percent(name), *shown, mean, "" if mean_paper is None else f"{mean_paper:.2f}"))
        return Table(f"{metric}: mean ± std over splits (SE, number of splits)", header, tuple(rows))

    def _percent(self, variant: str) -> str:
        found = {f"{row['percent']:.2f}" for row in self.rows if row["variant"] == variant}
        return ", ".join(sorted(found)) or NOT_RUN

    def extension_table(self) -> Table:
        """The figures that the paper does not have."""
        rows = []
        for dataset in self.datasets:
            for variant in self.variants:
                cells = (cell(values(self.rows, dataset, variant, metric).values()) for metric in EXTENSIONS)
                rows.append((_TITLES[dataset], variant, *(_short(one) for one in cells)))
        return Table("Calibration and entropy: mean ± SE over splits", ("dataset", "variant", *EXTENSIONS), tuple(rows))

    def differences(self, metrics: Sequence[str] = (*MAIN, "ece", "brier", "label_nll", "label_entropy")):
        """Every paired difference as (dataset, metric, difference)."""
        for dataset in self.datasets:
            for pair in pairs(self.variants):
                for metric in metrics:
                    found = difference(self.rows, dataset, pair, metric)
                    if found is not None:
                        yield dataset, metric, found

    def difference_table(self) -> Table:
        """Paired differences: what the splits resolve, and how many it would take."""
        header = ("dataset", "figure", "difference", "mean ± SE", "splits", "p (sign flips)", "detectable", "needed")
        rows = tuple(_difference_row(_TITLES[d], metric, found) for d, metric, found in self.differences())
        return Table("Paired differences over common splits", header, rows)

    def grid_tables(self) -> list[Table]:
        """The main figures of everything that was run with several exponents, one row for each alpha."""
        tables = []
        for dataset, variant, metric in itertools.product(DATASETS, VARIANTS, MAIN):
            mine = [row for row in self.reading.rows if (row["dataset"], row["variant"]) == (dataset, variant)]
            alphas, betas = sorted({row["alpha"] for row in mine}), sorted({row["beta"] for row in mine})
            if len(alphas) * len(betas) < 2:
                continue
            rows = []
            for alpha in alphas:
                found = (values(select(mine, alpha, beta), dataset, variant, metric).values() for beta in betas)
                rows.append((f"α = {alpha:g}", *(_show(cell(numbers)) for numbers in found)))
            title = f"{variant} on {_TITLES[dataset]}, {metric} by exponents"
            tables.append(Table(title, ("", *(f"β = {beta:g}" for beta in betas)), tuple(rows)))
        return tables

    def markdown(self) -> str:
        """The whole report."""
        parts = ["# Results", "", *(f"{remark}\n" for remark in self.remarks())]
        tables = [*self.main_tables(), self.extension_table(), self.difference_table(), *self.grid_tables()]
        parts += [table.markdown() for table in tables]
        if self.incomplete():
            parts += ["## Incomplete", "", *(f"- {line}" for line in self.incomplete()), ""]
        return "\n".join(parts)

    def csv(self) -> str:
        """One line for each run, with all that the tables are made from; :func:`read_report` reads it."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((*_COLUMNS, *_METRICS))
        for row in self.reading.rows:
            cells = (*(row[name] for name in _COLUMNS), *(row["metrics"].get(name) for name in _METRICS))
            writer.writerow([_plain(cell) for cell in cells])
        return stream.getvalue()


def read_report(path: Path) -> Reading:
    """The rows of a ``report.csv``.

    Raises:
        ValueError: it is not one; the message names the line.
    """
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            try:
                origin = {name: _as_it_was(line[name]) for name in _COLUMNS}
                numbers = {"seed": int(origin["seed"])} | {n: float(origin[n]) for n in ("alpha", "beta", "percent")}
                metrics = {name: float(line[name]) if line[name] else None for name in _METRICS}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: not a line of a report ({error!r})") from None
            rows.append(origin | numbers | {"metrics": metrics})
    return Reading(tuple(rows))


def parameter_markdown(counts: Iterable[Any], model: str) -> Table:
    """The table of trainable parameters, with the paper's percentages where the model is the paper's."""
    rows = []
    for count in counts:
        reported = paper.TABLE.get(count.variant.paper or "") if model == paper.MODEL else None
        shown = "" if reported is None else f"{reported.percent:.2f}"
        rows.append((count.variant.name, f"{count.trained:,}", f"{count.total:,}", f"{count.percent:.4f}", shown))
    return Table(f"Trainable parameters of {model}", ("variant", "trained", "all", "percent", "paper"), tuple(rows))


def _difference_row(dataset: str, metric: str, found: Difference) -> tuple[str, ...]:
    error = "" if found.error is None else f" ± {found.error:.3f}"
    return (
        dataset,
        metric,
        f"{found.first} minus {found.second}",
        f"{found.mean:+.3f}{error}",
        str(found.splits),
        f"{found.p:.3g}",
        "" if found.detectable is None else f"{found.detectable:.3f}",
        "" if found.needed is None else str(found.needed),
    )


def _show(one: Cell | None) -> str:
    if one is None:
        return NOT_RUN
    if one.error is None:  # one split has no spread
        return f"{one.mean:.2f} (1)"
    return f"{one.mean:.2f} ± {one.std:.2f} (SE {one.error:.2f}, {one.splits})"


def _short(one: Cell | None) -> str:
    if one is None:
        return NOT_RUN
    return f"{one.mean:.3f}" + ("" if one.error is None else f" ± {one.error:.3f}")


def _plain(item: Any) -> Any:
    return f"'{item}" if isinstance(item, str) and item.startswith(_FORMULA) else item


def _as_it_was(text: str) -> str | None:
    return None if not text else text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
