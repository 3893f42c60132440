"""Mutation tests with mistakes that nobody chose: random edits of the Python of the core and the integrations.

    make random-mutants                                200 mutants of seed 0; hours on two cores
    make random-mutants ARGS="--count 40 --module config --module sparsity"
    make random-mutants ARGS="--only 17"               the 17th of the draw, again
    make random-mutants ARGS="--again"                 the survivors of the last run, after tests were added

A mutant changes one node of the syntax tree.  It is killed if one of the tests that cover its module fails
(``TESTS``, most specific first); those tests pass without it.  Results are appended to build/random_mutants.jsonl as
they come, so that an interrupted run goes on where it stopped.  Exit code 1: a mutant survived that is not in
``EQUIVALENT``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from .random_targets import EQUIVALENT, TESTS
from .runner import ROOT, WORKERS, Tree

RESULTS = ROOT / "build" / "random_mutants.jsonl"
PACKAGE = "caref_kernels/"
_SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


class Change(NamedTuple):
    """Replace the bytes from ``start`` to ``end`` of ``path`` by ``new``."""

    path: str
    line: int
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        """``text`` with the change."""
        source = text.encode()
        return (source[: self.start] + self.new.encode() + source[self.end :]).decode()

    def key(self, text: str) -> str:
        """Names the change and the source it was made to, so that a result of another source is not taken for it."""
        return hashlib.sha256(f"{self.path}\n{self.applied(text)}".encode()).hexdigest()[:16]

    def diff(self, text: str) -> str:
        """The changed lines, without context."""
        lines = difflib.unified_diff(text.splitlines(), self.applied(text).splitlines(), n=0, lineterm="")
        return "\n".join(line for line in list(lines)[2:] if not line.startswith("@@"))

    def reason_it_is_equivalent(self, text: str) -> str | None:
        """The reason of its entry in ``EQUIVALENT``, if it has one."""
        line = text.splitlines()[self.line - 1].strip()
        return EQUIVALENT.get((self.path.removeprefix(PACKAGE), line, self.new))


def changes_of(path: str, text: str) -> list[Change]:
    """Every change of one file, in the order of its syntax tree."""
    offsets = [0]
    for line in text.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))

    def change(node: ast.AST, new: str, is_decorator: bool = False) -> Change:
        start = offsets[node.lineno - 1] + node.col_offset
        start = text.encode().rindex(b"@", 0, start) if is_decorator else start
        return Change(path, node.lineno, start, offsets[node.end_lineno - 1] + node.end_col_offset, new)

    found = []
    for node in _mutable(ast.parse(text)):
        found += [change(node, new) for new in (*_expressions(node), *_statements(node))]
        for test in _conditions(node):
            found.append(change(test, f"(not ({ast.unparse(test)}))"))
        for decorator in getattr(node, "decorator_list", ()):
            found.append(change(decorator, "", is_decorator=True))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += [change(default, "0") for default in _defaults(node)]
    return found


def _mutable(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` whose change can be noticed: no annotations, no documentation, no text of an error."""
    yield node
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or _is_text(node):
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "type_params"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _mutable(child)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _with(node: ast.AST, **fields: object) -> str:
    """The source of ``node`` with other fields, in parentheses if it is an expression."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    source = ast.unparse(ast.fix_missing_locations(other))
    return f"({source})" if isinstance(node, ast.expr) else source


def _expressions(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:i], _SWAPS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BoolOp, ast.BinOp, ast.AugAssign)) and type(node.op) in _SWAPS:
        yield _with(node, op=_SWAPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and node.value is not None and node.value is not ...:
        yield repr(_another(node.value))
    elif isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Call):
        first, second = map(ast.unparse, node.args[:2]) if len(node.args) > 1 else ("", "")
        if first != second and "*" not in first[:1] + second[:1] and ast.unparse(node.func) not in ("min", "max"):
            yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
        for keyword in node.keywords:
            yield _with(node, keywords=[other for other in node.keywords if other is not keyword])


def _another(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"other {value}" if isinstance(value, str) else value + b"other"


def _statements(node: ast.AST) -> Iterator[str]:
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    targets = getattr(node, "targets", [])
    is_stored = isinstance(node, ast.Assign) and isinstance(targets[0], (ast.Attribute, ast.Subscript))
    if is_call or is_stored or isinstance(node, (ast.Raise, ast.AugAssign, ast.Delete)):
        yield "pass"
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "return None"
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield "continue" if isinstance(node, ast.Break) else "break"


def _conditions(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _defaults(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr]:
    """The defaults of its arguments that are no constants, which are changed elsewhere, or ``None``."""
    defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
    return [default for default in defaults if not isinstance(default, ast.Constant) or default.value is None]


def modules() -> list[str]:
    """The files that are mutated: all of the core and the integrations that the backends of a CPU run."""
    core = Path(ROOT, PACKAGE)
    return sorted(name for path in core.rglob("*.py") if (name := path.relative_to(core).as_posix()) in TESTS)


def drawn(count: int, seed: int, parts: list[str]) -> list[Change]:
    """``count`` changes of the modules whose path contains one of ``parts``, or of all, without the equivalent ones."""
    population, equivalent = [], set()
    for module in modules():
        if not parts or any(part in module for part in parts):
            text = Path(ROOT, PACKAGE, module).read_text(encoding="utf-8")
            found = changes_of(PACKAGE + module, text)
            population += found
            equivalent |= {change for change in found if change.reason_it_is_equivalent(text) is not None}
    random.Random(seed).shuffle(population)
    return [change for change in population if change not in equivalent][:count]


class Runner:
    """Tries changes in copies of the tree and keeps the results."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._trees: Queue[Tree] = Queue()
        for index in range(workers):
            self._trees.put(Tree(folder / f"worker{index}"))
        self._seconds: dict[str, float] = {}

    def check(self, name: str) -> None:
        """Run one file of tests without a mutant: it must pass, and its time is the measure of a hang."""
        tree, start = self._trees.get(), time.perf_counter()
        code, output = tree.test(_arguments(name))
        self._trees.put(tree)
        if code != 0:
            raise SystemExit(f"tests/test_{name}.py fails without a mutant:\n{output[-2000:]}")
        self._seconds[name] = time.perf_counter() - start

    def run(self, change: Change) -> dict[str, object]:
        """The result of one change."""
        tree, start = self._trees.get(), time.perf_counter()
        tests = _tests_of(change)
        text = tree.apply(change)
        try:
            limit = 60 + 3 * sum(self._seconds[name] for name in tests)
            code, output = tree.test(_arguments(*tests), limit=limit)
        finally:
            tree.restore(change, text)
            self._trees.put(tree)
        failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        by = failed[0].split(" - ")[0] if failed else f"pytest ended with {code}: " + output.strip()[-200:]
        row = {"key": change.key(text), "where": f"{change.path}:{change.line}", "diff": change.diff(text)}
        seconds = round(time.perf_counter() - start, 1)
        return row | {"verdict": "killed" if code else "survived", "by": by if code else "", "seconds": seconds}


