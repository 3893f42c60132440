"""Builds caref_kernels._C from csrc/ without torch: plain C++ compiled by ninja, linked as a Python module.

The CPU kernels are compiled once per instruction set; the module picks one at run time.  Without a C++ compiler the
package installs as pure Python and runs its reference backend.  CAREF_SANITIZE=1 builds with AddressSanitizer and
UBSan; CXX and MAX_JOBS are honoured.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BASE_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi"
)
SANITIZE_FLAGS = "-fsanitize=address,undefined -fno-omit-frame-pointer -fno-sanitize-recover=undefined -g"
PLAIN_SOURCES = ("bindings.cpp", "cpu/launch.cpp")
KERNEL_SOURCES = ("cpu/forward.cpp", "cpu/backward.cpp", "cpu/select.cpp")
# Instruction set as a C++ namespace -> compiler flags.
X86_SETS = {"x86_64_v4": "-march=x86-64-v4 -mprefer-vector-width=512", "x86_64_v3": "-march=x86-64-v3"}


def instruction_sets() -> dict[str, str]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**(X86_SETS if is_x86 else {}), "baseline": ""}


def compiler() -> str | None:
    """The C++ compiler of CXX, or the first of c++, g++, clang++ on the path."""
    chosen = os.environ.get("CXX")
    if chosen and shutil.which(shlex.split(chosen)[0]) is None:
        raise SystemExit(f"CXX={chosen!r} is not an executable")
    return chosen or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


class NinjaBuild(build_ext):
    """Writes a build.ninja for the extension and runs it; an up-to-date build is a no-op."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(self._rules(target), encoding="utf-8")
        import ninja

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir), *jobs]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building caref_kernels._C failed ({' '.join(command)}); see the compiler output"
            ) from error

    def _rules(self, target: Path) -> str:
        import pybind11

        flags = f"{BASE_FLAGS} {SANITIZE_FLAGS if os.environ.get('CAREF_SANITIZE') == '1' else ''}"
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        lines = [
            f"cxx = {compiler()}",
            f"cflags = {flags} {' '.join(f'-isystem {shlex.quote(path)}' for path in includes)}",
            "rule compile",
            "  command = $cxx -MD -MF $out.d $cflags $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx $cflags -shared {_link_flags()} $in -o $out",
        ]
        objects = []
        for source in PLAIN_SOURCES:
            objects.append(self._compile(lines, source, "plain", ""))
        for name, isa_flags in instruction_sets().items():
            for source in KERNEL_SOURCES:
                objects.append(self._compile(lines, source, name, f"-DCAREF_ISA={name} {isa_flags}"))
        lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"

    @staticmethod
    def _compile(lines: list[str], source: str, variant: str, flags: str) -> str:
        output = f"{variant}/{Path(source).stem}.o"
        lines += [f"build {output}: compile {_escape((ROOT / 'csrc' / source).resolve())}", f"  isa = {flags}"]
        return output


def _link_flags() -> str:
    if sys.platform == "darwin":
        return "-undefined dynamic_lookup"
    return "" if os.environ.get("CAREF_SANITIZE") == "1" else "-Wl,--strip-all"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    if compiler() is None:
        sys.stderr.write("caref_kernels: no C++ compiler found; installing pure Python, without the CPU kernels\n")
        return []
    sources, headers = (
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*.{ending}")) for ending in ("cpp", "h")
    )
    return [Extension("caref_kernels._C", sources, depends=headers)]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
