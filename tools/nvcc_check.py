"""``make nvcc-check``: compile every CUDA kernel for every architecture, without a GPU, and check its registers.

Warnings are errors.  No kernel may spill registers, or use more of them than the number of resident blocks that its
launch assumes leaves to each (kBlocks in csrc/cuda/launch.cuh).  The linked module must load, and must raise a
RuntimeError where there is no device.  Without nvcc the exit code is 0 and the reason is printed, unless CAREF_CUDA=1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
STRICT = "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v,-warn-spills"
_REGISTER_FILE = 65_536
_MOST_REGISTERS = 255
# Small launches: their registers do not limit the number of resident blocks.
_UNBOUND = ("combine_kernel", "combine_sced_kernel")

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class Kernel(NamedTuple):
    """One kernel as ptxas describes it."""

    name: str
    architecture: str
    registers: int
    spilled: int  # bytes, of its own and of the functions that it calls


def parse(output: str) -> list[Kernel]:
    """Parse ``-Xptxas -v``: the lines of a kernel, then those of the functions it calls, up to the next kernel."""
    kernels, name, architecture, registers, spilled = [], None, "", 0, 0

    def add() -> None:
        if name is not None:
            kernels.append(Kernel(name, architecture, registers, spilled))

    for line in output.splitlines():
        entry, spills, used = _ENTRY.search(line), _SPILLS.search(line), _REGISTERS.search(line)
        if entry:
            add()
            (name, architecture), registers, spilled = entry.groups(), 0, 0
        elif spills:
            spilled += int(spills.group(2)) + int(spills.group(3))
        elif used:
            registers = int(used.group(1))
    add()
    return kernels


def register_limit(kernel: Kernel, unit: str, blocks: dict[str, int]) -> int:
    """The most registers of a thread with which the number of resident blocks that its launch assumes still fits."""
    if any(name in kernel.name for name in _UNBOUND):
        return _MOST_REGISTERS
    wanted = blocks["float64" if "Float64" in unit else "float32"]
    if "row_kernel" in kernel.name and "ILi4ELi2E" in kernel.name:
        wanted = blocks["many sums"]
    threads = blocks["threads"]
    if "topk_kernel" in kernel.name:
        threads = blocks["mask threads"]
        wanted = 1 if "Float64" in unit or "AnyExponents" in kernel.name else blocks["mask"]
    return _REGISTER_FILE // (threads * wanted) // 8 * 8


def launch_bounds() -> dict[str, int]:
    """The constants of the launches, read from the text of csrc/cuda."""
    launch = (ROOT / "csrc" / "cuda" / "launch.cuh").read_text(encoding="utf-8")
    reduce = (ROOT / "csrc" / "cuda" / "reduce.cuh").read_text(encoding="utf-8")
    kinds = re.search(r"kBlocks = sizeof\(T\) == 8 \? (\d) : (\d);", launch)
    many = re.search(r"kForwardBlocks = Kind::kMoments > 12 \? (\d) :", launch)
    threads = re.search(r"kMaxThreads = (\d+);", reduce)
    mask_threads = re.search(r"kTopKThreads = (\d+);", launch)
    mask = re.search(r"kTopKBlocks = sizeof\(T\) == 8 \|\| !Kind::kOnePass \? 1 : (\d);", launch)
    return {
        "float64": int(kinds.group(1)),
        "float32": int(kinds.group(2)),
        "many sums": int(many.group(1)),
        "threads": int(threads.group(1)),
        "mask threads": int(mask_threads.group(1)),
        "mask": int(mask.group(1)),
    }


def _setup_module():
    spec = importlib.util.spec_from_file_location("caref_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _run(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _compile(cuda, folder: Path) -> dict[str, list[Kernel]]:
    """The kernels of each unit; writes the object files into ``folder``."""

    def one(item) -> list[Kernel]:
        output, (source, own) = item
        place = folder / Path(output).name
        return parse(_run(f"{cuda.nvcc} {cuda.compile_flags()} {STRICT} {own} -c {ROOT / 'csrc' / source} -o {place}"))

    units = cuda.units()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return dict(zip(units, pool.map(one, units.items()), strict=True))


def _link_and_load(setup, cuda, folder: Path) -> str:
    """Link a module of the CUDA half alone; return its message without a device, or "runs" with one."""
    import pybind11

    bindings, path = folder / "bindings.o", folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    flags = f"-std=c++17 -O1 -fPIC -fvisibility=hidden -DCAREF_WITHOUT_CPU {cuda.define()} {includes}"
    _run(f"{setup.compiler()} {flags} -c {ROOT / 'csrc' / 'bindings.cpp'} -o {bindings}")
    objects = " ".join(shlex.quote(str(folder / Path(name).name)) for name in cuda.units())
    command = cuda.link_command().replace("$in", f"{bindings} {objects}").replace("$out", str(path))
    _run(command)
    needed = re.findall(r"NEEDED.*\[(\S+)\]", _run(f"readelf -d {path}"))
    if any("cuda" in name or "torch" in name for name in needed):
        raise SystemExit(f"the module needs {needed}: the CUDA runtime must be linked in")
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('checked._C', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "params = module.RowParams()\n"
        "params.outer_rows = params.inner_rows = params.columns = 1\n"
        "try:\n"
        "    module.cuda_forward_workspace(params)\n"
        "    print(module.CUDA_ARCHITECTURES, 'runs')\n"
        "except RuntimeError as error:\n"
        "    print(module.CUDA_ARCHITECTURES, error)\n"
    )
    return _run(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {path}").strip()


def main() -> int:
    """Compile, read, link, load; 0 if nothing is wrong."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    setup = _setup_module()
    cuda = setup.CudaBuild.found()
    if cuda is None:
        print("nvcc-check skipped: there is no nvcc (CUDA_HOME, the path, /usr/local/cuda)")
        return 0
    blocks, failures, count = launch_bounds(), [], 0
    with tempfile.TemporaryDirectory(prefix="caref-nvcc-") as name:
        folder = Path(name)
        for unit, kernels in _compile(cuda, folder).items():
            if "launch" not in unit and not kernels:
                failures.append(f"{unit}: no kernel in ptxas's output")
            for kernel in kernels:
                count += 1
                limit = register_limit(kernel, unit, blocks)
                if kernel.spilled or not 0 < kernel.registers <= limit:
                    failures.append(
                        f"{unit} {kernel.architecture} {kernel.name}: {kernel.registers} registers (at most {limit}), "
                        f"{kernel.spilled} bytes spilled"
                    )
        loaded = _link_and_load(setup, cuda, folder)
    print(f"nvcc-check: {count} kernels, {len(failures)} over their limits; the module says: {loaded}")
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures or not count else 0


if __name__ == "__main__":
    sys.exit(main())
