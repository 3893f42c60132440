"""What an import does, and rules of the repository, checked in the source."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "caref_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def _python(program: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=variables, cwd=cwd)


IMPORT = """
import os, socket, subprocess, sys
import torch
before = set(sys.modules)
def refuse(*arguments, **options):
    raise SystemExit(f"not at import: {arguments}")
socket.socket.connect = subprocess.Popen.__init__ = os.system = refuse
opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == "open" else None)
import caref_kernels
writes = [a[0] for a in opened if isinstance(a[1], str) and set(a[1]) & set("wax+")]
new = {name.split(".")[0] for name in set(sys.modules) - before}
foreign = sorted(name for name in new if name not in sys.stdlib_module_names and name not in ("caref_kernels", "torch"))
heavy = sorted(set(sys.modules) & {"triton", "transformers", "peft", "safetensors", "rich", "gguf"})
if foreign or heavy or writes or torch.cuda.is_initialized() or os.listdir("."):
    sys.exit(f"imported {foreign} {heavy}, wrote {writes} {os.listdir('.')}, CUDA {torch.cuda.is_initialized()}")
child = os.fork()
if child == 0:
    loss = caref_kernels.caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), backend="reference")
    os._exit(0 if abs(float(loss) - 1.6094379) < 1e-5 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_import_needs_torch_alone(tmp_path):
    """Nothing else is imported, written, started, connected or initialised; a fork afterwards works."""
    run = _python(IMPORT, tmp_path)
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.iterdir()) == []


WITHOUT_COMPILED = """
import sys
sys.modules["caref_kernels._C"] = None
import torch, warnings
import caref_kernels
text = caref_kernels.explain()
if "cpu        not available: the compiled module caref_kernels._C is missing" not in text:
    sys.exit(text)
try:
    caref_kernels.caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), backend="cpu")
except NotImplementedError as error:
    if "_C" not in str(error) or "reference" not in str(error):
        sys.exit(str(error))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        caref_kernels.caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]))
    messages = [str(w.message) for w in caught]
if len(messages) != 1 or "plain-PyTorch reference" not in messages[0]:
    sys.exit(f"expected one warning, got {messages}")
if caught[0].filename != __file__:
    sys.exit(f"the warning names {caught[0].filename} instead of the caller's file")
"""


def test_pure_python_installation():
    """Without the compiled module everything works on the reference, which says once that it is slow."""
    run = _python("__file__ = '<string>'" + WITHOUT_COMPILED)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("choice", "message"),
    [("reference", ""), ("auto", ""), ("", ""), ("quantum", "ValueError: backend must be 'auto' or one of")],
)
def test_environment_variable(choice, message):
    program = """
import torch, caref_kernels
from caref_kernels import backends
logits = torch.zeros(2, 5)
caref_kernels.explain()
print("selected", backends.select("auto", logits))
"""
    run = _python(program, CAREF_KERNELS_BACKEND=choice)
    if message:
        assert run.returncode != 0
        assert message in run.stderr
    else:
        assert run.returncode == 0, run.stderr
        title, *lines = run.stdout.splitlines()
        assert title.endswith(f"cpu, CAREF_KERNELS_BACKEND={choice}" if choice == "reference" else "cpu")
        selected = lines.pop().removeprefix("selected ")
        assert choice in ("", "auto", selected)
        assert [line.split()[0] for line in lines if line.split()[1] == "runs"] == [selected]


def test_environment_variable_is_binding():
    """A backend that cannot run is an error, not another backend, and ``explain`` says that none runs."""
    program = """
import sys
sys.modules["caref_kernels._C"] = None
import torch, caref_kernels
if " runs" in caref_kernels.explain():
    sys.exit("a backend runs")
caref_kernels.caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]))
"""
    run = _python(program, CAREF_KERNELS_BACKEND="cpu")
    assert run.returncode != 0
    assert "NotImplementedError: backend 'cpu' cannot run" in run.stderr


