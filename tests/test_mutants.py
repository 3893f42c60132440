"""Every mutant fits the sources of today, and the runner tells a killed one from a survivor."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from mutants import random_mutants
from mutants.random_mutants import Change, changes_of, run
from mutants.random_targets import EQUIVALENT, TESTS
from mutants.runner import FOLDERS, MUTANTS, ROOT, select


def test_every_patch_fits_exactly_once():
    for mutant in MUTANTS:
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        assert mutant.applied(text) != text, mutant.name
        assert mutant.path.split("/")[0] in FOLDERS, f"{mutant.name}: {mutant.path} is not in the copies of the tree"
        for name in mutant.files:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), f"{mutant.name}: no file for {name}"


def test_names_are_unique_and_can_be_selected():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    assert [mutant.name for mutant in select(["sign-dropped"])] == ["sign-dropped"]
    assert {mutant.name for mutant in MUTANTS} - {mutant.name for mutant in select([])} == {"control"}
    with pytest.raises(SystemExit, match="no mutant is called 'nonsense'"):
        select(["nonsense"])


def _run(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mutants.runner", *names]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300, check=False)


def test_killed_mutants_are_reported_with_their_tests():
    done = _run("slope-sum-dropped", "label-unchecked")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 2 of 2 (100 %)" in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "tests/test_oracle.py::" in lines["slope-sum-dropped"]
    assert "tests/test_labels.py::" in lines["label-unchecked"]


def test_a_survivor_is_reported():
    """The control changes a comment."""
    done = _run("control")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "survived: control" in done.stdout


def test_every_random_change_is_another_program():
    for module in ("config.py", "integrations/passes.py"):
        text = (ROOT / "caref_kernels" / module).read_text(encoding="utf-8")
        changes = changes_of(f"caref_kernels/{module}", text)
        assert len(changes) > 100
        assert (
            len({ast.dump(ast.parse(change.applied(text))) for change in changes} - {ast.dump(ast.parse(text))}) > 100
        )


def test_random_changes_reach_what_a_reader_would_change():
    text = "@frozen\ndef f(a, b=None, c=Config.c):\n    '''Doc.'''\n    g(a, b, key=c)\n    return a < b and not c\n"
    made = {change.applied(text).replace(text.splitlines()[2], "") for change in changes_of("f.py", text)}
    for old, new in (
        ("@frozen", ""),
        ("b=None", "b=0"),
        ("c=Config.c", "c=0"),
        ("g(a, b, key=c)", "pass"),
        ("g(a, b, key=c)", "(g(b, a, key=c))"),
        ("g(a, b, key=c)", "(g(a, b))"),
        ("a < b and not c", "(a < b or not c)"),
        ("a < b", "(a <= b)"),
        ("not c", "(c)"),
        ("return a < b and not c", "return None"),
    ):
        assert text.replace(old, new).replace(text.splitlines()[2], "") in made, (old, new)
    assert len(made) == 10


def test_the_tables_of_random_mutants_name_files_and_lines_that_exist():
    for module, tests in TESTS.items():
        assert (ROOT / "caref_kernels" / module).is_file()
        assert not [name for name in tests.split() if not (ROOT / "tests" / f"test_{name}.py").is_file()]
    for (module, line, new), reason in EQUIVALENT.items():
        text = (ROOT / "caref_kernels" / module).read_text(encoding="utf-8")
        changes = [change for change in changes_of(f"caref_kernels/{module}", text) if change.new == new]
        assert any(change.reason_it_is_equivalent(text) == reason for change in changes), (module, line)


def test_random_mutants_resume_and_report_survivors(tmp_path, monkeypatch, capsys):
    """One change that a test notices, and one of a docstring; the second run takes both results from the first."""
    monkeypatch.setitem(TESTS, "sparsity.py", "validation")
    path = "caref_kernels/sparsity.py"
    source = (ROOT / path).read_bytes()
    start = source.index(b"MOST_TOKENS = 2**31 - 1") + len("MOST_TOKENS = ")
    line = source[:start].count(b"\n") + 1
    changes = [Change(path, line, start, start + len("2**31"), "2**30"), Change(path, 1, 3, 8, "What")]
    rows = run(changes, 1, again=False, results=tmp_path / "results.jsonl")
    assert [row["verdict"] for row in rows] == ["killed", "survived"]
    assert "tests/test_validation.py::" in rows[0]["by"]
    assert rows[0]["diff"] == "-MOST_TOKENS = 2**31 - 1\n+MOST_TOKENS = 2**30 - 1"
    assert "tests/test_validation.py::" in capsys.readouterr().out
    monkeypatch.setattr(random_mutants, "Tree", None)  # nothing is left to try
    assert run(changes, 1, again=False, results=tmp_path / "results.jsonl") == rows
