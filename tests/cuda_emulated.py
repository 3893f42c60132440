"""The backend "cuda-emulated", for tests: the sources of csrc/cuda compiled by g++ with tests/cuda_emulation.

Importing this module registers the backend.  The first use compiles it, and the objects are kept under build/ by a hash
of their sources.  With CAREF_SANITIZE=1 it is compiled with AddressSanitizer and UBSan (.ci/sanitize).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from torch import Tensor

from caref_kernels import backends
from caref_kernels.backends.cuda import CudaBackend
from caref_kernels.config import RowSpec

ROOT = Path(__file__).resolve().parent.parent
NAME = "cuda-emulated"
STORAGES = ("Float32", "Float64", "BFloat16", "Float16")
SANITIZE = os.environ.get("CAREF_SANITIZE") == "1"
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -Werror".split()
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
# -O1 and -g1 keep the stack frames and lines that messages of the sanitizers name; -O2 halves the time of the suite.
CHECKED = "-O1 -g1 -fsanitize=address,undefined -fno-omit-frame-pointer -fno-sanitize-recover=undefined"
OPTIMISE = (CHECKED if SANITIZE else "-O2").split()
# The emulated device is small, so that the rows of the suite are split as wide rows are on a GPU.
MULTIPROCESSORS, SHARED_BYTES, MOST_BLOCKS = 16, 100 * 1024, 2**31 - 1
# The first lines of a program that a subprocess runs with this backend.
PREAMBLE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import cuda_emulated\n"


def compiler() -> str | None:
    """The C++ compiler, or None if there is none."""
    chosen = os.environ.get("CXX", "g++")
    return chosen if shutil.which(shlex.split(chosen)[0]) else None


# Wider rows run the same code; test_cuda_kernels.py tests every number of splits.
WIDEST_SANITIZED = 33_000
# Tests of many rows, or of many calls with many rows, are too slow: every shuffle switches fibers once per lane.
TOO_SLOW = frozenset(
    {
        "test_float16_gradient_is_scaled_before_it_is_rounded",
        "test_masks_do_not_depend_on_threads",
        "test_many_short_rows",
        "test_mean_of_many_sixteen_bit_rows",
        "test_number_of_threads",
        "test_sum_over_many_rows",
    }
)


def is_left_out(name: str, parameters: dict[str, object]) -> bool:
    """Whether a test with these parameters is too slow for the emulation or for its sanitized build."""
    columns = parameters.get("columns", 0)
    is_wide = name.startswith("test_widest") or (isinstance(columns, int) and columns > WIDEST_SANITIZED)
    return NAME in parameters.values() and (name in TOO_SLOW or (SANITIZE and is_wide))


def units(root: Path) -> dict[str, list[str]]:
    """A dict from the name of each object file to its compiler arguments."""
    csrc, emulation = root / "csrc", ROOT / "tests" / "cuda_emulation"
    as_cpp = ["-I", str(emulation), "-x", "c++"]
    made = {
        f"{name}_{storage}": [*as_cpp, f"-DCAREF_STORAGE={storage}", str(csrc / "cuda" / f"{name}.cu")]
        for storage in STORAGES
        for name in ("forward", "select", "backward")
    }
    made["launch"] = [*as_cpp, str(csrc / "cuda" / "launch.cu")]
    made["emulator"] = [str(emulation / "emulator.cpp")]
    made["bindings"] = [*_python_flags(), str(csrc / "bindings.cpp")]
    return made


def _python_flags() -> list[str]:
    import pybind11

    defines = ["-DCAREF_WITHOUT_CPU", '-DCAREF_CUDA_ARCHITECTURES="emulated"']
    return [*defines, "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]


def build(root: Path, folder: Path, names: tuple[str, ...] = ()) -> Path:
    """Compile the sources under ``root`` into ``folder`` and return the path of the module.

    If ``names`` is given, only these units are compiled, and the other units are those of this tree.
    """
    chosen = {name: arguments for name, arguments in units(root).items() if not names or name in names}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda item: _compile(folder / f"{item[0]}.o", item[1]), chosen.items()))
    own = {name: folder / f"{name}.o" for name in chosen}
    return _link({**(_objects() if names else {}), **own}, folder)


def _compile(output: Path, arguments: list[str]) -> None:
    _run([*FLAGS, *OPTIMISE, "-c", "-o", output, *arguments])


def _link(objects: dict[str, Path], folder: Path) -> Path:
    path = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([*OPTIMISE, "-shared", "-o", path, *objects.values()])
    return path


@functools.cache
def _objects() -> dict[str, Path]:
    """The objects of this tree, kept under build/ by a hash of their sources and flags."""
    folder = ROOT / "build" / "cuda_emulation"
    headers = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh")]
    headers += (ROOT / "tests" / "cuda_emulation").glob("*.h")
    common = hashlib.sha256(repr((FLAGS, OPTIMISE, compiler(), sys.version)).encode())
    for header in sorted(headers):
        common.update(header.read_bytes())
    found = {}
    for name, arguments in units(ROOT).items():
        key = common.copy()
        key.update(repr(arguments).encode() + Path(arguments[-1]).read_bytes())
        found[name] = folder / f"{name}-{key.hexdigest()[:16]}.o"

    def make(name: str) -> None:
        if not found[name].exists():
            temporary = found[name].with_suffix(".making.o")
            _compile(temporary, units(ROOT)[name])
            temporary.rename(found[name])

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling; its lock is released even if it dies
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(make, found))
    return found


def build_library(source: Path, folder: Path) -> Path:
    """Compile the kernels in ``source`` with the emulation, and return the path of the library."""
    emulation = ROOT / "tests" / "cuda_emulation"
    path = folder / f"{source.stem}.so"
    includes = ["-I", emulation, "-I", ROOT / "csrc" / "cuda"]
    _run([*FLAGS, *OPTIMISE, "-shared", "-o", path, emulation / "emulator.cpp", *includes, "-x", "c++", source])
    return path


def _run(arguments: list) -> None:
    command = [*shlex.split(compiler()), *map(str, arguments)]
    # The sanitizer that is preloaded for the tests must not be loaded into the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@functools.cache
def built() -> Path:
    """The path of the module of this tree, which is compiled if necessary."""
    objects = _objects()
    key = hashlib.sha256(repr(sorted(path.name for path in objects.values())).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_emulation" / key
    with open(folder.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            temporary = Path(tempfile.mkdtemp(dir=folder.parent))
            _link(objects, temporary)
            temporary.rename(folder)
    return next(folder.glob("_C*"))


def load(path: Path) -> ModuleType:
    """Import the extension at ``path`` under a unique name, because a module is found again by its name."""
    name = f"cuda_emulated_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}._C"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_COMPILER = compiler()  # looked up once, because torch.compile traces through unsupported()


class EmulatedCudaBackend(CudaBackend):
    """The CUDA backend for CPU tensors, on the emulated device."""

    name = NAME

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    @functools.cached_property
    def path(self) -> Path:
        return self._path or built()

    @functools.cached_property
    def module(self) -> ModuleType:
        return load(self.path)

    @functools.cached_property
    def controls(self) -> ctypes.CDLL:
        """The functions for tests at the end of emulator.cpp."""
        return ctypes.CDLL(str(self.path))

    @contextlib.contextmanager
    def device(
        self, multiprocessors: int = MULTIPROCESSORS, shared: int = SHARED_BYTES, most_blocks: int = MOST_BLOCKS
    ):
        """Change the properties of the emulated device for a with-block."""
        self.controls.cuda_emulation_set_device(multiprocessors, shared, most_blocks)
        yield
        self.controls.cuda_emulation_set_device(MULTIPROCESSORS, SHARED_BYTES, MOST_BLOCKS)

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        if _COMPILER is None:
            return "no C++ compiler to build the emulation with"
        return None if logits.device.type == "cpu" else f"logits are on {logits.device}"

    def _guard(self, logits: Tensor) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _stream(self, logits: Tensor) -> int:
        return 0


BACKEND = EmulatedCudaBackend()
backends._BACKENDS[NAME] = BACKEND
