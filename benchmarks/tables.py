"""The generated blocks of the documents: Markdown from results files, never from a figure in this file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .cases import logits_bytes, shape_of
from .implementations import COPY, DENSE, HEADS, LOSSES, POLICIES, Implementation
from .results_file import Results

STALE = "**Stale:** the kernel sources have changed since this was measured; `{command}` measures again."
MEGA = 2**20
MAIN_CASES = {"loss": ("flan-t5", "llama-3"), "linear": ("narrow",)}


class Page(NamedTuple):
    """Where a block stands: the way from its document to the root of the tree, and the hashes of today's sources."""

    root: str
    cpu_sources: str
    gpu_sources: str

    def link(self, file: str) -> str:
        """A link to a results file."""
        return f"[{file}]({self.root}benchmarks/results/{file})"

    def image(self, text: str, file: str) -> str:
        """A plot."""
        return f"![{text}]({self.root}benchmarks/results/{file})"


class Target(NamedTuple):
    """A ratio of two medians of forward and backward, set before anything was measured."""

    text: str
    above: str
    below: str
    limit: float
    at_least: bool = True


LOSS_TARGETS = (
    Target("times that cpu is faster than eager", "eager", "cpu", 8.0),
    Target("times that cpu is faster than compiled", "compiled", "cpu", 2.0),
    Target("times that cpu-inplace is faster than compiled", "compiled", "cpu-inplace", 3.0),
    Target("times that cpu is faster than cross-entropy alone", "cross-entropy", "cpu", 1.0),
    Target("time of cpu-inplace in copies of the logits", "cpu-inplace", COPY, 2.5, at_least=False),
)
HEAD_TARGETS = (
    Target("times that fused is faster than eager", "eager", "fused", 3.0),
    Target("times that fused is faster than torch-chunked, cross-entropy alone", "torch-chunked", "fused", 1.0),
    Target("times that fused is faster than torch-same-chunks, cross-entropy alone", "torch-same-chunks", "fused", 1.0),
)
# Largest extra memory of linear_caref_loss, as a share of the logits.
MEMORY_SHARE = 0.25
# Set beforehand for exp(H): masked / dense at most, eager / masked at least.
MOST_DENSE, LEAST_EAGER = 2.0, 10.0


# -------------------------------------------------------------------------------------------------------- the summary


class Summary(NamedTuple):
    """Which cases of which files the README shows; ``own`` is the implementation that stands for ``caref_loss``."""

    files: tuple[str, str]
    cases: tuple[str, str]
    own: str
    on_gpu: bool


ON_CPU = Summary(("loss_cpu.json", "linear_cpu.json"), ("flan-t5", "narrow"), "cpu", on_gpu=False)
ON_GPU = Summary(("loss_gpu.json", "heads_gpu.json"), ("llama-3", "llama-3"), "triton", on_gpu=True)


def summary(found: tuple[Results | None, Results | None], of: Summary, page: Page) -> str:
    """Six rows: time and extra memory of one case of logits and one of a head.

    Args:
        found: results of the loss and of heads.
        of: which cases are shown.
        page: where the block stands.
    """
    loss, heads = found
    if loss is None or heads is None:
        return not_measured("make bench bench-linear")
    rows = (
        ("CAREF in plain PyTorch", "eager", "eager"),
        ("CAREF with `torch.compile`", "compiled", None),
        ("`F.cross_entropy` alone", "cross-entropy", "cross-entropy"),
        ("`caref_loss`", of.own, "logits"),
        ("`caref_loss`, `inplace_backward=True`", f"{of.own}-inplace", None),
        ("`linear_caref_loss`", None, "fused"),
    )
    of_loss, of_heads = loss.of(of.cases[0]), heads.of(of.cases[1])
    lines = table_head(["forward and backward", "logits, ms", "extra MiB", "head, ms", "extra MiB"])
    for text, name, head_name in rows:
        lines.append(cells([text, *_figures(of_loss.get(name)), *_figures(of_heads.get(head_name))]))
    stale = [one for one in found if not _is_current(one, page, of.on_gpu)]
    note = ["**Stale:** the kernel sources have changed since these figures were measured."] if stale else []
    (n, v, dtype), (m, w, _) = (shape_of(one.cases[name]) for one, name in zip(found, of.cases, strict=True))
    sizes = [logits_bytes(one.cases[name]) / MEGA for one, name in zip(found, of.cases, strict=True)]
    made = loss.provenance
    where = f"{made['machine']}, {made['threads']} threads" if "threads" in made else made["machine"]
    text = (
        f"Measured in {dtype} on {where}: logits of {n:,} × {v:,}, {sizes[0]:,.0f} MiB, on {loss.date} at commit "
        f"{made['commit'][:12]}; a head with logits of {m:,} × {w:,}, {sizes[1]:,.0f} MiB, after `F.linear` for all "
        f"but the last row, on {heads.date} at commit {heads.provenance['commit'][:12]}. Data: "
        f"{page.link(of.files[0])}, {page.link(of.files[1])}."
    )
    return "\n\n".join([*note, "\n".join(lines), text])