# ------------------------------------------------------------------------------------------- rules about the source


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, top_level: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports (with the imported names appended for ``from`` imports)."""
    package = _module(path).split(".") if path.name == "__init__.py" else _module(path).split(".")[:-1]
    found = set()
    for node in _tree(path).body if top_level else ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def _internal(path: Path) -> set[str]:
    return {".".join(name.split(".")[1:2]) for name in _imports(path) if name.split(".")[0] == "caref_kernels"}


# What each module may import from the package: the arrows of the design.
ARROWS = {
    "sparsity.py": set(),
    "config.py": {"sparsity"},
    "objective.py": {"config", "sparsity"},
    "checks.py": {"distributed", "objective"},
    "ops.py": {"backends", "config", "objective"},
    "autograd.py": {"backends", "ops"},
    "functional.py": {"autograd", "backends", "checks", "config", "distributed", "objective", "ops", "sparsity"},
    "linear_chunks.py": {"checks", "config", "distributed", "objective", "ops"},
    "linear.py": {
        "autograd",
        "checks",
        "config",
        "distributed",
        "functional",
        "linear_chunks",
        "objective",
        "ops",
        "sparsity",
    },
    "modules.py": {"config", "distributed", "functional", "linear"},
    "distributed/__init__.py": set(),
    "distributed/collectives.py": set(),
    "distributed/dtensors.py": set(),
    "distributed/local_stats.py": {"config", "objective"},
    "distributed/shard.py": {"backends", "checks", "config", "distributed", "objective", "sparsity"},
    "backends/__init__.py": {"backends", "config", "distributed"},
    "backends/reference.py": {"checks", "config", "distributed", "objective"},
    "backends/compiled.py": {"config", "_C"},
    "backends/devices.py": set(),
    "backends/cpu.py": {"backends", "config", "objective"},
    "backends/cuda.py": {"backends", "config", "objective"},
    "backends/triton/__init__.py": {"backends", "config", "objective"},
    "backends/triton/forward.py": {"backends"},
    "backends/triton/backward.py": {"backends"},
    "backends/triton/select.py": {"backends"},
    "backends/triton/rows.py": set(),
    "backends/triton/row_math.py": set(),
    "backends/triton/tiling.py": set(),
}
PUBLIC_ONLY = ("harness", "integrations", "demo")


@pytest.mark.parametrize("name", ARROWS)
def test_import_arrows(name):
    assert _internal(PACKAGE / name) == ARROWS[name]


def test_backends_do_not_import_one_another():
    # compiled.py and devices.py are no backends: they are what two of them have in common.
    names = {path.stem for path in (PACKAGE / "backends").iterdir()} - {"__init__", "compiled", "devices"}
    for path in (PACKAGE / "backends").glob("*.py"):
        if path.stem != "__init__":
            imported = {part for name in _imports(path) if ".backends" in name for part in name.split(".")}
            assert not imported & names - {path.stem}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_outer_parts_use_the_public_api(path):
    """harness, demo and integrations reach the kernels through the public names (and one another) only."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    inside = _internal(path)
    if part in PUBLIC_ONLY:
        public = {
            "CarefConfig",
            "CarefLoss",
            "CarefOutput",
            "EntropyTopK",
            "LinearCarefLoss",
            "SCEDLoss",
            "TopK",
            "VocabShard",
            "__version__",
            "caref_loss",
            "explain",
            "fused_sced",
            "linear_caref_loss",
        }
        assert inside <= {*PUBLIC_ONLY, *public, "testing"}, path
    else:
        assert not inside & {*PUBLIC_ONLY, "testing"} or part in ("testing", "gpucheck"), path


CORE = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in PUBLIC_ONLY]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_imports_torch_and_the_standard_library(path):
    allowed = {*sys.stdlib_module_names, "torch", "caref_kernels"}
    if (
        path.relative_to(PACKAGE).parts[:2] == ("backends", "triton")
        or path.relative_to(PACKAGE).parts[0] == "gpucheck"
    ):
        allowed.add("triton")
    assert {name.split(".")[0] for name in _imports(path)} <= allowed


BANNED_NAMES = {"eval", "exec", "__import__", "compile"}
BANNED_ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("yaml", "load"),
    ("torch", "load"),
    ("numpy", "load"),
    ("np", "load"),
}
BANNED_MODULES = {"pickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_banned_calls(path):
    assert not {name.split(".")[0] for name in _imports(path)} & BANNED_MODULES
    for node in ast.walk(_tree(path)):
        assert not isinstance(node, ast.Assert), f"assert in {path}:{node.lineno} vanishes under python -O"
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            assert function.id not in BANNED_NAMES, f"{function.id} in {path}:{node.lineno}"
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            safe = any(keyword.arg == "weights_only" for keyword in node.keywords)
            assert (function.value.id, function.attr) not in BANNED_ATTRIBUTES or safe, f"{path}:{node.lineno}"
        for keyword in node.keywords:
            true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            assert not (keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and true), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_literal_tolerance(path):
    """Tolerances come from caref_kernels.testing alone."""
    pattern = re.compile(r"\b[ar]tol\s*=|\b(abs|rel)_tol\s*=")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert path == Path(__file__) or not found


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
