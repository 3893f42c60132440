"""Mutation tests: apply known mistakes to a copy of the tree, one at a time, and check that the suite fails.

    make mutants                      every mutant; about 45 minutes on two cores
    make mutants ARGS=--list          their names, files and tests
    make mutants ARGS="NAME..."       these ones; a part of a name is enough

Each mutant is a text patch that must match its file exactly once (patches*.py).  It counts as killed only if a test
fails with it and passes without it.  Exit code 1: some mutant survived, or its trial was not fair: the patch does not
compile, or the test fails without it too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from .patches import PYTHON, Mutant
from .patches_compiled import COMPILED
from .patches_cuda import CUDA
from .patches_evidence import EVIDENCE
from .patches_extra import EXTRA
from .patches_harness import HARNESS
from .patches_integrations import INTEGRATIONS
from .patches_linear import LINEAR
from .patches_sparsity import SPARSE
from .patches_triton import TRITON

# Mutants that need no compiler come first, so that none of them runs with the extension of another mutant.
_ALL = [*PYTHON, *EXTRA, *LINEAR, *INTEGRATIONS, *HARNESS, *EVIDENCE, *TRITON, *SPARSE, *CUDA, *COMPILED]
MUTANTS = sorted(_ALL, key=lambda mutant: mutant.needs_build)
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "caref_kernels", "csrc", "examples", "tests", "tools")
WORKERS = 2
TEST_TIMEOUT = 300  # seconds; a mutant that hangs is killed
# Builds three times faster, and -O1 still contracts to fused multiply-adds, as the kernels expect.
BUILD_FLAGS = ("-O3 ", "-O1 ")


class Outcome(NamedTuple):
    """The result of a mutant: ``verdict`` is killed, survived or unfair, ``detail`` the killing test or the reason."""

    mutant: Mutant
    verdict: str
    detail: str
    seconds: float


class Tree:
    """A copy of the project in which one mutant at a time is applied, built and tested."""

    def __init__(self, path: Path, **environment: str) -> None:
        self.path = path
        ignore = shutil.ignore_patterns("__pycache__", "build")
        for name in FOLDERS:
            shutil.copytree(ROOT / name, path / name, ignore=ignore)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, path / name)
        self._is_built = False
        ours = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MAX_JOBS": "1"}
        self._environment = {**os.environ, **ours, "CAREF_CUDA": "0", "CUDA_VISIBLE_DEVICES": "", **environment}

    def apply(self, mutant: Mutant) -> str:
        """Write the mistake; returns the original text, to be given to ``restore``."""
        source = self.path / mutant.path
        text = source.read_text(encoding="utf-8")
        source.write_text(mutant.applied(text), encoding="utf-8")
        return text

    def restore(self, mutant: Mutant, text: str) -> None:
        (self.path / mutant.path).write_text(text, encoding="utf-8")

    def build(self) -> str | None:
        """Compile the extension; returns the first error of the compiler, or ``None``."""
        if not self._is_built:
            script = self.path / "setup.py"
            script.write_text(script.read_text(encoding="utf-8").replace(*BUILD_FLAGS), encoding="utf-8")
            self._is_built = True
        done = self._run(["setup.py", "-q", "build_ext", "--inplace"])
        if done.returncode == 0:
            return None
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
        return errors[0] if errors else f"setup.py ended with {done.returncode}"

    def test(self, arguments: list[str], interpreted: bool = False, limit: float = TEST_TIMEOUT) -> tuple[int, str]:
        """pytest's exit code (negative for a signal, 124 for the time limit) and output."""
        command = ["-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-rfE", *arguments]
        try:
            done = self._run(command, timeout=limit, TRITON_INTERPRET=str(int(interpreted)))
        except subprocess.TimeoutExpired:
            return 124, f"no end after {limit:.0f} s"
        return done.returncode, done.stdout + done.stderr

    def _run(
        self, arguments: list[str], timeout: float | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.path,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


class Trial:
    """Workers that try mutants, and the unpatched tree in which the failing test must pass."""

    def __init__(self, folder: Path, mutants: list[Mutant]) -> None:
        self._clean = Tree(folder / "clean")
        self._trees: Queue[Tree] = Queue()
        trees = [Tree(folder / f"worker{index}") for index in range(min(WORKERS, len(mutants)))]
        if any(mutant.needs_build for mutant in mutants):
            for tree in (self._clean, *trees):
                error = tree.build()
                if error is not None:
                    raise SystemExit(f"the unpatched tree does not build: {error}")
        for tree in trees:
            self._trees.put(tree)
        self._passes: dict[tuple[str, ...], bool] = {}
        self._lock = threading.Lock()

    def run(self, mutant: Mutant) -> Outcome:
        tree = self._trees.get()
        start = time.perf_counter()
        try:
            verdict, detail = self._try(tree, mutant)
        except ValueError as error:
            verdict, detail = "unfair", str(error)
        finally:
            self._trees.put(tree)
        return Outcome(mutant, verdict, detail, time.perf_counter() - start)

    def _try(self, tree: Tree, mutant: Mutant) -> tuple[str, str]:
        original = tree.apply(mutant)
        try:
            error = tree.build() if mutant.needs_build else None
            return ("unfair", f"does not compile: {error}") if error else self._judge(tree, mutant)
        finally:
            tree.restore(mutant, original)

    def _judge(self, tree: Tree, mutant: Mutant) -> tuple[str, str]:
        code, output = tree.test(mutant.arguments(), mutant.is_interpreted)
        if code == 0:
            return "survived", f"passed: {' '.join(mutant.arguments())}"
        if mutant.is_compiled and ": error: " in output:  # the emulation of CUDA is compiled by its tests
            return "unfair", "does not compile: " + next(line for line in output.splitlines() if ": error: " in line)
        if code == 1:
            # Only the summary's own lines: a failed test may quote those of a run that it has started.
            lines = (line for line in output.splitlines() if line.startswith("FAILED tests"))
            failed = [line.removeprefix("FAILED ").split(" - ")[0] for line in lines]
            if not failed:
                return "unfair", "pytest reports an error, not a failure: " + output.strip().splitlines()[-1]
            arguments, detail = failed[:1], failed[0]
        elif code < 0 or code == 124:
            arguments, detail = mutant.arguments(), f"crash, signal {-code}" if code < 0 else "time limit"
        else:
            return "unfair", f"pytest ended with {code}: " + output.strip().splitlines()[-1]
        if not self._passes_unpatched(arguments, mutant.is_interpreted):
            return "unfair", f"{detail} fails without the patch too"
        return "killed", detail

    def _passes_unpatched(self, arguments: list[str], interpreted: bool) -> bool:
        with self._lock:
            key = tuple(arguments)
            if key not in self._passes:
                self._passes[key] = self._clean.test(arguments, interpreted)[0] == 0
            return self._passes[key]


def select(names: list[str]) -> list[Mutant]:
    """The mutants whose name is, or contains, one of ``names``; without names all but the control."""
    if not names:
        return [mutant for mutant in MUTANTS if not mutant.is_control]
    chosen = []
    for name in names:
        exact = [mutant for mutant in MUTANTS if mutant.name == name]
        matches = exact or [mutant for mutant in MUTANTS if name in mutant.name]
        if not matches:
            raise SystemExit(f"no mutant is called {name!r}; --list shows them")
        chosen += [mutant for mutant in matches if mutant not in chosen]
    return sorted(chosen, key=MUTANTS.index)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if every chosen mutant is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants to try, by name or part of it; all without any")
    parser.add_argument("--list", action="store_true", help="show the mutants and stop")
    options = parser.parse_args(arguments)
    mutants = select(options.names)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:<34} {mutant.path:<34} {' '.join(mutant.arguments())}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(WORKERS) as pool:
        trial = Trial(Path(folder), mutants)
        outcomes = []
        for outcome in pool.map(trial.run, mutants):
            print(
                f"{outcome.mutant.name:<34} {outcome.verdict:<9} {outcome.seconds:5.1f} s  {outcome.detail}", flush=True
            )
            outcomes.append(outcome)
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    print(f"\nkilled {killed} of {len(outcomes)} ({100 * killed // max(len(outcomes), 1)} %)")
    for outcome in outcomes:
        if outcome.verdict != "killed":
            print(f"{outcome.verdict}: {outcome.mutant.name} ({outcome.mutant.mistake}); {outcome.detail}")
    return 0 if killed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
