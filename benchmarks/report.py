"""`python -m benchmarks.report`: tables and plots of the documents from the committed results; nothing is measured.

Fills every `<!-- benchmarks:NAME -->` ... `<!-- /benchmarks:NAME -->` of README.md and docs/, and draws the plots
beside the results.  Run it again after a change of the kernels: it then marks the figures as stale.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import harness, num_kept, plots, tables
from .report_gpu import GPUCHECK, gpu_block, gpucheck_block
from .results_file import FOLDER, Results, load
from .sources import ROOT, source_hash
from .tables import ON_CPU, ON_GPU, Page

MARKED = re.compile(r"<!-- benchmarks:([\w-]+) -->\n(.*?)<!-- /benchmarks:\1 -->", re.DOTALL)
MARKER = re.compile(r"<!-- /?benchmarks:")
# What the plots show, with their labels.
LINES = {
    "eager": "plain PyTorch",
    "compiled": "torch.compile",
    "cross-entropy": "cross-entropy alone",
    "cpu": "caref_loss",
    "triton": "caref_loss",
}
BARS = LINES | {"cpu-inplace": "caref_loss, in place", "triton-inplace": "caref_loss, in place"}
SCALES = {f"EntropyTopK({scale:g})": f"scale = {scale:g}" for scale in num_kept.SCALES}


def main() -> None:
    """Rewrite the blocks and the plots, and the report of the harness; print how the targets fared."""
    harness.write_report()
    for path, draw in drawings().items():
        draw(path)
    for document in documents():
        text = document.read_text(encoding="utf-8")
        document.write_text(fill(text, document), encoding="utf-8")
    loss = load(FOLDER / "loss_cpu.json")
    if loss is not None:
        sys.stdout.write("\n".join(tables.target_table(loss, "loss", tables.LOSS_TARGETS)) + "\n")


def documents() -> list[Path]:
    """README.md and the pages of docs/ that have a block."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in pages if MARKER.search(path.read_text(encoding="utf-8"))]


def fill(text: str, document: Path) -> str:
    """``text`` with every block as the committed results give it; ``document`` is where it stands.

    Raises:
        ValueError: a marker without its counterpart, or of a block that does not exist.
    """
    made = blocks(document)

    def replace(match: re.Match) -> str:
        name = match[1]
        if name not in made:
            raise ValueError(f"{document.name}: blocks must be among {', '.join(made)}; got {name!r}")
        return f"<!-- benchmarks:{name} -->\n{made[name]()}\n<!-- /benchmarks:{name} -->"

    filled, count = MARKED.subn(replace, text)
    if len(MARKER.findall(text)) != 2 * count:
        raise ValueError(f"{document.name}: every <!-- benchmarks:NAME --> needs its <!-- /benchmarks:NAME -->")
    return filled


def blocks(document: Path) -> dict[str, Callable[[], str]]:
    """What makes each block of ``document``, by the name of its markers."""
    root = os.path.relpath(ROOT, document.parent)
    page = Page("" if root == "." else f"{root}/", source_hash(), source_hash(kind="gpu"))
    return {
        "summary": lambda: _summary(page),
        "loss": lambda: _with_plots(tables.loss_block(_load("loss_cpu"), page), page, "loss_cpu"),
        "linear": lambda: tables.linear_block(_load("linear_cpu"), page),
        "sparse": lambda: tables.sparse_block(_load("sparse_cpu"), page),
        "num-kept": lambda: num_kept.block(load_json(num_kept.FILE), page),
        "step": lambda: tables.step_block(_load("step_cpu"), page, "make bench", "step_cpu.json"),
        "gpu": lambda: _with_plots(
            gpu_block(_load("loss_gpu"), _load("heads_gpu"), _load("step_gpu"), page), page, "loss_gpu"
        ),
        "gpucheck": lambda: gpucheck_block(load_json(GPUCHECK), page),
        "harness": lambda: harness.block(harness.study(), page),
    }


def drawings() -> dict[Path, Callable[[Path], None]]:
    """Every plot whose results there are, and what draws it."""
    found: dict[Path, Callable[[Path], None]] = {}
    for name in ("loss_cpu", "loss_gpu"):
        results = _load(name)
        if results is not None:
            found[FOLDER / f"{name}.png"] = partial(plots.draw_bars, results, "llama-3", BARS)
            found[FOLDER / f"{name}_scaling.png"] = partial(plots.draw_scaling, results, LINES)
    kept = load_json(num_kept.FILE)
    if kept is not None:
        found[FOLDER / "num_kept.png"] = partial(plots.draw_num_kept, kept, SCALES)
    return found


def load_json(path: Path) -> dict | None:
    """What ``path`` holds; ``None`` if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _load(name: str) -> Results | None:
    return load(FOLDER / f"{name}.json")


def _summary(page: Page) -> str:
    """The GPU's figures if there are any, and otherwise the CPU's."""
    on_gpu = _load("loss_gpu"), _load("heads_gpu")
    found, of = (on_gpu, ON_GPU) if None not in on_gpu else ((_load("loss_cpu"), _load("linear_cpu")), ON_CPU)
    text = tables.summary(found, of, page)
    name = of.files[0].replace(".json", ".png")
    return text if None in found else f"{text}\n\n{page.image('Time and extra memory of the loss', name)}"


def _with_plots(text: str, page: Page, name: str) -> str:
    if _load(name) is None:
        return text
    images = page.image("Time and extra memory", f"{name}.png"), page.image("Speed", f"{name}_scaling.png")
    return "\n\n".join([text, *images])


if __name__ == "__main__":
    main()
