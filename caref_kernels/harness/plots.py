"""Plots of a results folder, as SVG: figures against trained parameters, the alpha/beta grid, and the loss's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .summary import CURVE, MAIN, cell, values
from .variants import VARIANTS


def write_plots(rows: Sequence[dict[str, Any]], grid_rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Write every plot that there are rows for; the names of the files.

    Args:
        rows: of one pair of exponents.
        grid_rows: of all of them.
        folder: where the files go.
    """
    import matplotlib

    matplotlib.use("svg")
    # The same rows give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "caref_kernels"
    names = [_scatter(rows, folder), _curves(rows, folder), *_grids(grid_rows, folder)]
    return [name for name in names if name]


def _scatter(rows: Sequence[dict[str, Any]], folder: Path) -> str | None:
    """Accuracy and nBERT against trained parameters, one colour for each dataset, with standard errors."""
    import matplotlib.pyplot as plt

    datasets = sorted({row["dataset"] for row in rows})
    if not datasets:
        return None
    figure, axes = plt.subplots(1, len(MAIN), figsize=(9, 3.6), layout="constrained")
    for axis, metric in zip(axes, MAIN, strict=True):
        for colour, dataset in enumerate(datasets):
            for variant in VARIANTS:
                one = cell(values(rows, dataset, variant, metric).values())
                trained = [r["trained"] for r in rows if (r["dataset"], r["variant"]) == (dataset, variant)]
                if one is None:
                    continue
                # The untrained model has no place on a logarithmic axis; it stands at its left edge.
                place = max(trained[0], 1e4)
                axis.errorbar(place, one.mean, yerr=one.error or 0.0, fmt="o", color=f"C{colour}", capsize=2)
                axis.annotate(variant, (place, one.mean), fontsize=6, xytext=(3, 3), textcoords="offset points")
            axis.plot([], [], "o", color=f"C{colour}", label=dataset)
        axis.set(xscale="log", xlabel="trained parameters (untrained at 1e4)", ylabel=f"{metric}, %")
        axis.legend(fontsize=7)
    return _save(figure, folder / "parameters.svg")


def _curves(rows: Sequence[dict[str, Any]], folder: Path) -> str | None:
    """The terms of the loss over the steps, means over splits and datasets of each variant."""
    import matplotlib.pyplot as plt

    variants = [name for name in VARIANTS if any(row["variant"] == name and row["curve"] for row in rows)]
    if not variants:
        return None
    figure, axes = plt.subplots(2, math.ceil(len(CURVE) / 2), figsize=(9, 5), layout="constrained")
    for axis, term in zip(axes.flat, CURVE, strict=True):
        for variant in variants:
            points: dict[int, list[float]] = {}
            for row in rows:
                for record in row["curve"] if row["variant"] == variant else ():
                    if record.get(term) is not None:
                        points.setdefault(record["step"], []).append(record[term])
            if points:
                steps = sorted(points)
                axis.plot(steps, [sum(points[step]) / len(points[step]) for step in steps], label=variant, linewidth=1)
        axis.set(title=term, xlabel="step")
    axes.flat[0].legend(fontsize=6)
    return _save(figure, folder / "terms.svg")


def _grids(rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """A heat map of every dataset and variant that was run with several exponents."""
    import matplotlib.pyplot as plt

    written = []
    for dataset, variant in sorted({(row["dataset"], row["variant"]) for row in rows}):
        mine = [row for row in rows if (row["dataset"], row["variant"]) == (dataset, variant)]
        alphas, betas = sorted({row["alpha"] for row in mine}), sorted({row["beta"] for row in mine})
        if len(alphas) * len(betas) < 2:
            continue
        figure, axes = plt.subplots(1, len(MAIN), figsize=(9, 3.6), layout="constrained")
        for axis, metric in zip(axes, MAIN, strict=True):
            image = [[_grid_mean(mine, alpha, beta, metric) for beta in betas] for alpha in alphas]
            axis.imshow(image, aspect="auto")
            for y, line in enumerate(image):
                for x, value in enumerate(line):
                    axis.text(x, y, "not run" if math.isnan(value) else f"{value:.2f}", ha="center", fontsize=7)
            axis.set(xticks=range(len(betas)), xticklabels=betas, yticks=range(len(alphas)), yticklabels=alphas)
            axis.set(xlabel="beta", ylabel="alpha", title=f"{metric}, {dataset}, {variant}")
        written.append(_save(figure, folder / f"grid-{dataset}-{variant}.svg"))
    return written


def _grid_mean(rows: Sequence[dict[str, Any]], alpha: float, beta: float, metric: str) -> float:
    found = [row["metrics"][metric] for row in rows if (row["alpha"], row["beta"]) == (alpha, beta)]
    one = cell(value for value in found if value is not None)
    return math.nan if one is None else one.mean


def _save(figure: Any, path: Path) -> str:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path.name
