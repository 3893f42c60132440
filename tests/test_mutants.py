"""Every mutant fits the sources of today, and the runner tells a killed one from a survivor."""

from __future__ import annotations

import subprocess
import sys

import pytest
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