def _figures(row: dict | None) -> list[str]:
    if row is None:
        return ["", ""]
    middle = row["both_ms"][1]
    return [f"{middle:.1f}" if middle < 100 else f"{middle:,.0f}", f"{row['extra_bytes'] / MEGA:,.0f}"]


# ------------------------------------------------------------------------------------------------ the loss and its mask


def loss_block(results: Results | None, page: Page) -> str:
    """The loss on a CPU: origin, the main cases with both settings of the allocator, targets, legend."""
    if results is None:
        return not_measured("make bench")
    parts = origin(results, page, "make bench")
    parts += ["\n".join(_loss_case(results, case)) for case in MAIN_CASES["loss"] if case in results.cases]
    parts.append("\n".join(target_table(results, "loss", LOSS_TARGETS)))
    parts.append(
        f"{meanings(LOSSES)}. *Copies* and *speed-up over eager* compare medians of the same run with raised "
        "thresholds; page faults are per call, with raised and with default thresholds. With glibc's default "
        "thresholds large temporaries are mapped and faulted in again on every call; with raised thresholds, for "
        "every implementation alike, memory is reused and only the arithmetic is compared. Extra memory is the peak "
        "of the resident set during forward and backward, above the logits. All other cases, and the errors against "
        f"float64, are in {page.link('loss_cpu.json')}."
    )
    return "\n\n".join([*parts, *absent(results)])


def _loss_case(results: Results, case: str) -> list[str]:
    head = ["", "ms", "ms with default thresholds", "copies", "speed-up over eager", "page faults", "extra MiB"]
    lines = [f"**{results.cases[case]}**", "", *table_head(head)]
    rows = results.of(case)
    for name, row in rows.items():
        default, middle = row["default_allocator"], row["both_ms"][1]
        figures = [f"{middle / rows[COPY]['both_ms'][1]:.2f}", f"{rows['eager']['both_ms'][1] / middle:.3g}"]
        faults = f"{row['page_faults']} / {default['page_faults']}"
        lines.append(
            cells([name, spread(row["both_ms"]), spread(default["both_ms"]), *figures, faults, mebibytes(row, 1)])
        )
    return lines


def target_table(results: Results, kind: str, targets: tuple[Target, ...]) -> list[str]:
    """Markdown lines: every target on the main cases, and whether it was reached."""
    names = [name for name in MAIN_CASES[kind] if name in results.cases]
    lines = table_head(["target", "limit", *names])
    for target in targets:
        shown = [target.text, f"{'>=' if target.at_least else '<='} {target.limit:g}"]
        for name in names:
            rows = results.of(name)
            if target.above not in rows or target.below not in rows:
                shown.append("not measured")
                continue
            ratio = rows[target.above]["both_ms"][1] / rows[target.below]["both_ms"][1]
            reached = ratio >= target.limit if target.at_least else ratio <= target.limit
            shown.append(f"{ratio:.2f}{'' if reached else ' (missed)'}")
        lines.append(cells(shown))
    return lines


