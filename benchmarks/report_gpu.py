"""The blocks of what was measured and tested on a GPU."""

from __future__ import annotations

from .cases import shape_of
from .implementations import COPY, GPU_HEADS, GPU_LOSSES
from .results_file import FOLDER, Results
from .tables import STALE, Page, absent, gigabytes_per_second, meanings, mebibytes, origin, spread, step_block
from .tables import cells as _cells
from .tables import table_head as _table_head

GPUCHECK = FOLDER / "gpucheck.json"


def gpu_block(loss: Results | None, heads: Results | None, steps: Results | None, page: Page) -> str:
    """Everything measured on a GPU: the loss, heads with their loss, training steps."""
    if loss is None and heads is None and steps is None:
        return "Not yet measured: `make bench-gpu` on a machine with a GPU fills this in."
    parts = []
    if loss is not None:
        parts += ["### The loss", gpu_loss_block(loss, page)]
    if heads is not None:
        parts += ["### A head with its loss", gpu_heads_block(heads, page)]
    if steps is not None:
        parts += ["### A training step", step_block(steps, page, "make bench-gpu", "step_gpu.json")]
    return "\n\n".join(parts)


def gpu_loss_block(results: Results, page: Page) -> str:
    """The loss on a GPU: every implementation on every case."""
    parts = origin(results, page, "make bench-gpu", on_gpu=True)
    head = ["", "forward, ms", "backward, ms", "both, ms", "call, ms", "GB/s", "% of copy", "extra MiB"]
    for case, title in results.cases.items():
        lines, rows = [f"**{title}**", "", *_table_head(head)], results.of(case)
        copy = gigabytes_per_second(title, rows[COPY])
        for name, row in rows.items():
            single = {phase: f"{row[phase][1]:.3g}" if phase in row else "" for phase in PHASES}
            speed = gigabytes_per_second(title, row)
            figures = [f"{speed:.0f}", f"{100 * speed / copy:.0f}", mebibytes(row)]
            lines.append(
                _cells([name, *list(single.values())[:2], spread(row["both_ms"]), single["call_ms"], *figures])
            )
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, f"{meanings(GPU_LOSSES)}. Data: {page.link('loss_gpu.json')}.", *absent(results)])


PHASES = ("forward_ms", "backward_ms", "call_ms")


def gpu_heads_block(results: Results, page: Page) -> str:
    """Heads with their loss on a GPU; TFLOP/s count the matrix products that the mathematics needs, none twice."""
    parts = origin(results, page, "make bench-gpu", on_gpu=True)
    for case, title in results.cases.items():
        lines = [f"**{title}**", "", *_table_head(["", "forward + backward, ms", "TFLOP/s", "extra MiB"])]
        for name, row in results.of(case).items():
            speed = f"{teraflops(title, row):.0f}"
            lines.append(_cells([name, spread(row["both_ms"]), speed, mebibytes(row)]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, f"{meanings(GPU_HEADS)}. Data: {page.link('heads_gpu.json')}.", *absent(results)])


def teraflops(title: str, row: dict) -> float:
    """Of the product that makes the logits and one for each gradient that is asked for."""
    rows, vocab, _ = shape_of(title)
    features = int(title.partition("D = ")[2].partition(",")[0])
    products = 2 if "frozen head" in title else 3
    return products * 2 * rows * vocab * features / row["both_ms"][1] / 1e9


def gpucheck_block(results: dict | None, page: Page) -> str:
    """The committed report of gpucheck, file by file, and the tests that failed, did not run or were skipped."""
    if results is None:
        return "Not yet run on a GPU: `make gpucheck` on one writes the report."
    outcomes = ("passed", "failed", "skipped", "not run")
    lines = _table_head(["tests", *outcomes, "seconds"])
    for file in results["files"]:
        lines.append(_cells([file["file"], *(str(file.get(one, 0)) for one in outcomes), f"{file['seconds']:.0f}"]))
    reasons = [
        f"- {test['test']}: {test['outcome']}. {test.get('detail', '')}".rstrip()
        for test in results["tests"]
        if test["outcome"] != "passed"
    ]
    made = results["provenance"]
    stale = [] if made["source_sha256"] == page.gpu_sources else [STALE.format(command="make gpucheck")]
    state = ", with uncommitted changes" if made["dirty"] else ""
    driver = f", driver {made['driver']}, triton {made['triton']}" if "driver" in made else ""
    text = (
        f"Run on {results['date']}: {made['machine']}{driver}; torch {made['torch']}, Python {made['python']}; commit "
        f"{made['commit'][:12]}{state}. Data: {page.link('gpucheck.json')}."
    )
    return "\n\n".join([*stale, text, "\n".join(lines), *(["\n".join(reasons)] if reasons else [])])
