"""What the documents say: commands exist, Python blocks run, links lead somewhere, and tables hold."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_threads import evaluate_split
from torch.nn import functional

from caref_kernels import __version__, caref_loss
from caref_kernels.linear_chunks import Head, auto_chunk_rows
from caref_kernels.testing import make_case, oracle

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *PAGES[1:]]
    if path.name != "CHANGELOG.md"
}
# Executed by .ci/run: test lints, and all of them build first.
IN_CI = {"test", "build", "lint", "docs", "launches-oldest", "sanitize", "nvcc-check"}
# Minutes or a GPU: what they run is tested by the files that begin with the name beside them.
TESTED_IN = {
    "demo": "test_demo", "aot": "test_aot", "gpucheck": "test_gpucheck",
    "mutants": "test_mutants", "random-mutants": "test_mutants",
    "bench": "test_benchmarks", "bench-gpu": "test_benchmarks_gpu", "bench-linear": "test_benchmarks",
    "bench-report": "test_benchmarks", "bench-sparse": "test_benchmarks",
}  # fmt: skip
HARMLESS = {"help"}
NOT_RUN = {"format", "clean", "aot-oldest"}  # they change the tree, or install another triton


def _commands(text: str) -> set[str]:
    """Code spans and indented lines that begin like a command, without what follows a #."""
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    starts = ("make ", "python ", "pytest ", "pip ", "pre-commit ")
    return {re.split(r"\s+#", span)[0].strip() for span in spans if span.startswith(starts)}


ALL = sorted({(name, command) for name, text in TEXTS.items() for command in _commands(text)})


def test_commands_are_found():
    assert ("README.md", "make test") in ALL
    assert ("docs/gpu.md", "make gpucheck") in ALL
    assert _commands('`make demo ARGS="--data DIR"` and\n\n    make bench      # slow\n    total 3\n') == {
        'make demo ARGS="--data DIR"',
        "make bench",
    }


