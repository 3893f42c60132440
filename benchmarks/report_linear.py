"""`python -m benchmarks.report_linear`: the README's table of heads, and every figure beside the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .linear_cases import CASES, PROVIDERS
from .measure_linear import RESULTS, HeadRow
from .provenance import ROOT, source_hash
from .report import NOT_MEASURED, Target, splice

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmark-linear:begin -->", "<!-- benchmark-linear:end -->"
FULL_TABLE = RESULTS.with_suffix(".md")
STALE = "**Stale:** the kernel sources have changed since this was measured; `make bench-linear` measures again."
MEGA = 2**20
MEMORY_SHARE = 0.25
TARGETS = (
    Target("times that fused is faster than eager", "eager", "fused", 3.0),
    Target("times that fused is faster than torch-chunked, cross-entropy alone", "torch-chunked", "fused", 1.0),
    Target(
        "times that fused is faster than torch-chunked-as-ours, cross-entropy alone",
        "torch-chunked-as-ours",
        "fused",
        1.0,
    ),
)


def main() -> None:
    """Rewrite the README block and the full table; print how the targets fared."""
    results = load(RESULTS)
    README.write_text(splice(README.read_text(), readme_block(results, source_hash()), BEGIN, END))
    if results is not None:
        FULL_TABLE.write_text(full_table(results))
        sys.stdout.write("\n".join(target_table(results)) + "\n")


def load(path: Path) -> dict | None:
    """The results in ``path``, every row checked; ``None`` if there are none yet.

    Raises:
        ValueError, TypeError: a row without machine or commit, or with other fields than :class:`HeadRow`.
    """
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    results["rows"] = [HeadRow(**row) for row in results["rows"]]
    return results


def readme_block(results: dict | None, current_hash: str) -> str:
    """What README.md shows: origin, the case of the targets, the targets, and what is missing."""
    if results is None:
        return NOT_MEASURED.replace("make bench", "make bench-linear")
    parts = [_origin(results)]
    if results["provenance"]["source_sha256"] != current_hash:
        parts.insert(0, STALE)
    parts += ["\n".join(case_table(results, case.name)) for case in _shown(results)]
    parts += ["\n".join(target_table(results)), _legend(results)]
    return "\n\n".join(parts)


def case_table(results: dict, case: str) -> list[str]:
    """Markdown lines: one provider a line."""
    head = ["", "forward and backward, s", "speed-up over eager", "extra MiB", "share of the logits"]
    lines = [f"**{results['cases'][case]}**", "", _cells(head), _cells(["---", *["---:"] * (len(head) - 1)])]
    rows = {row.provider: row for row in results["rows"] if row.case == case}
    eager = rows["eager"].p50_s
    for provider in PROVIDERS:
        row = rows[provider.name]
        share = row.extra_bytes / results["logits_bytes"][case]
        times = f"{row.p50_s:.3g} ({row.p20_s:.3g}-{row.p80_s:.3g})"
        cells = [provider.name, times, f"{eager / row.p50_s:.3g}", f"{row.extra_bytes / MEGA:.0f}", f"{share:.0%}"]
        lines.append(_cells(cells))
    return lines


def target_table(results: dict) -> list[str]:
    """Markdown lines: every target on every case it was set for, and whether it held."""
    shown = [case.name for case in _shown(results)]
    lines = [_cells(["target", "limit", *shown]), _cells(["---", "---:", *["---:"] * len(shown)])]
    rows = {(row.case, row.provider): row for row in results["rows"]}
    for target in TARGETS:
        ratios = [rows[name, target.above].p50_s / rows[name, target.below].p50_s for name in shown]
        cells = [f"{ratio:.2f}{'' if ratio >= target.limit else ' (missed)'}" for ratio in ratios]
        lines.append(_cells([target.text, f">= {target.limit:g}", *cells]))
    shares = [rows[name, "fused"].extra_bytes / results["logits_bytes"][name] for name in shown]
    cells = [f"{share:.1%}{'' if share < MEMORY_SHARE else ' (missed)'}" for share in shares]
    lines.append(_cells(["extra memory of fused, of the logits", f"< {MEMORY_SHARE:.0%}", *cells]))
    return lines


def full_table(results: dict) -> str:
    """The Markdown file beside the results: every row, and the errors found before the timing."""
    lines = ["# Every measurement of heads", "", _origin(results), "", _legend(results), ""]
    lines += ["\n".join([*case_table(results, case), ""]) for case in results["cases"]]
    lines += ["Relative errors against float64 on the first rows:", ""]
    lines += [_cells(["case", "provider", "loss", "worst gradient", "samples"]), _cells(["---", "---", *["---:"] * 3])]
    samples = {(row.case, row.provider): row.samples for row in results["rows"]}
    for case, errors in results["errors"].items():
        for provider, error in errors.items():
            values = [f"{error['loss']:.1e}", f"{error['gradient']:.1e}", str(samples[case, provider])]
            lines.append(_cells([case, provider, *values]))
    return "\n".join(lines) + "\n"


def _shown(results: dict):
    return [case for case in CASES if case.must_hold and case.name in results["cases"]]


def _origin(results: dict) -> str:
    made = results["provenance"]
    state = ", with uncommitted changes" if made["dirty"] else ""
    return (
        f"Measured on {results['date']}: {made['machine']}, {made['cores']} cores, {made['threads']} threads; "
        f"{made['cpu_backend']}; torch {made['torch']} ({made['isa']}), Python {made['python']}, {made['libc']}; "
        f"commit {made['commit'][:12]}{state}. One run, repetitions interleaved, median (20th to 80th percentile), "
        f"mmap threshold raised. Every provider was first verified against float64."
    )


def _legend(results: dict) -> str:
    meanings = "; ".join(
        f"*{one.name}*: {one.meaning}{' (cross-entropy alone)' if one.part == 'ce' else ''}" for one in PROVIDERS
    )
    missing = "; ".join(f"{one['peer']} ({one['reason']})" for one in results["missing"])
    return (
        f"{meanings}. Extra memory is the peak of the resident set during forward and backward, above hidden, weight "
        f"and labels; the gradients are part of it. Not measured: {missing}; and no GPU."
    )


def _cells(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


if __name__ == "__main__":
    main()
