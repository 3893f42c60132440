"""What the documents tell a reader to type: every verb exists, every option is known, every Python block runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(ROOT.glob("*.md"))
TEXTS = {path.name: path.read_text() for path in DOCUMENTS if path.name != "CHANGELOG.md"}
# Executed by .ci/run: test lints, and all of them build first.
IN_CI = {"test", "build", "lint", "launches-oldest", "sanitize", "nvcc-check"}
# Minutes or a GPU: what they run is tested by the files that stand beside them.
TESTED_IN = {
    "demo": "test_demo.py", "aot": "test_aot.py", "gpucheck": "test_gpucheck.py",
    "mutants": "test_mutants.py",
    "bench": "test_benchmarks.py", "bench-gpu": "test_benchmarks_gpu.py", "bench-linear": "test_benchmarks_gpu.py",
    "bench-report": "test_benchmarks.py", "bench-sparse": "test_benchmarks.py", "harness": "test_harness_cli.py",
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
        assert (ROOT / "tests" / TESTED_IN[verb]).is_file()
    elif verb in HARMLESS:
        shown = subprocess.run(["make", verb], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "bench-gpu" in shown
    else:
        assert verb in IN_CI | NOT_RUN, f"{verb} is in the documents and nothing runs it"


def test_the_makefile_runs_modules_that_exist():
    modules = set(re.findall(r"-m ((?:benchmarks|caref_kernels|tools)[\w.]*)", (ROOT / "Makefile").read_text()))
    assert {"benchmarks.measure", "benchmarks.report", "tools.aot"} <= modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def _help(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", sorted({command for _, command in ALL if command.startswith("python -m ")}))
def test_every_module_takes_its_options(command):
    _, _, module, *arguments = command.split()
    text = _help(module)
    for option in (one for one in arguments if one.startswith("--")):
        assert option in text, f"{module} has no {option}"


def test_options_that_are_named_alone_belong_to_a_command():
    """An option in the text is one of the tools, of the demo, or of pytest in this tree."""
    sources = [ROOT / "examples" / "finetune_smollm2.py", ROOT / "tests" / "conftest.py"]
    known = _help("tools.aot") + "".join(path.read_text(encoding="utf-8") for path in sources)
    for name, text in TEXTS.items():
        for option in re.findall(r"`(--[a-z][a-z-]*)", text):
            if name in ("README.md", "CONTRIBUTING.md"):
                assert option in known, f"{name}: {option}"


def test_files_that_are_linked_exist():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
            assert (ROOT / target).exists(), f"{name} links {target}"


# ------------------------------------------------------------------------------------------------------ Python blocks

BLOCKS = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
# What stands for the reader's own trainer; the line itself holds an ellipsis and is not Python.
TRAINER = re.compile(r"^(\w+ = )?Seq2SeqTrainer\(.*\.\.\.\)$", re.MULTILINE)


@pytest.fixture
def reader(tmp_path):
    """The names that a reader has: logits, a head, a model and its batch, a trainer."""
    torch.manual_seed(0)
    names = {
        "F": functional, "torch": torch, "labels": torch.tensor([0, 5, -100, 7]),
        "logits": torch.randn(4, 61, requires_grad=True), "hidden": torch.randn(4, 16, requires_grad=True),
        "lm_head": torch.nn.Linear(16, 61), "tokens_in_all_micro_batches": 3,
    }  # fmt: skip
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.sub(r"\W+", " ", block.strip())[:50].strip())
def test_python_blocks_run(block, reader, tmp_path):
    if "trainer" in block or "model" in block:
        pytest.importorskip("transformers")
        import tiny_trainers

        reader["made"] = lambda: tiny_trainers.make_trainer("t5", tmp_path, seq2seq=True)
        batch = tiny_trainers.make_data("t5")[:3]
        inputs = {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
        reader |= {"model": tiny_trainers.make_model("t5").train(), "batch": dict(inputs), "items": 3}
        reader |= {"labels": inputs.pop("labels"), "inputs": inputs}
    source, replaced = TRAINER.subn("trainer = made()", block)
    assert replaced == block.count(", ...)")
    exec(compile(source, "README.md", "exec"), reader)
    if "loss" in reader:
        assert torch.isfinite(reader["loss"]).all()


def test_commands_run_in_a_shell_without_this_machine():
    """No document holds a path of the machine it was written on."""
    for name, text in TEXTS.items():
        for folder in ("/home/", "/root/", "/tmp/", os.fspath(ROOT)):
            assert folder not in text, f"{name} mentions {folder}"
