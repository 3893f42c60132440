"""`python -m benchmarks.report`: tables and plots from the committed results, never by hand; nothing is measured here.

Writes the blocks between the markers of README.md, the full table beside the results, and the plots.  Run it again
after a change of the kernels: it then marks the figures as stale.  This module holds the block of the loss on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import measure_gpu, measure_heads_gpu, measure_sparse, plots, report_gpu
from .cases import CASES
from .measure import RESULTS, UNIT, Row
from .measure_step import RESULTS as STEPS
from .provenance import ROOT, source_hash
from .providers import PROVIDERS

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
FULL_TABLE = RESULTS.with_suffix(".md")
PLOT = RESULTS.with_suffix(".svg")
NOT_MEASURED = "Not yet measured: `make bench` fills this in."
STALE = "**Stale:** the kernel sources have changed since this was measured; `make bench` measures again."

MEASURED_ON_GPU = {"loss": measure_gpu.RESULTS, "heads": measure_heads_gpu.RESULTS}
REGIME_TITLES = {"raised": "mmap threshold raised", "glibc": "glibc as it is"}
MEGA = 2**20


class Target(NamedTuple):
    """A ratio of two medians of forward and backward, set before anything was measured."""

    text: str
    above: str
    below: str
    limit: float
    at_least: bool = True


TARGETS = (
    Target("times that cpu is faster than eager", "eager", "cpu", 8.0),
    Target("times that cpu is faster than compiled", "compiled", "cpu", 2.0),
    Target("times that cpu-inplace is faster than compiled", "compiled", "cpu-inplace", 3.0),
    Target("times that cpu is faster than cross-entropy alone", "cross-entropy", "cpu", 1.0),
    Target("time of cpu-inplace in copies of the logits", "cpu-inplace", UNIT, 2.5, at_least=False),
)


def main() -> None:
    """Rewrite the README's blocks, the full table and the plots; print how the targets fared."""
    results = load(RESULTS)
    README.write_text(readme(README.read_text()))
    for path, draw_plot in drawings().items():
        draw_plot(path)
    if results is None:
        return
    FULL_TABLE.write_text(full_table(results))
    draw(results, PLOT)
    sys.stdout.write("\n".join(target_table(results)) + "\n")


def readme(text: str) -> str:
    """``text`` with every block as the committed results give it; a block without markers is not shown."""
    text = splice(text, readme_block(load(RESULTS), source_hash()))
    for name, block in blocks().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text:
            text = splice(text, block, begin, end)
    return text


def blocks() -> dict[str, str]:
    """The other blocks by the name of their markers."""
    gpu = source_hash(kind="gpu")
    measured = [load_json(path) for path in (*MEASURED_ON_GPU.values(), STEPS["gpu"])]
    return {
        "benchmark-gpu": report_gpu.gpu_block(*measured, gpu),
        "benchmark-step": report_gpu.step_block(load_json(STEPS["cpu"]), source_hash(), "make bench"),
        "benchmark-sparse": measure_sparse.readme_block(load_json(measure_sparse.RESULTS), source_hash()),
        "gpucheck": report_gpu.gpucheck_block(load_json(report_gpu.GPUCHECK), gpu),
    }


def drawings() -> dict[Path, Callable[[Path], None]]:
    """Every plot but that of the CPU's block, and what draws it: those whose results there are."""
    found: dict[Path, Callable[[Path], None]] = {}
    for path in (RESULTS, MEASURED_ON_GPU["loss"]):
        results = load_json(path)
        if results is not None:
            found[path.with_name(f"{path.stem}_scaling.svg")] = partial(plots.draw_scaling, results)
            found[path.with_name(f"{path.stem}_roofline.svg")] = partial(plots.draw_roofline, results)
    return found


def load_json(path: Path) -> dict | None:
    """The results in ``path`` as they are; ``None`` if there are none yet."""
    return json.loads(path.read_text()) if path.is_file() else None


def load(path: Path) -> dict | None:
    """The results in ``path``, every row checked; ``None`` if there are none yet.

    Raises:
        ValueError: a row without machine or commit.
        TypeError: a row with other fields than :class:`benchmarks.measure.Row`.
    """
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    results["rows"] = [Row(**row) for row in results["rows"]]
    return results


