"""What an import does, and which modules the sources import and which calls they make."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import caref_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "caref_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))


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


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# What each module imports from the package: the arrows of DESIGN.md, by top-level module.  ``caref_kernels`` stands for
# the public names, which is all that the integrations and the harness use.
ARROWS: dict[str, set[str]] = {
    "__init__.py": {"backends", "config", "distributed", "functional", "linear", "modules", "sparsity"},
    "__main__.py": {"backends", "caref_kernels"},
    "autograd.py": {"backends", "ops"},
    "backends/__init__.py": {"backends", "config", "distributed"},
    "backends/compiled.py": {"_C", "config"},
    "backends/cpu.py": {"backends", "config", "objective"},
    "backends/cuda.py": {"backends", "config", "objective"},
    "backends/devices.py": set(),
    "backends/reference.py": {"checks", "config", "distributed", "objective"},
    "backends/triton/__init__.py": {"backends", "config", "objective"},
    "backends/triton/backward.py": {"backends"},
    "backends/triton/forward.py": {"backends"},
    "backends/triton/row_math.py": set(),
    "backends/triton/rows.py": set(),
    "backends/triton/select.py": {"backends"},
    "backends/triton/tiling.py": {"config"},
    "checks.py": {"config", "distributed", "objective"},
    "config.py": {"sparsity"},
    "distributed/__init__.py": set(),
    "distributed/collectives.py": set(),
    "distributed/dtensors.py": set(),
    "distributed/local_stats.py": {"config", "objective"},
    "distributed/shard.py": {"backends", "checks", "config", "distributed", "objective", "sparsity"},
    "divisor.py": {"checks", "config", "distributed", "objective", "ops"},
    "functional.py": {
        "autograd",
        "backends",
        "checks",
        "config",
        "distributed",
        "divisor",
        "keywords",
        "objective",
        "ops",
        "sparsity",
    },
    "harness": {"caref_kernels", "integrations"},
    "integrations": {"caref_kernels", "keywords"},
    "keywords.py": {"config", "distributed", "sparsity"},
    "linear.py": {
        "autograd",
        "checks",
        "config",
        "distributed",
        "divisor",
        "functional",
        "keywords",
        "linear_chunks",
        "objective",
        "ops",
        "sparsity",
    },
    "linear_chunks.py": {"checks", "config", "distributed", "objective", "ops"},
    "modules.py": {"config", "distributed", "functional", "keywords", "linear"},
    "objective.py": {"config", "sparsity"},
    "ops.py": {"backends", "checks", "config", "objective"},
    "sparsity.py": set(),
    "testing": {"config", "functional", "objective", "sparsity"},
}
PUBLIC_ONLY = ("harness", "integrations")
NOT_IN_THE_PACKAGE = {"benchmarks", "examples", "tests", "tools"}


def _imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, with the imported names appended for ``from`` imports."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def _module(path: Path) -> str:
    """The key of a file in ``ARROWS``: its path, or the folder of the parts that use public names alone."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if inside.parts[0] in (*PUBLIC_ONLY, "testing") else inside.as_posix()


def _internal(path: Path) -> set[str]:
    split = [name.split(".") for name in _imports(path)]
    names = {name[1] if name[1:] else "__init__" for name in split if name[0] == "caref_kernels"}
    own = {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()} | {"_C"}
    return {name if name in own - {"__init__"} else "caref_kernels" for name in names}


def test_import_arrows():
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        found.setdefault(_module(path), set()).update(_internal(path) - {_module(path)})
    assert found == ARROWS


def test_backends_do_not_import_one_another():
    # compiled.py and devices.py are no backends: they are what two of them have in common.
    names = {path.stem for path in (PACKAGE / "backends").iterdir()} - {"__init__", "compiled", "devices"}
    for path in (PACKAGE / "backends").glob("*.py"):
        if path.stem != "__init__":
            imported = {part for name in _imports(path) if ".backends" in name for part in name.split(".")}
            assert not imported & names - {path.stem}, path


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_the_package_imports_what_it_may(path):
    """The core: torch and the standard library.  The outer parts: public names of the core, and other packages."""
    part = path.relative_to(PACKAGE).parts[0]
    imports = _imports(path)
    roots = {name.split(".")[0] for name in imports}
    assert not roots & NOT_IN_THE_PACKAGE
    if part in PUBLIC_ONLY:
        names = {name.split(".")[1] for name in imports if name.startswith("caref_kernels.")}
        assert names <= {*caref_kernels.__all__, *PUBLIC_ONLY, "testing", "keywords"}
    else:
        # typing_extensions comes with torch, and is imported for type checkers alone, as the program above shows.
        allowed = {*sys.stdlib_module_names, "torch", "caref_kernels", "typing_extensions"}
        allowed |= {"triton"} if "triton" in path.parts else set()
        assert roots <= allowed


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


@pytest.mark.parametrize("path", SOURCES, ids=_name)
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