def sparse_block(results: Results | None, page: Page) -> str:
    """The masked loss on a CPU against the dense one and against torch.topk."""
    if results is None:
        return not_measured("make bench-sparse")
    lines = table_head(["case", "k", "mean k", "masked, ms", "torch.topk, ms", "masked / dense", "torch.topk / masked"])
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
    for case, title in results.cases.items():
        rows = results.of(case)
        dense = rows[DENSE]["both_ms"][1]
        for name in POLICIES:
            fused, eager = rows[f"fused {name}"], rows[f"eager {name}"]
            both = fused["both_ms"][1], eager["both_ms"][1]
            ratios[name].append((both[0] / dense, both[1] / both[0]))
            times = [f"{row['forward_ms'][1]:.3g} + {row['backward_ms'][1]:.3g}" for row in (fused, eager)]
            kept = f"{fused['mean_num_kept']:.0f}"
            lines.append(cells([title, name, kept, *times, f"{both[0] / dense:.2f}", f"{both[1] / both[0]:.1f}"]))
    every = [pair for pairs in ratios.values() for pair in pairs]
    text = (
        f"Forward and backward with a mask take {_range(one for one, _ in every)} times the dense loss; plain PyTorch "
        f"with `torch.topk` takes {_range(other for _, other in every)} times as long as that. For k = exp(H) a limit "
        f"of {MOST_DENSE:g} times the dense loss was set beforehand, and {_range(one for one, _ in ratios['exp(H)'])} "
        f"times were measured; the mask was to be {LEAST_EAGER:g} times as fast as `torch.topk`, and was "
        f"{_range(other for _, other in ratios['exp(H)'])} times as fast. Times are forward + backward. "
        f"Data: {page.link('sparse_cpu.json')}."
    )
    return "\n\n".join([*origin(results, page, "make bench-sparse"), text, "\n".join(lines), *absent(results)])


# ------------------------------------------------------------------------------------------------------ heads and steps


def linear_block(results: Results | None, page: Page) -> str:
    """Heads on a CPU: origin, every case, targets, legend."""
    if results is None:
        return not_measured("make bench-linear")
    parts = origin(results, page, "make bench-linear")
    parts += ["\n".join(_head_case(results, case)) for case in results.cases]
    lines = target_table(results, "linear", HEAD_TARGETS)
    shown = [name for name in MAIN_CASES["linear"] if name in results.cases]
    shares = [results.of(name)["fused"]["extra_bytes"] / logits_bytes(results.cases[name]) for name in shown]
    texts = [f"{share:.1%}{'' if share < MEMORY_SHARE else ' (missed)'}" for share in shares]
    lines.append(cells(["extra memory of fused, of the logits", f"< {MEMORY_SHARE:.0%}", *texts]))
    parts += ["\n".join(lines)]
    parts.append(
        f"{meanings(HEADS)}. Extra memory is the peak of the resident set during forward and backward, above hidden, "
        f"weight and labels; the gradients are part of it. Data: {page.link('linear_cpu.json')}."
    )
    return "\n\n".join([*parts, *absent(results)])


def _head_case(results: Results, case: str) -> list[str]:
    head = ["", "forward + backward, s", "speed-up over eager", "extra MiB", "of the logits", "worst gradient error"]
    lines = [f"**{results.cases[case]}**", "", *table_head(head)]
    rows = results.of(case)
    for name, row in rows.items():
        worst = max(error for which, error in row["errors"].items() if which.startswith("gradient"))
        extra = row.get("extra_bytes")
        share = "" if extra is None else f"{extra / logits_bytes(results.cases[case]):.0%}"
        figures = [f"{rows['eager']['both_ms'][1] / row['both_ms'][1]:.3g}", mebibytes(row), share]
        lines.append(cells([name, spread([one / 1e3 for one in row["both_ms"]]), *figures, f"{worst:.1e}"]))
    return lines


