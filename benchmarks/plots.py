"""Plots of the results: speed and memory against V and N, and the roofline; reproducible byte by byte.

Every plot holds the fingerprint of the results it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

from caref_kernels.backends.triton import tiling

from .cases import shape_of
from .measure import UNIT

# Lanes of a multiprocessor that issue one instruction each in a cycle.
LANES = 128
# On a CPU, where there are two regimes: the one that compares arithmetic with arithmetic.
REGIME = "raised"
# What a call moves at least: the forward reads the logits, the backward reads them and writes their gradient.
PASSES = {"forward": 1, "backward": 2, "both": 3}


def fingerprint(results: dict) -> str:
    """Names the results that a plot was drawn from."""
    drawn = [[row["case"], row["provider"], row["phase"], row["p50_ms"]] for row in results["rows"]]
    return "results " + hashlib.sha256(json.dumps([drawn, results["extra_bytes"]]).encode()).hexdigest()


def series(results: dict, phase: str = "both") -> dict[str, dict[str, dict]]:
    """Rows by provider and case, of one phase, in the regime that is drawn."""
    found: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        if row["phase"] == phase and row.get("regime", REGIME) == REGIME:
            found.setdefault(row["provider"], {})[row["case"]] = row
    return found


def axes_of(results: dict) -> dict[str, list[str]]:
    """The cases of each axis: "N" those of the vocabulary with most cases, "V" the first of every one, of its dtype."""
    shapes = {name: shape_of(title) for name, title in results["cases"].items()}
    by_vocab: dict[tuple[int, str], list[str]] = {}
    for name, (_, vocab, dtype) in shapes.items():
        by_vocab.setdefault((vocab, dtype), []).append(name)
    most = max(by_vocab.values(), key=len)
    dtype = shapes[most[0]][2]
    first: dict[int, str] = {}
    for name, (_, vocab, own) in shapes.items():
        if own == dtype:
            first.setdefault(vocab, name)
    return {
        "V": sorted(first.values(), key=lambda name: shapes[name][1]),
        "N": sorted(most, key=lambda name: shapes[name][0]),
    }


def draw_scaling(results: dict, path: Path) -> None:
    """Four panels: useful bytes per second and extra memory in copies of the logits, against V and against N."""
    shapes = {name: shape_of(title) for name, title in results["cases"].items()}
    with _figure(path, fingerprint(results), (9.0, 6.4), (2, 2)) as (figure, panels):
        for column, (axis, names) in enumerate(axes_of(results).items()):
            for provider, rows in series(results).items():
                shown = [name for name in names if name in rows]
                at = [shapes[name][1 if axis == "V" else 0] for name in shown]
                panels[0][column].plot(at, [rows[name]["gigabytes_per_second"] for name in shown], ".-", label=provider)
                copies = [_copies(results, name, provider) for name in shown]
                if None not in copies:
                    panels[1][column].plot(at, copies, ".-")
            fixed = shapes[names[0]][1] if axis == "N" else "of each model"
            panels[0][column].set_title(f"against {axis}" + (f", V = {fixed}" if axis == "N" else ""))
            panels[0][column].set_yscale("log")
            panels[1][column].set_yscale("symlog", linthresh=0.1)
            for row in (0, 1):
                panels[row][column].set_xscale("log", base=2)
                panels[row][column].set_xlabel("columns V" if axis == "V" else "rows N")
        panels[0][0].set_ylabel("useful bytes, GB/s (forward + backward)")
        panels[1][0].set_ylabel("extra memory, copies of the logits")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)


def _copies(results: dict, case: str, provider: str) -> float | None:
    rows, vocab, dtype = shape_of(results["cases"][case])
    extra = results["extra_bytes"][case][provider]
    width = {"float64": 8, "float32": 4}.get(dtype, 2)
    return None if extra is None else extra / (rows * vocab * width)


def draw_roofline(results: dict, path: Path) -> None:
    """Logits per second of each phase against the bytes that it must move, under the copy of the same run.

    On a GPU whose clock is known there is a second roof: the instructions per column of the compiled Triton kernels
    (their budget in tiling.py), issued by every lane in every cycle.
    """
    shapes = {name: shape_of(title) for name, title in results["cases"].items()}
    made = results["provenance"]
    copies = {name: row["gigabytes_per_second"] for name, row in series(results)[UNIT].items()}
    best = max(copies.values())
    with _figure(path, fingerprint(results), (7.5, 4.6), (1, 1)) as (figure, panels):
        panel = panels[0][0]
        widths = sorted({_bytes_per_column(shape[2], phase) for shape in shapes.values() for phase in PASSES})
        span = [widths[0] / 1.5, widths[-1] * 1.5]
        panel.plot(span, [best / width for width in span], "k-", label=f"copy, {best:.0f} GB/s")
        for provider in series(results):
            if provider == UNIT:
                continue
            points = [
                (_bytes_per_column(shapes[name][2], phase), shapes[name][0] * shapes[name][1] / row["p50_ms"] / 1e6)
                for phase in PASSES
                for name, row in series(results, phase).get(provider, {}).items()
            ]
            panel.plot(*zip(*points, strict=True), "o", markersize=3, label=provider)
        for phase, instructions in _instructions().items() if made.get("clock") else ():
            roof = made["multiprocessors"] * LANES * made["clock"] * 1e3 / instructions / 1e9
            panel.axhline(roof, linestyle=":", color="gray")
            panel.text(span[0], roof, f"issue, {phase}: {instructions:g} instructions per column", fontsize=6)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("bytes that a column must move")
        panel.set_ylabel("columns per nanosecond")
        figure.legend(loc="outside lower center", ncols=6, fontsize=7)


def _bytes_per_column(dtype: str, phase: str) -> int:
    return PASSES[phase] * {"float64": 8, "float32": 4}.get(dtype, 2)


def _instructions() -> dict[str, float]:
    """Of the default path in bfloat16, forward and backward."""
    asked = tiling.variant(2.0, 1.0, True, "labels")
    counts = [tiling.instruction_limit(kernel, "bfloat16", asked, True) for kernel in ("row", "gradient")]
    return {"forward": counts[0], "backward": counts[1], "both": sum(counts)}


@contextmanager
def _figure(path: Path, name: str, size: tuple[float, float], panels: tuple[int, int]):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "caref", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*panels, figsize=size, layout="constrained", squeeze=False)
    try:
        yield figure, axes
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Description": name})
    finally:
        pyplot.close(figure)