@pytest.mark.parametrize("command", sorted({command for _, command in ALL if command.startswith("make ")}))
def test_every_verb_exists_and_is_run_somewhere(command):
    """``make -n`` shows what would be done; the verb itself is run by CI or by the tests of the file it names."""
    verb = command.split()[1]
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    arguments = ["make", "-n", verb, "READY=", "PY=python3"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if verb in TESTED_IN:
        assert list((ROOT / "tests").glob(f"{TESTED_IN[verb]}*.py"))
    elif verb in HARMLESS:
        shown = subprocess.run(["make", verb], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "bench-gpu" in shown
    else:
        assert verb in IN_CI | NOT_RUN, f"{verb} is in the documents and nothing runs it"


def test_workflows_and_ci_call_make():
    """CI has one truth: .ci/run runs the verbs, and the workflows run .ci/run or a verb."""
    verbs = set(re.findall(r"^.*\bmake ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert IN_CI - {"build", "lint"} <= verbs
    flows = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert "bash .ci/run" in flows["ci"]
    assert "make docs" in flows["docs"]


def test_the_makefile_runs_modules_that_exist():
    modules = set(re.findall(r"-m ((?:benchmarks|caref_kernels)[\w.]*)", (ROOT / "Makefile").read_text()))
    assert {"benchmarks.measure", "benchmarks.report"} <= modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("command", sorted({command for _, command in ALL if command.startswith("python -m ")}))
def test_every_module_takes_its_options(command):
    _, _, module, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for option in (one for one in arguments if one.startswith("--")):
        assert option in done.stdout, f"{module} has no {option}"


def test_options_that_are_named_alone_exist():
    """An option in the text, as --require, is one of pytest in this tree, of the examples or of the benchmarks."""
    places = ("tests/**/conftest.py", "examples/*.py", "benchmarks/*.py")
    known = "".join(path.read_text() for place in places for path in ROOT.glob(place))
    for name, text in TEXTS.items():
        for option in re.findall(r"`(--[a-z][a-z-]*)", text):
            if name != "docs/experiments.md":  # the options of the harness, which test_harness_cli.py knows
                assert option in known, f"{name}: {option}"


def test_versions_agree_with_the_package():
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    for name in ("README.md", "docs/get-started.md"):
        assert f"Python {oldest} or newer" in TEXTS[name]
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_short_documents_stay_short():
    """README shows how to try the package on its first screen."""
    readme = TEXTS["README.md"].splitlines()
    assert len(readme) <= 130
    assert len(TEXTS["DESIGN.md"].splitlines()) <= 100
    (last,) = (number for number, line in enumerate(readme) if line.startswith("    make test"))
    assert last < 35


# --------------------------------------------------------------------------------------------------------------- links


def _links(text: str) -> list[str]:
    return re.findall(r"\]\((?!https?://)([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def test_links_lead_somewhere():
    checked = 0
    for name, text in TEXTS.items():
        for link in _links(text):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), f"{name} links {link}"
            if anchor and target.suffix == ".md":
                assert anchor in _anchors(target.read_text(encoding="utf-8")), f"{name} links {link}"
            checked += 1
    assert checked > 50
    assert _links("[a](b.md#c) [d](https://e.f)") == ["b.md#c"]
    assert _anchors("# What a rank: *holds*\n```\n# no\n```") == {"what-a-rank-holds"}


def test_readme_links_the_repository_where_it_is_known():
    """PyPI shows README without the files beside it."""
    known = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if known:
        assert not _links(TEXTS["README.md"]), f"links must begin with {known[1]}, so that PyPI shows them"


def test_every_page_and_every_example_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    for path in PAGES[1:]:
        assert path.relative_to(DOCS).as_posix() in site
    pages = "".join(TEXTS[path.relative_to(ROOT).as_posix()] for path in PAGES)
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in ("tiny.py", "kernel_check.py") or f"examples/{path.name}" in pages, path.name


def test_tables_of_figures_name_their_file():
    for name in ("docs/heads-and-sharding.md", "docs/benchmarks.md"):
        assert re.search(r"\]\(\.\./(benchmarks/results|tests)/", TEXTS[name]), name


# ------------------------------------------------------------------------------------------------------ Python blocks

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)
BLOCKS = {name: BLOCK.findall(text) for name, text in TEXTS.items() if "```python" in text}


@pytest.fixture
def reader(request, tmp_path):
    """The names that the reader of a page has: logits, a head, a model and its batches, a trainer, a process group."""
    torch.manual_seed(0)
    source = "\n".join(BLOCKS[request.getfixturevalue("page")])
    head = torch.nn.Linear(16, 61)
    names = {
        "F": functional, "torch": torch, "labels": torch.tensor([0, 5, -100, 7]), "lm_head": head,
        "logits": torch.randn(4, 61, requires_grad=True), "hidden": torch.randn(4, 16, requires_grad=True),
        "local_logits": torch.randn(4, 61, requires_grad=True), "local_weight": head.weight,
    }  # fmt: skip
    if "model" in source or "trainer" in source:
        pytest.importorskip("transformers")
        import tiny_trainers

        data = tiny_trainers.make_data("llama")
        parts = (data[:3], data[3:])
        batches = [{name: torch.stack([one[name] for one in part]) for name in part[0]} for part in parts]
        names |= {"model": tiny_trainers.make_model("llama").train(), "batch": batches[0], "micro_batches": batches}
        names["trainer"] = tiny_trainers.make_trainer("t5", tmp_path, seq2seq=True)
    if "group" not in source:
        yield names
        return
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield names | {"group": dist.group.WORLD}
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if not all(map(SNIPPET.search, blocks))])
def test_python_blocks_run(page, reader, capsys):
    """The blocks of a page one after the other, in one namespace, as a reader would type them."""
    for block in BLOCKS[page]:
        if not SNIPPET.search(block):
            exec(compile(block, page, "exec"), reader)
    assert "loss" not in reader or torch.isfinite(reader["loss"]).all()
    if page == "docs/choosing-lambda.md":
        assert "lambda_sced 0.0: the optimum is 0.700" in capsys.readouterr().out


def test_examples_on_the_pages_are_those_that_are_tested():
    included = {file for blocks in BLOCKS.values() for block in blocks for file in SNIPPET.findall(block)}
    assert len(included) >= 9
    for file in included:
        assert (ROOT / file).is_file()
        assert Path(file).stem in (ROOT / "tests" / "example_runs.py").read_text(), f"nothing runs {file}"


# --------------------------------------------------------------------------------------------------------------- tables


def _table(page: str, header: str) -> list[list[str]]:
    """The rows below the header that begins with the cells ``header``."""
    lines = iter(TEXTS[page].splitlines())
    next(line for line in lines if line.startswith(f"| {header} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_table_of_memory_follows_from_the_chunks():
    rows = _table("docs/heads-and-sharding.md", "head (N, V, D), dtype")
    assert len(rows) == 4
    for name, logits, chunks, *peaks in rows:
        n, v, d = (int(number) for number in re.search(r"\((\d+), (\d+), (\d+)\)", name).groups())
        dtype = getattr(torch, name.split()[-1])
        with torch.device("meta"):
            head = Head(torch.empty(n, d, dtype=dtype), torch.empty(v, d, dtype=dtype), None)
        size, lengths = dtype.itemsize, [auto_chunk_rows(n, head, trains) for trains in (True, False)]
        assert logits == f"{size * n * v / 2**20:.0f}"
        assert chunks == " / ".join(map(str, lengths))
        made = [size * (length + n * d / v) * v + b * v * d for length, b in zip(lengths, (4, 0), strict=True)]
        assert peaks == [f"{peak / 2**20:.0f}" for peak in made]


@pytest.mark.parametrize("ranks", [2, 512])
def test_many_ranks_exchange_and_lose_as_little_as_two(ranks):
    logits, labels = make_case("lm_like", 4, 128_256, seed=3)
    exact = oracle(logits, labels)
    cuts = [128_256 * rank // ranks for rank in range(1, ranks)]
    terms, _, calls = evaluate_split(logits, labels, cuts, "reference", [])
    assert calls == [("MAX", 4 * 4), ("SUM", 80 * 4)]
    for index, name in enumerate(("ce", "sced", "kl")):
        expected = getattr(exact.terms, name)
        assert ((terms[:, index].double() - expected) / expected).abs().max() < 1e-7, name


def _expected(p: torch.Tensor, columns: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each of the two labels for every probability in ``p`` of the first of them."""
    logits = torch.full((len(p), columns), -200.0, dtype=torch.float64)
    logits[:, 0], logits[:, 1] = p.log(), (1 - p).log()
    labels = torch.zeros(len(p), dtype=torch.long)
    options = {"lambda_kl": 0.0, "reduction": "none", **options}
    return caref_loss(logits, labels, **options), caref_loss(logits, labels + 1, **options)


def test_bias_of_the_optimum_is_that_of_the_loss():
    p = torch.arange(0.5, 0.9991, 0.001, dtype=torch.float64)
    honest = torch.arange(0.5, 0.991, 0.01, dtype=torch.float64)
    rows = _table("docs/choosing-lambda.md", "λ_sced | largest bias")
    assert len(rows) == 6
    for weight, largest, coin, seven in rows:
        # A tenth of the columns: U and the softmax see the same distribution, with V as a number.
        first, second = _expected(p, 4916, lambda_sced=float(weight), vocab_size=49152)
        answers = torch.stack([p[(q * first + (1 - q) * second).argmin()] for q in honest])
        assert largest == f"{100 * (answers - honest).max():.1f}"
        assert coin == f"{100 * answers[0]:.0f} %"
        assert abs(float(seven.split()[0]) - 100 * answers[20].item()) <= 0.51
        lower, higher = _expected(p, 4916, lambda_sced=float(weight), vocab_size=49152, beta=0.0)
        answers = torch.stack([p[(q * lower + (1 - q) * higher).argmin()] for q in honest])
        assert (answers - honest).max() < 1e-9, "with beta = 0 the optimum is at most as confident as is honest"


def test_share_of_the_other_tokens_is_that_of_the_loss():
    p = torch.arange(0.5, 0.995, 0.01, dtype=torch.float64)
    grid = (1e-6, 1e-3, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.8)
    others = sorted([*grid, *(middle + step / 100 for middle in (0.16, 0.32, 0.68) for step in range(-3, 4))])
    outs = []
    for other in others:
        logits = torch.full((len(p), 49152), math.log(other / 49150), dtype=torch.float64)
        logits[:, 0], logits[:, 1] = (p * (1 - other)).log(), ((1 - p) * (1 - other)).log()
        labels = torch.zeros(len(p), dtype=torch.long)
        outs.append([caref_loss(logits, labels + one, reduction="none", return_terms=True) for one in (0, 1)])
    first, second, sced, kl = (
        torch.stack([getattr(pair[one], term) for pair in outs])
        for one, term in ((0, "ce"), (1, "ce"), (0, "sced"), (0, "kl"))
    )
    rows = _table("docs/choosing-lambda.md", "λ_sced | λ_kl")
    assert len(rows) == 3
    for lambda_sced, lambda_kl, *shares in rows:
        for q, share in zip((0.5, 0.9), shares, strict=True):
            loss = q * first + (1 - q) * second + float(lambda_sced) * sced + float(lambda_kl) * kl
            assert share == f"{100 * others[int(loss.argmin()) // len(p)]:.0f} %", (lambda_sced, q)
    jump = (0.8 * first + 0.2 * second + 0.1 * sced + 0.1 * kl).argmin() % len(p)
    assert "q = 0.8 is answered with 98 %" in TEXTS["docs/choosing-lambda.md"]
    assert f"{p[jump]:.2f}" == "0.98"


def test_threshold_of_two_optima_is_that_of_the_loss():
    """Below lambda* the curvature at the honest answer to a fair coin is positive, above it is negative."""
    header, values = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXTS["docs/choosing-lambda.md"].splitlines()
        if line.startswith(("| V |", "| λ\\* |"))
    )
    step = 1e-3
    p = torch.tensor([0.5 - step, 0.5, 0.5 + step], dtype=torch.float64)
    for vocabulary, value in zip(header[1:], values[1:], strict=True):
        columns = int(vocabulary.replace(",", ""))
        log_ratio = math.log(columns / 2)
        threshold = 2 / (log_ratio**2 - log_ratio - 1)
        assert value == f"{threshold:.3f}"
        for factor in (0.98, 1.02):
            first, second = _expected(p, -(-columns // 10), lambda_sced=factor * threshold, vocab_size=columns)
            loss = (first + second) / 2
            assert (loss[0] - 2 * loss[1] + loss[2] > 0) == (factor < 1)


def test_table_of_near_uniform_rows_is_measured():
    """The exceptions that docs/accuracy.md names: within a factor of three of what the CPU kernels do today."""
    if importlib.util.find_spec("caref_kernels._C") is None:
        pytest.skip("the table is of the compiled CPU kernels")
    generator = torch.Generator().manual_seed(0)
    rows = _table("docs/accuracy.md", "noise in the logits")
    assert len(rows) == 2
    for noise, *errors in rows:
        logits = float(noise) * torch.randn(8, 32128, generator=generator)
        for alpha, error in zip((2.0, 1.5, 1.0, 3.0), errors, strict=True):
            found = {term: _gradient_error(logits, alpha, term) for term in ("sced", "loss")}
            assert float(error) / 3 < found["sced"] < float(error) * 3, (noise, alpha)
            assert found["loss"] < 2e-5


def _gradient_error(logits: torch.Tensor, alpha: float, term: str) -> float:
    """The largest relative error of a row of the gradient of ``term``, against float64."""
    gradients = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        labels = torch.zeros(len(leaf), dtype=torch.long)
        out = caref_loss(leaf, labels, alpha=alpha, backend=backend, return_terms=True, reduction="sum")
        gradients.append(torch.autograd.grad(getattr(out, term), leaf)[0].double())
    actual, exact = gradients
    return ((actual - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