def _tests_of(change: Change) -> list[str]:
    return TESTS[change.path.removeprefix(PACKAGE)].split()


def _arguments(*names: str) -> list[str]:
    return [*(f"tests/test_{name}.py" for name in names), "-k", "not emulated and not triton"]


def run(changes: list[Change], workers: int, again: bool, results: Path = RESULTS) -> list[dict[str, object]]:
    """The results of ``changes``, those of an earlier run included."""
    texts = {path: Path(ROOT, path).read_text(encoding="utf-8") for path in {change.path for change in changes}}
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    known = {row["key"]: row for row in map(json.loads, lines) if not (again and row["verdict"] == "survived")}
    left = [change for change in changes if change.key(texts[change.path]) not in known]
    results.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(workers) as pool:
        runner = Runner(Path(folder), min(workers, len(left)))
        list(pool.map(runner.check, sorted({name for change in left for name in _tests_of(change)})))
        for row in pool.map(runner.run, left):
            known[row["key"]] = row
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['where']:<48} {row['verdict']:<9} {row['seconds']:6.1f} s  {row['by']}", flush=True)
    return [known[change.key(texts[change.path])] for change in changes]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if every mutant is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", action="append", default=[], help="part of a path; may be repeated")
    parser.add_argument("--only", type=int, help="the number of one mutant of the draw, from 1 on")
    parser.add_argument("--again", action="store_true", help="try again what survived before")
    parser.add_argument("--workers", type=int, default=WORKERS)
    options = parser.parse_args(arguments)
    changes = drawn(options.count, options.seed, options.module)
    if options.only:
        changes = changes[options.only - 1 : options.only]
    rows = run(changes, options.workers, options.again)
    for module in sorted({row["where"].partition(":")[0] for row in rows}):
        verdicts = Counter(row["verdict"] for row in rows if row["where"].startswith(module + ":"))
        print(f"{module:<48} killed {verdicts['killed']:3d}  survived {verdicts['survived']:3d}")
    survivors = [(number, row) for number, row in enumerate(rows, 1) if row["verdict"] == "survived"]
    for number, row in survivors:
        print(f"\n{options.only or number}. {row['where']}\n{row['diff']}")
    print(f"\nkilled {len(rows) - len(survivors)} of {len(rows)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
