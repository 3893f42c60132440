"""What setup.py decides and what a wheel holds; and the reader of ptxas's output."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution

from caref_kernels.backends.compiled import MODULE
from tools import nvcc_check

ROOT = Path(__file__).resolve().parent.parent


def _module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


setup = _module("caref_setup", ROOT / "setup.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", "80"),
        ("8.0;9.0+PTX", "80 90+PTX"),
        ("8.0 8.6, 9.0a", "80 86 90a"),
        ("Hopper", "90+PTX"),
        ("ampere;10.0f", "80 86+PTX 100f"),
        (" 12.0+ptx; 12.0+PTX ;", "120+PTX"),
    ],
)
def test_grammar_of_the_architecture_list(text, expected):
    assert " ".join(map(str, setup.parse_architectures(text))) == expected


@pytest.mark.parametrize("text", ["sm_80", "8", "8.0+PTY", "Volta", "9.0b", ";;8"])
def test_what_is_not_in_the_grammar_is_an_error(text):
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: '.*' is not like '8.0'"):
        setup.parse_architectures(text)


def test_flags_of_an_architecture():
    (one,) = setup.parse_architectures("9.0a+PTX")
    assert one.flags() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A CUDA_HOME whose nvcc knows up to sm_90."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("CAREF_CUDA", "TORCH_CUDA_ARCH_LIST", "CAREF_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    return str(nvcc)


def test_default_is_what_this_nvcc_can_with_ptx_of_the_newest(fake_nvcc):
    assert setup.find_nvcc() == fake_nvcc
    assert " ".join(map(str, setup.architectures(fake_nvcc))) == "80 90+PTX"


def test_asked_architectures(fake_nvcc, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.6")
    assert " ".join(map(str, setup.architectures(fake_nvcc))) == "86"
    assert "before 8.0" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    with pytest.raises(SystemExit, match="does not know 100"):
        setup.architectures(fake_nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(SystemExit, match=r"need 8\.0 or later"):
        setup.architectures(fake_nvcc)


def test_decision_for_or_against_cuda(fake_nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CAREF_CUDA", "0")
    assert setup.find_nvcc() is None
    monkeypatch.setenv("CAREF_CUDA", "yes")
    with pytest.raises(SystemExit, match="CAREF_CUDA='yes' must be 'auto', '0' or '1'"):
        setup.find_nvcc()
    monkeypatch.setenv("CAREF_CUDA", "auto")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"CUDA_HOME='.*nowhere' has no bin/nvcc"):
        setup.find_nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert setup.find_nvcc() is None
    monkeypatch.setenv("CAREF_CUDA", "1")
    with pytest.raises(SystemExit, match="CAREF_CUDA=1, and there is no nvcc"):
        setup.find_nvcc()


def test_rules_with_and_without_cuda(fake_nvcc, tmp_path):
    build = setup.NinjaBuild(Distribution())
    cuda = setup.CudaBuild.found()
    with_cuda, without = build._rules(tmp_path / "_C.so", cuda), build._rules(tmp_path / "_C.so", None)
    assert with_cuda.count("compile_cuda /") == len(cuda.units()) == 13
    assert "-cudart static" in with_cuda
    assert "code=compute_90" in with_cuda
    assert "nvcc" not in without
    assert "CAREF_CUDA_ARCHITECTURES" not in without


PTXAS = """\
ptxas info    : Compiling entry function '_Z10row_kernelI_13EvenILi4ELi2EE' for 'sm_80'
ptxas info    : Function properties for _Z10row_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 1 barriers
ptxas info    : Function properties for __internal_accurate_pow
    0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '_Z15gradient_kernel' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers
"""


def test_ptxas_output_is_parsed():
    row, gradient = nvcc_check.parse(PTXAS)
    assert (row.architecture, row.registers, row.spilled) == ("sm_80", 90, 16)
    assert (gradient.architecture, gradient.registers, gradient.spilled) == ("sm_90", 80, 0)
    blocks = nvcc_check.launch_bounds()
    assert blocks == {"float64": 2, "float32": 3, "many sums": 2, "threads": 256, "mask threads": 512, "mask": 2}
    assert nvcc_check.register_limit(gradient, "backward_Float32", blocks) == 80
    assert nvcc_check.register_limit(gradient, "backward_Float64", blocks) == 128
    assert nvcc_check.register_limit(row, "forward_Float32", blocks) == 128
    mask = nvcc_check.Kernel("topk_kernel<TopKMasked<EvenExponents<2, 1>>>", "sm_90", 64, 0)
    any_exponents = mask._replace(name="topk_kernel<TopKMasked<AnyExponents>>")
    limits = [(mask, "select_Float16", 64), (mask, "select_Float64", 128), (any_exponents, "select_Float32", 128)]
    assert all(nvcc_check.register_limit(kernel, unit, blocks) == limit for kernel, unit, limit in limits)


STUB = """\
#!/bin/sh
# Makes an empty file of what it is asked for, and what ninja wants to know of it.
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2 ;; -MF) depfile=$2 ;; esac
  shift
done
: > "$out"
if [ -n "$depfile" ]; then echo "$out:" > "$depfile"; fi
"""


def test_content_of_a_wheel(tmp_path):
    """The package and nothing else; a stub stands for the compiler, because the content is the same."""
    stub = tmp_path / "c++"
    stub.write_text(STUB)
    stub.chmod(0o755)
    copy = tmp_path / "tree"
    for name in ("caref_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    environment = {**os.environ, "CAREF_CUDA": "0", "CXX": str(stub)}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= 300_000  # bytes, without the compiled module
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    (module,) = [name for name in names if name.endswith(".so")]
    assert module.startswith("caref_kernels/_C.")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "caref_kernels").rglob("*.py")}
    assert sources <= set(names)
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"caref_kernels"}
    assert not [name for name in names if re.search(r"\.(cu|cuh|h|cpp|o|ninja)$", name)]
    assert re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE) == ["torch>=2.10"]


@pytest.mark.skipif(MODULE is None or shutil.which("readelf") is None, reason="no compiled module, or no readelf")
def test_the_module_needs_neither_torch_nor_a_cuda_library():
    """Whether or not the CUDA half is in it: its runtime is linked in."""
    done = subprocess.run(["readelf", "-d", MODULE.__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(\S+)\]", done.stdout)
    assert needed
    assert not [name for name in needed if re.search("cuda|torch|c10|python", name)]
