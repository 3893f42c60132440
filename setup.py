"""Builds caref_kernels._C from csrc/ without torch: plain C++ and CUDA compiled by ninja, linked as a Python module.

The CPU kernels are compiled once per instruction set; the module picks one at run time.  The CUDA kernels are built if
nvcc is there (CUDA_HOME, the path, /usr/local/cuda), whether or not a GPU is: CAREF_CUDA=0 leaves them out and
CAREF_CUDA=1 insists.  TORCH_CUDA_ARCH_LIST chooses their architectures, in torch's grammar.  Without a C++ compiler the
package installs as pure Python and runs its reference backend.  CAREF_SANITIZE=1 builds with AddressSanitizer and
UBSan; CXX and MAX_JOBS are honoured.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BASE_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi"
)
# -O1: at -O3 the checks of every template take minutes to compile, and find nothing more.
SANITIZE_FLAGS = "-O1 -fsanitize=address,undefined -fno-omit-frame-pointer -fno-sanitize-recover=undefined -g1"
PLAIN_SOURCES = ("bindings.cpp", "cpu/launch.cpp")
KERNEL_SOURCES = ("cpu/forward.cpp", "cpu/backward.cpp", "cpu/select.cpp")
# Instruction set as a C++ namespace -> compiler flags.
X86_SETS = {"x86_64_v4": "-march=x86-64-v4 -mprefer-vector-width=512", "x86_64_v3": "-march=x86-64-v3"}
# -ftz: e^y takes two instructions instead of four, and what it loses is below every sum's rounding.
NVCC_FLAGS = "-std=c++17 -O3 -ftz=true -Xcompiler -fPIC,-fvisibility=hidden,-Wno-unknown-pragmas -Xfatbin -compress-all"
CUDA_SOURCES = ("cuda/forward.cu", "cuda/select.cu", "cuda/backward.cu")
CUDA_STORAGES = ("Float32", "Float64", "BFloat16", "Float16")
# One image per major version runs on all of its minor ones; what comes later runs the PTX of the newest.
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
LEAST_ARCHITECTURE = 80  # bfloat16 arithmetic
NAMED_ARCHITECTURES = {"ampere": "8.0;8.6+PTX", "ada": "8.9+PTX", "hopper": "9.0+PTX", "blackwell": "10.0;12.0+PTX"}


def instruction_sets() -> dict[str, str]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**(X86_SETS if is_x86 else {}), "baseline": ""}


def compiler() -> str | None:
    """The C++ compiler of CXX, or the first of c++, g++, clang++ on the path."""
    chosen = os.environ.get("CXX")
    if chosen and shutil.which(shlex.split(chosen)[0]) is None:
        raise SystemExit(f"CXX={chosen!r} is not an executable")
    return chosen or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_nvcc() -> str | None:
    """The CUDA compiler, or ``None`` for a build without it."""
    wanted = os.environ.get("CAREF_CUDA", "auto") or "auto"
    if os.environ.get("CAREF_SANITIZE") == "1" and wanted == "auto":
        return None  # the sanitizers see host code alone
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"CAREF_CUDA={wanted!r} must be 'auto', '0' or '1'")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")
    if home and found is None:
        raise SystemExit(f"CUDA_HOME={home!r} has no bin/nvcc; correct or unset it, or set CAREF_CUDA=0")
    found = found or shutil.which("/usr/local/cuda/bin/nvcc")
    if wanted == "1" and found is None:
        raise SystemExit("CAREF_CUDA=1, and there is no nvcc: put it on the path or set CUDA_HOME")
    return found


class Architecture(NamedTuple):
    """One entry of TORCH_CUDA_ARCH_LIST: 9.0a+PTX is ("90a", True)."""

    number: str
    ptx: bool

    def __str__(self) -> str:
        return self.number + ("+PTX" if self.ptx else "")

    @property
    def value(self) -> int:
        return int(self.number.rstrip("af"))

    def flags(self) -> list[str]:
        codes = [f"sm_{self.number}", *([f"compute_{self.number}"] if self.ptx else [])]
        return [f"-gencode=arch=compute_{self.number},code={code}" for code in codes]


def parse_architectures(text: str) -> list[Architecture]:
    """TORCH_CUDA_ARCH_LIST: numbers like 8.0, 9.0a, 10.0f or names like Hopper, with +PTX, apart by ; or spaces."""
    for name, numbers in NAMED_ARCHITECTURES.items():
        text = re.sub(rf"\b{name}\b(\+PTX)?", numbers, text, flags=re.IGNORECASE)
    parsed = []
    for entry in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry, flags=re.IGNORECASE)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not like '8.0', '9.0a', '12.0+PTX' or 'Hopper'")
        major, minor, suffix, ptx = match.groups()
        architecture = Architecture(major + minor + suffix.lower(), bool(ptx))
        if architecture not in parsed:
            parsed.append(architecture)
    return parsed


def architectures(nvcc: str) -> list[Architecture]:
    """What to build for: of the list that the user gives, or by default, what this nvcc and these kernels can."""
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = {int(code) for code in re.findall(r"sm_(\d+)", codes)}
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
        chosen = [one for one in parse_architectures(";".join(DEFAULT_ARCHITECTURES)) if one.value in known]
        return [*chosen[:-1], chosen[-1]._replace(ptx=True)]
    asked = parse_architectures(wanted)
    unknown = [str(one) for one in asked if one.value not in known]
    if unknown:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={wanted!r}: {nvcc} does not know {', '.join(unknown)}")
    chosen = [one for one in asked if one.value >= LEAST_ARCHITECTURE]
    if not chosen:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST={wanted!r}: the kernels need 8.0 or later; CAREF_CUDA=0 leaves them out"
        )
    if len(chosen) < len(asked):
        sys.stderr.write(f"caref_kernels: no CUDA kernels for the architectures before 8.0 of {wanted!r}\n")
    return chosen


class CudaBuild(NamedTuple):
    """How the CUDA half is compiled and linked."""

    nvcc: str
    architectures: list[Architecture]

    @classmethod
    def found(cls) -> CudaBuild | None:
        nvcc = find_nvcc()
        return nvcc and cls(nvcc, architectures(nvcc))

    def compile_flags(self) -> str:
        codes = [flag for one in self.architectures for flag in one.flags()]
        return f"{NVCC_FLAGS} -ccbin {shlex.split(compiler())[0]} {' '.join(codes)}"

    def define(self) -> str:
        """For bindings.cpp; escaped for the shell."""
        return f"'-DCAREF_CUDA_ARCHITECTURES=\"{' '.join(map(str, self.architectures))}\"'"

    def link_command(self) -> str:
        """By nvcc, with the runtime inside: a wheel needs the driver alone, and only where there is a GPU."""
        host = f"-ccbin {shlex.split(compiler())[0]} -Xcompiler -fopenmp"
        return f"{self.nvcc} {host} -shared -cudart static -Xlinker --strip-all $in -o $out"

    @staticmethod
    def units() -> dict[str, tuple[str, str]]:
        """Object file -> (source, its own flags)."""
        made = {
            f"cuda/{Path(source).stem}_{storage}.o": (source, f"-DCAREF_STORAGE={storage}")
            for source in CUDA_SOURCES
            for storage in CUDA_STORAGES
        }
        return {**made, "cuda/launch.o": ("cuda/launch.cu", "")}


class NinjaBuild(build_ext):
    """Writes a build.ninja for the extension and runs it; an up-to-date build is a no-op."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(self._rules(target, CudaBuild.found()), encoding="utf-8")
        import ninja

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir), *jobs]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building caref_kernels._C failed ({' '.join(command)}); see the compiler output"
            ) from error

    def _rules(self, target: Path, cuda: CudaBuild | None) -> str:
        import pybind11

        flags = f"{BASE_FLAGS} {SANITIZE_FLAGS if os.environ.get('CAREF_SANITIZE') == '1' else ''}"
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        lines = [
            f"cxx = {compiler()}",
            f"cflags = {flags} {' '.join(f'-isystem {shlex.quote(path)}' for path in includes)}",
            "rule compile",
            "  command = $cxx -MD -MF $out.d $cflags $own -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cuda.link_command() if cuda else f'$cxx $cflags -shared {_link_flags()} $in -o $out'}",
        ]
        if cuda:
            lines += [
                f"nvcc = {cuda.nvcc}",
                f"nvccflags = {cuda.compile_flags()}",
                "rule compile_cuda",
                "  command = $nvcc -MD -MF $out.d $nvccflags $own -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        objects = []
        for source in PLAIN_SOURCES:
            own = cuda.define() if cuda and source == "bindings.cpp" else ""
            objects.append(self._compile(lines, source, f"plain/{Path(source).stem}.o", own))
        for name, isa_flags in instruction_sets().items():
            for source in KERNEL_SOURCES:
                own = f"-DCAREF_ISA={name} {isa_flags}"
                objects.append(self._compile(lines, source, f"{name}/{Path(source).stem}.o", own))
        if cuda:
            for output, (source, own) in cuda.units().items():
                objects.append(self._compile(lines, source, output, own, "compile_cuda"))
        lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"

    @staticmethod
    def _compile(lines: list[str], source: str, output: str, own: str, rule: str = "compile") -> str:
        lines += [f"build {output}: {rule} {_escape((ROOT / 'csrc' / source).resolve())}", f"  own = {own}"]
        return output


def _link_flags() -> str:
    if sys.platform == "darwin":
        return "-undefined dynamic_lookup"
    return "" if os.environ.get("CAREF_SANITIZE") == "1" else "-Wl,--strip-all"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    if compiler() is None:
        if os.environ.get("CAREF_CUDA") == "1":
            raise SystemExit("CAREF_CUDA=1, and there is no C++ compiler")
        sys.stderr.write("caref_kernels: no C++ compiler found; installing pure Python, without the compiled kernels\n")
        return []
    csrc = ROOT / "csrc"
    found = sorted(str(path.relative_to(ROOT)) for path in csrc.rglob("*") if path.is_file())
    sources = [path for path in found if path.endswith(".cpp")]
    return [Extension("caref_kernels._C", sources, depends=[path for path in found if path not in sources])]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
