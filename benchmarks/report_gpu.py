"""The README's blocks of what was measured on a GPU, of training steps, and of the last report of gpucheck."""

from __future__ import annotations

from pathlib import Path

from .provenance import ROOT

GPUCHECK = ROOT / "benchmarks" / "results" / "gpucheck.json"
STALE = "**Stale:** the kernel sources have changed since this was measured; `{command}` measures again."
MEGA = 2**20


def gpu_block(loss: dict | None, heads: dict | None, steps: dict | None, current_hash: str) -> str:
    """Everything measured on a GPU: the loss, heads with their loss, training steps."""
    if loss is None and heads is None and steps is None:
        return "Not yet measured: `make bench-gpu` on a machine with a GPU fills this in."
    parts = []
    if loss is not None:
        parts += ["### The loss", loss_block(loss, current_hash)]
    if heads is not None:
        parts += ["### A head with its loss", heads_block(heads, current_hash)]
    if steps is not None:
        parts += ["### A training step", step_block(steps, current_hash, "make bench-gpu")]
    return "\n\n".join(parts)


def loss_block(results: dict, current_hash: str) -> str:
    """The loss on a GPU: every provider on every case."""
    parts = [*_head(results, current_hash, "make bench-gpu")]
    for case, title in results["cases"].items():
        rows = {(row["provider"], row["phase"]): row for row in results["rows"] if row["case"] == case}
        names = list(dict.fromkeys(provider for provider, _ in rows))
        head = ["", "forward, ms", "backward, ms", "both, ms (20th-80th)", "call, ms", "GB/s", "% of copy", "extra MiB"]
        lines = [f"**{title}**", "", *_table_head(head)]
        for name in names:
            both = rows[name, "both"]
            single = [f"{rows[name, phase]['p50_ms']:.3g}" if (name, phase) in rows else "" for phase in PHASES]
            both_ms = f"{both['p50_ms']:.3g} ({both['p20_ms']:.3g}-{both['p80_ms']:.3g})"
            speed = [f"{both['gigabytes_per_second']:.0f}", f"{both['percent_of_copy']:.0f}"]
            lines.append(_cells([name, *single[:2], both_ms, single[2], *speed, _mebibytes(results, case, name)]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *_absent(results)])


PHASES = ("forward", "backward", "call")


def heads_block(results: dict, current_hash: str) -> str:
    """Heads with their loss on a GPU."""
    parts = [*_head(results, current_hash, "make bench-gpu")]
    for case, title in results["cases"].items():
        rows = [row for row in results["rows"] if row["case"] == case and row["phase"] == "both"]
        lines = [f"**{title}**", "", *_table_head(["", "forward + backward, ms (20th-80th)", "TFLOP/s", "extra MiB"])]
        for row in rows:
            times = f"{row['p50_ms']:.4g} ({row['p20_ms']:.4g}-{row['p80_ms']:.4g})"
            memory = _mebibytes(results, case, row["provider"])
            lines.append(_cells([row["provider"], times, f"{row['teraflops']:.0f}", memory]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *_absent(results)])


def step_block(results: dict | None, current_hash: str, command: str) -> str:
    """One optimiser step with each loss."""
    if results is None:
        return f"Not yet measured: `{command}` fills this in."
    parts = [*_head(results, current_hash, command)]
    for case, title in results["cases"].items():
        rows = [row for row in results["rows"] if row["case"] == case]
        limit = rows[0]["limit_bytes"]
        head = ["", "step, s (20th-80th)", "peak memory, MiB"]
        head += [] if limit is None else [f"largest batch within {limit / 2**30:g} GiB"]
        lines = [f"**{title}**", "", *_table_head(head)]
        for row in rows:
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MEGA:.0f}"
            cells = [row["loss"], f"{row['p50_s']:.3g} ({row['p20_s']:.3g}-{row['p80_s']:.3g})", peak]
            cells += [] if limit is None else ["" if row["largest_batch"] is None else str(row["largest_batch"])]
            lines.append(_cells(cells))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *(f"{name}: {reason}." for name, reason in results["left_out"].items())])


def gpucheck_block(results: dict | None, current_hash: str) -> str:
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
    stale, text = _origin(results, current_hash, "make gpucheck", "Run")
    return "\n\n".join([*stale, text, "\n".join(lines), *(["\n".join(reasons)] if reasons else [])])


def _head(results: dict, current_hash: str, command: str) -> list[str]:
    stale, text = _origin(results, current_hash, command, "Measured")
    return [*stale, f"{text} Median of one run, repetitions interleaved."]


def _origin(results: dict, current_hash: str, command: str, verb: str) -> tuple[list[str], str]:
    """(A warning if the sources have changed, the machine and the versions)."""
    made = results["provenance"]
    stale = [] if made["source_sha256"] == current_hash else [STALE.format(command=command)]
    state = ", with uncommitted changes" if made["dirty"] else ""
    more = f", driver {made['driver']}, triton {made['triton']}" if "driver" in made else ""
    threads = f", {made['threads']} threads" if "threads" in made else ""
    return stale, (
        f"{verb} on {results['date']}: {made['machine']}{threads}{more}; torch {made['torch']}, Python "
        f"{made['python']}; commit {made['commit'][:12]}{state}."
    )


def _absent(results: dict) -> list[str]:
    """Who did not run, and why: one line for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case, absent in results["absent"].items():
        for name, reason in absent.items():
            reasons.setdefault((name, reason), []).append(case)
    lines = []
    for (name, reason), cases in reasons.items():
        where = "" if len(cases) == len(results["cases"]) else f" ({', '.join(cases)})"
        lines.append(f"- {name}{where}: {reason}")
    lines += [f"- case {case}: {reason}" for case, reason in results["left_out"].items()]
    return ["Not measured:\n\n" + "\n".join(lines)] if lines else []


def _mebibytes(results: dict, case: str, name: str) -> str:
    extra = results["extra_bytes"][case][name]
    return "" if extra is None else f"{extra / MEGA:.0f}"


def _table_head(cells: list[str]) -> list[str]:
    return [_cells(cells), _cells(["---", *["---:"] * (len(cells) - 1)])]


def _cells(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def relative(path: Path) -> str:
    """As a link of the README."""
    return path.relative_to(ROOT).as_posix()