def step_block(results: Results | None, page: Page, command: str, file: str) -> str:
    """One optimiser step with each loss."""
    if results is None:
        return not_measured(command)
    parts = origin(results, page, command, on_gpu=file == "step_gpu.json")
    for case, title in results.cases.items():
        rows = results.of(case)
        limit = next((row["limit_bytes"] for row in rows.values() if "limit_bytes" in row), None)
        head = ["", "step, s", "peak memory, MiB"]
        head += [] if limit is None else [f"largest batch within {limit / 2**30:g} GiB"]
        lines = [f"**{title}**", "", *table_head(head)]
        for name, row in rows.items():
            peak = f"{row['peak_bytes'] / MEGA:.0f}" if "peak_bytes" in row else ""
            batch = [] if limit is None else [str(row.get("largest_batch", ""))]
            lines.append(cells([name, spread([one / 1e3 for one in row["step_ms"]]), peak, *batch]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *absent(results), f"Data: {page.link(file)}."])


# -------------------------------------------------------------------------------------------------------------- helpers


def gigabytes_per_second(title: str, row: dict) -> float:
    """Bytes that a perfect streaming implementation moves per second of forward and backward.

    The forward pass reads the logits, the backward pass reads them and writes the gradient; the copy reads and writes
    once.
    """
    passes = 2 if row["implementation"] == COPY else 3
    return passes * logits_bytes(title) / row["both_ms"][1] / 1e6


def not_measured(command: str) -> str:
    """What a block says without results."""
    return f"Not yet measured: `{command}` fills this in."


def _is_current(results: Results, page: Page, on_gpu: bool) -> bool:
    return results.provenance["source_sha256"] == (page.gpu_sources if on_gpu else page.cpu_sources)


def origin(results: Results, page: Page, command: str, on_gpu: bool = False) -> list[str]:
    """The note that figures are stale, if they are, and where they come from."""
    made = results.provenance
    details, raised = [made["machine"]], ""
    if "threads" in made:
        details[0] += f", {made['cores']} cores, {made['threads']} threads"
        raised = ", glibc's allocator thresholds raised"
        details += [made["cpu_backend"], f"torch {made['torch']} ({made['isa']})", f"{made['libc']}"]
    else:
        details += [f"driver {made['driver']}", f"triton {made['triton']}", f"torch {made['torch']}"]
    state = ", with uncommitted changes" if made["dirty"] else ""
    text = (
        f"Measured on {results.date}: {'; '.join(details)}; Python {made['python']}; commit {made['commit'][:12]}"
        f"{state}. One run, repetitions interleaved{raised}; median (20th to 80th percentile)."
    )
    return [text] if _is_current(results, page, on_gpu) else [STALE.format(command=command), text]


def meanings(implementations: Iterable[Implementation]) -> str:
    """What every name in a table stands for."""
    texts = {one: one.meaning for one in implementations}
    for one, text in texts.items():
        if one.part == "ce" and "alone" not in text:
            texts[one] += " (cross-entropy alone)"
    return "; ".join(f"*{one.name}*: {text}" for one, text in texts.items())


def absent(results: Results) -> list[str]:
    """Which implementations and cases were not measured, and why: one line for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case, found in results.absent.items():
        for name, reason in found.items():
            reasons.setdefault((name, reason), []).append(case)
    lines = []
    for (name, reason), where in reasons.items():
        in_some = "" if len(where) == len(results.cases) else f" ({', '.join(where)})"
        lines.append(f"- {name}{in_some}: {reason}")
    lines += [f"- case {case}: {reason}" for case, reason in results.left_out.items()]
    return ["Not measured:\n\n" + "\n".join(lines)] if lines else []


def spread(values: list[float]) -> str:
    """Median (20th to 80th percentile)."""
    low, middle, high = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values)
    return f"{middle} ({low}-{high})"


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2g} to {max(found):.2g}"


def mebibytes(row: dict, digits: int = 0) -> str:
    """Extra memory in MiB; nothing where it was not measured."""
    return f"{row['extra_bytes'] / MEGA:.{digits}f}" if "extra_bytes" in row else ""


def table_head(names: list[str]) -> list[str]:
    """The first two lines of a Markdown table; all columns but the first are numbers."""
    return [cells(names), cells(["---", *["---:"] * (len(names) - 1)])]


def cells(values: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(values) + " |"
