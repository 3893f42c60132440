"""Plots of results, for a page of 830 pixels and for a phone: large text, few series, labels beside what they name.

Every plot is reproducible byte by byte and holds the fingerprint of the results it was drawn from.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cases import shape_of
from .results_file import Results
from .tables import MEGA, gigabytes_per_second

# 830 pixels at twice the resolution.
INCHES, DPI = 6.0, 2 * 830 / 6.0
OWN, OTHER = "#1a5fb4", "#9a9996"


def fingerprint(drawn: object) -> str:
    """Names the results that a plot was drawn from."""
    return "results " + hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


@contextmanager
def figure(path: Path, drawn: object, height: float, panels: int = 1) -> Iterator[tuple]:
    """(figure, axes), written to ``path`` as PNG at the end."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        made, axes = pyplot.subplots(1, panels, figsize=(INCHES, height), layout="constrained", squeeze=False)
        try:
            yield made, list(axes[0])
            _save(made, path, fingerprint(drawn))
        finally:
            pyplot.close(made)


def _save(made, path: Path, description: str) -> None:
    """As PNG with 64 colours, a third of the bytes that matplotlib writes, and without its version."""
    from PIL import Image, PngImagePlugin

    drawn = io.BytesIO()
    made.savefig(drawn, dpi=DPI)
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", description)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True, pnginfo=text)


def draw_bars(results: Results, case: str, shown: dict[str, str], path: Path) -> None:
    """Time and extra memory of one case, a bar for each implementation; those of this package are coloured.

    Args:
        results: of a loss suite.
        case: its name.
        shown: the labels by implementation, from top to bottom.
        path: the PNG file.
    """
    rows = results.of(case)
    names = [name for name in shown if name in rows]
    columns = {
        "time, ms": [rows[name]["both_ms"][1] for name in names],
        "extra memory, MiB": [rows[name]["extra_bytes"] / MEGA for name in names],
    }
    n, v, dtype = shape_of(results.cases[case])
    title = f"CAREF forward and backward, {n:,} × {v:,} {dtype} logits"
    with figure(path, [results.cases[case], columns], 0.9 + 0.42 * len(names), 2) as (made, axes):
        made.suptitle(title, fontsize=13)
        for axis, (label, values) in zip(axes, columns.items(), strict=True):
            places = range(len(names), 0, -1)
            colours = [OWN if shown[name].startswith("caref") else OTHER for name in names]
            bars = axis.barh(places, values, color=colours, height=0.7)
            texts = [f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}" for value in values]
            axis.bar_label(bars, texts, padding=3)
            axis.set(xlim=(0, 1.25 * max(values)), xticks=[])
            axis.set_title(label, fontsize=12)
            axis.spines[["left", "bottom"]].set_visible(False)
            axis.tick_params(left=False)
        axes[0].set_yticks(places, [shown[name] for name in names])
        axes[1].set_yticks([])


def axes_of(results: Results) -> dict[str, list[str]]:
    """The cases of each axis: "N" those of the vocabulary with most cases, "V" the first of every one, of its dtype."""
    shapes = {name: shape_of(title) for name, title in results.cases.items()}
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


def draw_scaling(results: Results, shown: dict[str, str], path: Path) -> None:
    """Useful bytes per second against V and against N, a line for each implementation, labelled at its end.

    Args:
        results: of a loss suite.
        shown: the labels by implementation.
        path: the PNG file.
    """
    shapes = {name: shape_of(title) for name, title in results.cases.items()}
    drawn: dict[str, dict[str, list]] = {}
    for axis, names in axes_of(results).items():
        for name in (one for one in shown if any(row["implementation"] == one for row in results.rows)):
            points = [(shapes[case][1 if axis == "V" else 0], results.of(case).get(name), case) for case in names]
            drawn.setdefault(axis, {})[name] = [
                (at, gigabytes_per_second(results.cases[case], row)) for at, row, case in points if row is not None
            ]
    rates = [rate for lines in drawn.values() for points in lines.values() for _, rate in points]
    limits = min(rates) / 1.3, max(rates) * 1.3
    with figure(path, drawn, 3.8, 2) as (made, (left, right)):
        made.suptitle("Useful bytes of forward and backward, GB/s", fontsize=13)
        made.get_layout_engine().set(wspace=0.06)
        for panel, (axis, lines) in zip((left, right), drawn.items(), strict=True):
            panel.set(xscale="log", yscale="log", ylim=limits)
            _draw_lines(panel, lines, shown)
            fixed = shapes[axes_of(results)["N"][0]][1]
            panel.set_xlabel("columns V" if axis == "V" else f"rows N at V = {fixed:,}")
        _label_ends(right, drawn["N"], shown, limits)
        right.set_yticklabels([])


def _draw_lines(panel, lines: dict[str, list], shown: dict[str, str]) -> None:
    """The lines, with ticks at the points that are not too close to the one before."""
    for name, points in lines.items():
        own = shown[name].startswith("caref")
        panel.plot(*zip(*points, strict=True), "o-", color=OWN if own else OTHER, linewidth=2.5 if own else 1.5)
    places: list[int] = []
    for at in sorted({at for points in lines.values() for at, _ in points}):
        if not places or at > 1.7 * places[-1]:
            places.append(at)
    panel.set_xticks(places, [f"{at // 1000}k" if at >= 10_000 else f"{at:,}" for at in places])
    panel.minorticks_off()
    low, high = panel.get_ylim()
    ticks = [2.0**i for i in range(-4, 16) if low <= 2.0**i <= high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _label_ends(panel, lines: dict[str, list], shown: dict[str, str], limits: tuple[float, float]) -> None:
    """The names to the right of the lines' last points, at least a line of text apart."""
    height = math.log(limits[1] / limits[0])
    below = -1.0
    for name, points in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        below = max(math.log(points[-1][1] / limits[0]) / height, below + 0.09)
        colour = OWN if shown[name].startswith("caref") else "#5e5c64"
        panel.text(1.04, below, shown[name], transform=panel.transAxes, va="center", color=colour, clip_on=False)


def draw_num_kept(found: dict, scales: dict[str, str], path: Path) -> None:
    """k against the entropy of every row, a cloud for each scale, labelled beside its highest point.

    Args:
        found: what ``num_kept.json`` holds.
        scales: the labels by policy.
        path: the PNG file.
    """
    entropy = [row["entropy"] for row in found["rows"]]
    drawn = {name: [row[name][0] for row in found["rows"]] for name in scales}
    with figure(path, [entropy, drawn], 3.8) as (_, (panel,)):
        for (name, kept), colour in zip(drawn.items(), (OWN, "#c64600", "#26a269"), strict=True):
            panel.plot(entropy, kept, "o", markersize=5, color=colour, alpha=0.8)
            last = max(range(len(kept)), key=lambda row: entropy[row])
            panel.annotate(
                scales[name], (entropy[last], kept[last]), xytext=(9, 0), textcoords="offset points", va="center",
                color=colour, annotation_clip=False,
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        panel.set(xlabel="entropy of the row, nats", xlim=(-0.2, 1.22 * max(entropy)))
        panel.set_title(f"k on {len(entropy)} rows of {found['source']}, V = {found['columns']:,}", fontsize=13)
