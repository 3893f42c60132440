"""What the documents say of the results: every block, from made-up results and from the committed ones."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import cases, measure, num_kept, plots, report, report_gpu, results_file, step, tables
from benchmarks.results_file import Results
from benchmarks.tables import Page

PAGE = Page("../", "current", "current")
ORIGIN = dict.fromkeys(("machine", "cores", "threads", "isa", "cpu_backend", "libc", "python", "torch"), "x")
ORIGIN |= {"commit": "c" * 40, "dirty": False, "source_sha256": "current"}


def _results(suite: str, times: dict[str, float] | None = None, **changes) -> Results:
    """Results of a suite in which eager takes 10 ms, the copy 1, and everything else 5 unless ``times`` has it."""
    known = measure.SUITES[suite]
    times = {"copy": 1.0, "eager": 10.0} | (times or {})
    phases = ("forward_ms", "backward_ms", "both_ms", "call_ms")
    errors = {"errors": {"loss": 1e-7, "gradient": 1e-6}}
    rows = []
    for case in known.cases:
        for one in known.implementations:
            timed = {phase: [9.0, times.get(one.name, 5.0), 11.0] for phase in phases}
            extra = {"extra_bytes": 10 * case.logits_bytes if one.name == "eager" else case.logits_bytes // 5}
            row = {"case": case.name, "implementation": one.name, "samples": 9, "page_faults": 0} | errors | timed
            rows.append(row | extra | {"default_allocator": timed | {"page_faults": 3}, "mean_num_kept": 8})
    titles = {case.name: case.title for case in known.cases}
    return Results("2026-01-01", ORIGIN | changes, titles, rows=rows)


def _gpu(suite: str) -> Results:
    made = _results(suite)
    made.provenance = {key: value for key, value in made.provenance.items() if key != "threads"}
    made.provenance |= {"driver": "580", "triton": "3"}
    return made


def _steps() -> Results:
    rows = [
        {"case": "t5-small", "implementation": name, "samples": 3, "step_ms": [100.0, 152.0, 200.0], "value": 1.0}
        | {"peak_bytes": 2**20, "largest_batch": 9, "limit_bytes": 2**30}
        for name in step.NAMES
    ]
    rows += [{**row, "case": "smollm2"} for row in rows]
    for row in rows[4:]:
        del row["peak_bytes"], row["largest_batch"], row["limit_bytes"]
    titles = {case.name: case.title for case in step.CPU_CASES}
    return Results("2026-01-01", dict(ORIGIN), titles, {}, {"smollm2/memory": "stopped after 9 s"}, rows)


BLOCKS = {
    "loss": lambda results, page: tables.loss_block(results, page),
    "linear": lambda results, page: tables.linear_block(results, page),
    "sparse": lambda results, page: tables.sparse_block(results, page),
    "step": lambda results, page: tables.step_block(results, page, "make bench", "step_cpu.json"),
    "gpu": lambda results, page: report_gpu.gpu_block(results, None, None, page),
    "heads-gpu": lambda results, page: report_gpu.gpu_block(None, results, None, page),
    "summary": lambda results, page: tables.summary((results, _results("linear")), tables.ON_CPU, page),
}
MADE = {name: (lambda name=name: _results(name)) for name in ("loss", "linear", "sparse")}
MADE |= {"step": _steps, "gpu": lambda: _gpu("gpu"), "heads-gpu": lambda: _gpu("heads-gpu")}
MADE |= {"summary": lambda: _results("loss")}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_says_what_is_stale_and_what_was_not_measured(name: str) -> None:
    results = MADE[name]()
    text = BLOCKS[name](results, PAGE)
    assert "Stale" not in text
    assert re.search(r"\]\(\.\./benchmarks/results/\w+\.json\)", text)
    assert "**Stale:**" in BLOCKS[name](results, Page("", "other", "other"))
    assert BLOCKS[name](None, PAGE).startswith("Not yet measured: `make bench")
    if name != "summary":
        assert "uncommitted" not in text
        results.provenance["dirty"] = True
        assert "with uncommitted changes" in BLOCKS[name](results, PAGE)
        results.absent = {case: {"another": "needs a GPU"} for case in results.cases}
        assert "- another: needs a GPU" in BLOCKS[name](results, PAGE)


@pytest.mark.parametrize("name", ["loss", "linear", "gpu", "heads-gpu"])
def test_a_block_shows_every_implementation(name: str) -> None:
    text = BLOCKS[name](MADE[name](), PAGE)
    assert all(f"\n| {one.name} | " in text for one in measure.SUITES[name].implementations)
    for case in measure.SUITES[name].cases:
        assert (case.title in text) == (name != "loss" or case.main)


def test_the_main_cases_are_those_that_the_tables_show() -> None:
    for kind, names in tables.MAIN_CASES.items():
        assert names == tuple(case.name for case in measure.SUITES[kind].cases if case.main)


def test_the_summary_has_six_rows_of_speed_and_memory() -> None:
    text = tables.summary((_results("loss"), _results("linear")), tables.ON_CPU, PAGE)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6
    assert "| CAREF in plain PyTorch | 10.0 | 314 | 10.0 | 5,020 |" in rows
    assert "| `linear_caref_loss` |  |  | 5.0 | 100 |" in rows
    on_gpu = tables.summary((_gpu("gpu"), _gpu("heads-gpu")), tables.ON_GPU, PAGE)
    assert on_gpu.count("\n| ") == len(rows) - 1
    assert "loss_gpu.json" in on_gpu
    stale = copy.deepcopy(_results("linear"))
    stale.provenance["source_sha256"] = "older"
    assert tables.summary((_results("loss"), stale), tables.ON_CPU, PAGE).startswith("**Stale:**")


def test_a_missed_target_says_so() -> None:
    def lines(ms: float) -> list[str]:
        return [
            line
            for line in tables.target_table(_results("loss", {"cpu": ms}), "loss", tables.LOSS_TARGETS)
            if "faster than eager" in line
        ]

    assert lines(1.0) == ["| times that cpu is faster than eager | >= 8 | 10.00 | 10.00 |"]
    assert lines(2.0) == ["| times that cpu is faster than eager | >= 8 | 5.00 (missed) | 5.00 (missed) |"]
    assert tables.linear_block(_results("linear", {"fused": 1.0}), PAGE).count("(missed)") == 0
    assert tables.linear_block(_results("linear", {"fused": 4.0}), PAGE).count("(missed)") == 1
    large = _results("linear", {"fused": 1.0})
    large.of("narrow")["fused"]["extra_bytes"] *= 2
    assert tables.linear_block(large, PAGE).count("(missed)") == 1
    without = _results("loss")
    without.rows = [row for row in without.rows if row["implementation"] != "compiled"]
    assert "not measured" in "\n".join(tables.target_table(without, "loss", tables.LOSS_TARGETS))


def test_the_block_of_masks_has_ratios() -> None:
    times = {"dense": 2.0} | {f"fused {name}": 3.0 for name in ("8", "64", "1024", "exp(H)")}
    times |= {f"eager {name}": 30.0 for name in ("8", "64", "1024")} | {"eager exp(H)": 60.0}
    text = tables.sparse_block(_results("sparse", times), PAGE)
    assert "1.5 to 1.5 times the dense loss" in text
    assert "takes 10 to 20 times as long as that" in text
    assert "and was 20 to 20 times as fast" in text


def test_the_block_of_steps_shows_memory_where_it_was_measured() -> None:
    text = BLOCKS["step"](_steps(), PAGE)
    assert "largest batch within 1 GiB" in text
    assert "| fused | 0.152 (0.1-0.2) | 1 | 9 |" in text
    assert "| fused | 0.152 (0.1-0.2) |  |" in text
    assert "- case smollm2/memory: stopped after 9 s" in text


def test_rates_count_what_must_be_moved_and_multiplied() -> None:
    row = {"implementation": "x", "both_ms": [0.0, 2.0, 0.0]}
    assert tables.gigabytes_per_second(cases.Case("a", 10, 100).title, row) == pytest.approx(3 * 4000 / 2e6)
    copied = row | {"implementation": "copy"}
    assert tables.gigabytes_per_second(cases.Case("a", 10, 100).title, copied) == pytest.approx(2 * 4000 / 2e6)
    for frozen, products in ((True, 2), (False, 3)):
        title = cases.HeadCase("a", 24, 300, 16, frozen=frozen).title
        assert report_gpu.teraflops(title, row) == pytest.approx(products * 2 * 24 * 300 * 16 / 2e9)


def test_the_block_of_gpucheck() -> None:
    made = {"machine": "NVIDIA H200", "driver": "580", "torch": "2", "triton": "3", "python": "3.11", "dirty": True}
    results = {
        "date": "2026-01-02",
        "provenance": {**made, "commit": "c" * 40, "source_sha256": "old"},
        "files": [{"file": "tests/gpu/test_large.py", "passed": 2, "failed": 1, "seconds": 3.2}],
        "tests": [
            {"test": "tests/gpu/test_large.py::test_a", "outcome": "passed", "seconds": 1.0},
            {"test": "tests/gpu/test_large.py::test_b", "outcome": "failed", "seconds": 1.0, "detail": "differs"},
            {"test": "tests/gpu/test_large.py::test_c", "outcome": "not run", "seconds": 0.0},
        ],
    }
    block = report_gpu.gpucheck_block(results, Page("../", "", "new"))
    assert block.startswith("**Stale:**")
    assert (
        "Run on 2026-01-02: NVIDIA H200, driver 580, triton 3; torch 2, Python 3.11; commit cccccccccccc, with" in block
    )
    assert "| tests/gpu/test_large.py | 2 | 1 | 0 | 0 | 3 |" in block
    assert "- tests/gpu/test_large.py::test_b: failed. differs\n- tests/gpu/test_large.py::test_c: not run." in block
    assert "test_a" not in block
    assert "Stale" not in report_gpu.gpucheck_block(results, Page("../", "", "old"))
    assert report_gpu.gpucheck_block(None, PAGE).startswith("Not yet run on a GPU")


def test_what_a_mask_keeps_is_observed_and_summarised() -> None:
    rows = num_kept.observe(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3)
    assert [row["TopK(4)"][0] for row in rows] == [4, 4, 4]
    assert all(row["TopK(64)"][1:] == pytest.approx([1, 1]) for row in rows)
    assert all(0 < row["TopK(1)"][2] < row["EntropyTopK(1)"][2] <= 1 for row in rows)
    found = json.loads(num_kept.text_of("a model", 50, rows))
    text = num_kept.block(found, PAGE)
    assert "| TopK(4) | 4 | " in text
    assert "3 rows of a model, V = 50" in text
    assert num_kept.block(None, PAGE).startswith("Not yet measured")


# ---------------------------------------------------------------------------------------------------------- the plots


def test_the_axes_of_the_plots() -> None:
    results = _gpu("gpu")
    axes = plots.axes_of(results)
    assert [cases.shape_of(results.cases[name])[1] for name in axes["V"]] == [
        32_128, 49_152, 128_256, 151_936, 262_144,
    ]  # fmt: skip
    assert axes["V"][2] == "llama-3"
    assert [cases.shape_of(results.cases[name])[0] for name in axes["N"]] == [8, 64, 512, 4096, 16_384]


def _draw(kind: str, results: Results, path: Path) -> None:
    if kind == "bars":
        plots.draw_bars(results, "llama-3", report.BARS, path)
    else:
        plots.draw_scaling(results, report.LINES, path)


@pytest.mark.parametrize("kind", ["bars", "scaling"])
def test_plots_are_reproducible_and_name_their_results(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ("first.png", "second.png", "other.png")
    first, second, other = (tmp_path / name for name in names)
    _draw(kind, _gpu("gpu"), first)
    _draw(kind, _gpu("gpu"), second)
    _draw(kind, _results("gpu", {"triton": 2.0}), other)
    assert first.read_bytes() == second.read_bytes()
    assert _fingerprint(first) != _fingerprint(other)


def _fingerprint(path: Path) -> str:
    return re.search(rb"results [0-9a-f]{64}", path.read_bytes()).group().decode()


# -------------------------------------------------------------------------------------------- what is in the repository


def test_the_documents_show_the_committed_results() -> None:
    """If this fails, run `python -m benchmarks.report`: figures come from the results and say when they are stale."""
    shown = set()
    for document in report.documents():
        text = document.read_text(encoding="utf-8")
        assert text == report.fill(text, document), document
        shown |= {match[1] for match in report.MARKED.finditer(text)}
    assert shown == report.blocks(report.ROOT / "README.md").keys()
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert [match[1] for match in report.MARKED.finditer(readme)] == ["summary"]


def test_the_plots_were_drawn_from_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawings = report.drawings()
    assert drawings.keys() == set(results_file.FOLDER.glob("*.png"))
    for path, draw in drawings.items():
        draw(tmp_path / path.name)
        assert _fingerprint(tmp_path / path.name) == _fingerprint(path)


def test_committed_results_are_few_lines_and_belong_to_a_suite() -> None:
    files = [path for path in results_file.FOLDER.rglob("*") if path.is_file() and path.suffix != ".png"]
    known = {f"{suite.file}.json" for suite in measure.SUITES.values()} | {"num_kept.json", "gpucheck.json"}
    assert {path.name for path in files if path.parent == results_file.FOLDER} <= known
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 1500
    for suite in measure.SUITES.values():
        path = results_file.FOLDER / f"{suite.file}.json"
        results = results_file.load(path)
        if results is not None:
            assert re.fullmatch("[0-9a-f]{64}", results.provenance["source_sha256"])
            assert results.text() == path.read_text(encoding="utf-8")


def test_fill_replaces_blocks_alone_and_refuses_broken_markers() -> None:
    document = report.ROOT / "docs" / "page.md"
    text = "before\n<!-- benchmarks:gpucheck -->\nold\n<!-- /benchmarks:gpucheck -->\nafter\n"
    filled = report.fill(text, document)
    assert filled.startswith("before\n<!-- benchmarks:gpucheck -->\n")
    assert filled.endswith("\n<!-- /benchmarks:gpucheck -->\nafter\n")
    assert "old" not in filled
    with pytest.raises(ValueError, match="blocks must be among summary, .*; got 'nonsense'"):
        report.fill(text.replace("gpucheck", "nonsense"), document)
    for broken in (text + "<!-- benchmarks:loss -->", "<!-- /benchmarks:loss -->\n<!-- benchmarks:loss -->\n"):
        with pytest.raises(ValueError, match="needs its"):
            report.fill(broken, document)