def splice(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with what stands between the markers replaced by ``block``.

    Raises:
        ValueError: a marker is missing, doubled, or they are in the wrong order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must hold {begin} and {end}, once each and in this order")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}"


def readme_block(results: dict | None, current_hash: str) -> str:
    """What README.md shows: origin, the cases of the targets in both regimes, the targets, the plot."""
    if results is None:
        return NOT_MEASURED
    parts = [_origin(results)]
    if results["provenance"]["source_sha256"] != current_hash:
        parts.insert(0, STALE)
    parts += [
        "\n".join(case_table(results, case.name)) for case in CASES if case.must_hold and case.name in results["cases"]
    ]
    parts += ["\n".join(target_table(results)), _legend(), f"![Time in copies of the logits]({_relative(PLOT)})"]
    parts += [f"![Speed and memory against V and N]({_relative(PLOT.with_name('loss_cpu_scaling.svg'))})"]
    return "\n\n".join(parts)


def case_table(results: dict, case: str) -> list[str]:
    """Markdown lines: one provider a line, forward and backward together, in both regimes."""
    head = [
        "",
        *(f"{REGIME_TITLES[one]}, ms" for one in REGIME_TITLES),
        "copies",
        "speed-up over eager",
        "page faults",
        "extra MiB",
    ]
    lines = [f"**{results['cases'][case]}**", "", _cells(head), _cells(["---", *["---:"] * (len(head) - 1)])]
    timed = {(row.provider, row.regime): row for row in results["rows"] if row.case == case and row.phase == "both"}
    eager = timed["eager", "raised"].p50_ms
    for provider in PROVIDERS:
        raised, glibc = timed[provider.name, "raised"], timed[provider.name, "glibc"]
        lines.append(
            _cells(
                [
                    provider.name,
                    _milliseconds(raised),
                    _milliseconds(glibc),
                    f"{raised.copies:.2f}",
                    f"{eager / raised.p50_ms:.3g}",
                    f"{raised.page_faults} / {glibc.page_faults}",
                    f"{results['extra_bytes'][case][provider.name] / MEGA:.1f}",
                ]
            )
        )
    return lines


def target_table(results: dict) -> list[str]:
    """Markdown lines: every target on every case it was set for, threshold raised, and whether it held."""
    names = [case.name for case in CASES if case.must_hold and case.name in results["cases"]]
    lines = [_cells(["target", "limit", *names]), _cells(["---", "---:", *["---:"] * len(names)])]
    medians = {
        (row.case, row.provider): row.p50_ms for row in results["rows"] if (row.regime, row.phase) == ("raised", "both")
    }
    for target in TARGETS:
        cells = [target.text, f"{'>=' if target.at_least else '<='} {target.limit:g}"]
        for name in names:
            ratio = medians[name, target.above] / medians[name, target.below]
            held = ratio >= target.limit if target.at_least else ratio <= target.limit
            cells.append(f"{ratio:.2f}{'' if held else ' (missed)'}")
        lines.append(_cells(cells))
    return lines


def full_table(results: dict) -> str:
    """The Markdown file beside the results: every row, and the errors found before the timing."""
    lines = ["# Every measurement", "", _origin(results), "", _legend(), ""]
    head = [
        "case",
        "provider",
        "regime",
        "phase",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "samples",
        "GB/s",
        "copies",
        "page faults",
    ]
    lines += [_cells(head), _cells([*["---"] * 4, *["---:"] * 7])]
    for row in results["rows"]:
        times = [row.p20_ms, row.p50_ms, row.p80_ms, row.samples, row.gigabytes_per_second, row.copies, row.page_faults]
        lines.append(_cells([row.case, row.provider, row.regime, row.phase, *(f"{value:g}" for value in times)]))
    head = ["case", "provider", "error of the loss", "worst row of the gradient", "extra bytes"]
    lines += ["", "Relative errors against float64, and extra memory of forward and backward:", "", _cells(head)]
    lines.append(_cells(["---", "---", "---:", "---:", "---:"]))
    for case, errors in results["errors"].items():
        for provider, error in errors.items():
            values = [f"{error['loss']:.1e}", f"{error['gradient']:.1e}", str(results["extra_bytes"][case][provider])]
            lines.append(_cells([case, provider, *values]))
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Plot forward and backward in copies of the logits, a group of bars for each case; reproducible byte by byte."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "caref", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    names = list(results["cases"])
    shown = [provider.name for provider in PROVIDERS if provider.name != UNIT]
    rows = {(row.case, row.provider, row.regime): row for row in results["rows"] if row.phase == "both"}
    figure, axes = pyplot.subplots(figsize=(8.5, 3.6), layout="constrained")
    width = 0.8 / len(shown)
    for index, provider in enumerate(shown):
        places = [group + (index - (len(shown) - 1) / 2) * width for group in range(len(names))]
        raised = [rows[name, provider, "raised"] for name in names]
        axes.bar(places, [row.copies for row in raised], width * 0.9, label=provider)
        glibc = [rows[name, provider, "glibc"].copies for name in names]
        axes.plot(places, glibc, "_", color="black", label=REGIME_TITLES["glibc"] if index == 0 else None)
    axes.set_yscale("log")
    axes.set_xticks(
        range(len(names)),
        [results["cases"][name].replace(": ", "\n", 1).replace(", ", "\n", 1) for name in names],
        fontsize=7,
    )
    axes.set_ylabel("copies of the logits")
    axes.set_title("Forward and backward; bars: mmap threshold raised")
    axes.legend(ncols=len(shown) + 1, fontsize=7, loc="upper center")
    axes.margins(y=0.25)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Description": fingerprint(results)})
    pyplot.close(figure)


def fingerprint(results: dict) -> str:
    """Names the results that a plot was drawn from; the plot carries it."""
    drawn = [(row.case, row.provider, row.regime, row.copies) for row in results["rows"] if row.phase == "both"]
    return "results " + hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def _origin(results: dict) -> str:
    made = results["provenance"]
    state = ", with uncommitted changes" if made["dirty"] else ""
    return (
        f"Measured on {results['date']}: {made['machine']}, {made['cores']} cores, {made['threads']} threads; "
        f"{made['cpu_backend']}; torch {made['torch']} ({made['isa']}), Python {made['python']}, {made['libc']}; "
        f"commit {made['commit'][:12]}{state}. One run, repetitions interleaved, median (20th to 80th "
        f"percentile). Every provider was first verified against float64."
    )


def _legend() -> str:
    meanings = "; ".join(f"*{provider.name}*: {provider.meaning}" for provider in PROVIDERS)
    return (
        f"{meanings}. *Copies* and *speed-up over eager* compare medians of the same run with the threshold raised; "
        "page faults are per call, in the two regimes. With glibc as it is, large temporaries are mapped and faulted "
        "in anew on every call; with its mmap threshold raised, for every provider alike, memory is reused and the "
        "arithmetic is what remains. Extra memory is the peak of the resident set during forward and backward, above "
        "the logits."
    )


def _milliseconds(row: Row) -> str:
    middle, low, high = (
        f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in (row.p50_ms, row.p20_ms, row.p80_ms)
    )
    return f"{middle} ({low}-{high})"


def _cells(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    main()
