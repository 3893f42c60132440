"""The emulation of CUDA detects the faults that it is meant to detect.

The first half runs small kernels with one fault each.  The second half injects faults into csrc/cuda and checks that
the kernels of the suite would reveal them.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import NamedTuple

import cuda_emulated
import pytest
import torch

from caref_kernels.config import RowSpec
from caref_kernels.testing import check_evaluation, evaluate, make_case, oracle

pytestmark = pytest.mark.skipif(cuda_emulated.compiler() is None, reason="no C++ compiler")

ROOT = cuda_emulated.ROOT
SPEC = RowSpec(2.0, 1.0, 64, -100, True)


@pytest.fixture(scope="module")
def run_kernel(tmp_path_factory):
    """A function that runs a kernel of faults.cu by name and returns its error, or what it has written."""
    folder = tmp_path_factory.mktemp("faults")
    library = cuda_emulated.build_library(ROOT / "tests" / "cuda_emulation" / "faults.cu", folder)
    function = ctypes.CDLL(str(library)).run_kernel
    function.restype = ctypes.c_char_p

    def run(name: str) -> str | list[int]:
        out = (ctypes.c_int * 64)()
        error = function(name.encode(), out)
        return list(out) if error is None else error.decode()

    return run


def test_correct_kernels_run(run_kernel):
    assert run_kernel("reverse") == list(range(64))[::-1]
    assert run_kernel("neighbours") == [index ^ 1 for index in range(64)]
    assert run_kernel("votes") == [7] * 64
    assert run_kernel("sum") == [sum(range(64))] * 64
    assert run_kernel("scan") == [lane + 1 + lane.bit_length() for lane in range(32)] * 2


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing barrier", "reads byte 252 of shared memory, which nothing has written"),
        (
            "reuse",
            "thread 32 of block 0: reads byte 0 of shared memory, which thread 0 has written since the last barrier",
        ),
        ("late reuse", "writes byte 0 of shared memory, which another thread has read since the last barrier"),
        ("half a barrier", "divergent barrier: thread 0 waits at __syncthreads at faults.cu:"),
        ("two barriers", "divergent barrier: thread 0 waits at __syncthreads at faults.cu:"),
        ("missing lane", "divergent warp: thread 0 waits at __shfl_xor_sync at faults.cu:"),
        ("unwritten", "thread 0 of block 0: reads byte 0 of shared memory, which nothing has written"),
        ("beyond the end", "bytes 256 to 260 are not aligned in the 256 of shared memory"),
        ("sum of nothing", "thread 0 of block 0: reads byte 0 of shared memory, which nothing has written"),
        (
            "sum before it is cleared",
            "writes byte 0 of shared memory, which thread 0 has written since the last barrier",
        ),
        ("sum read early", "writes byte 0 of shared memory, which another thread has read since the last barrier"),
        ("missing __syncwarp", "reads byte 4 of shared memory, which nothing has written"),
    ],
)
def test_faults_are_named(run_kernel, name, error):
    assert error in run_kernel(name)


# --- Faults injected into csrc/. ---


class InjectedFault(NamedTuple):
    """A text in a file of csrc/, its replacement, and the unit to compile again (of float32 if it names no storage)."""

    file: str
    text: str
    replacement: str
    unit: str


FAULTS = {
    "missing barrier": InjectedFault(
        "cuda/reduce.cuh",
        "__syncthreads();  // the sums of all warps are written before the first warp reads them",
        "",
        "forward",
    ),
    "missing barrier before the two columns": InjectedFault(
        "cuda/backward.cu",
        "__syncthreads();  // the general form has been written before the two columns are overwritten",
        "",
        "backward",
    ),
    "off-by-one tail": InjectedFault(
        "cuda/storage.cuh", "column < columns_ ? data_", "column <= columns_ ? data_", "forward"
    ),
    "tail written": InjectedFault(
        "cuda/storage.cuh", "if (column < columns_) data_[column]", "if (column <= columns_) data_[column]", "backward"
    ),
    "unchecked label": InjectedFault(
        "cuda/splits.cuh", "(target.label < 0 || target.label >= columns)", "target.label < 0 && columns", "forward"
    ),
    "int32 offset": InjectedFault(
        "row_layout.h",
        "return (row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride;",
        "return static_cast<int32_t>((row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride);",
        "forward_BFloat16",
    ),
    "histogram not clear": InjectedFault(
        "cuda/select.cuh", "__syncthreads();  // the histogram is clear", "", "select"
    ),
    "histogram not complete": InjectedFault(
        "cuda/select.cuh", "__syncthreads();  // the histogram is complete", "", "select"
    ),
    "divergent barrier": InjectedFault(
        "cuda/reduce.cuh",
        "  __syncthreads();  // the sums of all warps",
        "  if (warp == 0) __syncthreads();  // the sums of all warps",
        "forward",
    ),
    "shared row not filled": InjectedFault(
        "cuda/row_sums.cuh", "row[index] = vector;", "if (index > 0) row[index] = vector;", "forward"
    ),
}


def _backend(tmp_path: Path, name: str) -> cuda_emulated.EmulatedCudaBackend:
    """A backend with one faulty unit; its other units are those of the suite."""
    fault = FAULTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / fault.file
    text = source.read_text(encoding="utf-8")
    assert text.count(fault.text) == 1
    source.write_text(text.replace(fault.text, fault.replacement), encoding="utf-8")
    unit = fault.unit if "_" in fault.unit else f"{fault.unit}_Float32"
    path = cuda_emulated.build(tmp_path, tmp_path, (unit,))
    return cuda_emulated.EmulatedCudaBackend(path)


def _terms(backend, logits, labels=None, topk=(0.0, 0, 0)):
    """Terms and statistics; ``topk`` is (k_scale, k_min, k_max)."""
    return backend.forward(logits, labels, RowSpec(*SPEC[:5], *topk)._replace(vocab_size=logits.size(-1)))


def _run(backend, logits, labels=None):
    """Terms and the gradient of their sum."""
    spec = SPEC._replace(vocab_size=logits.size(-1))
    terms, stats = _terms(backend, logits, labels)
    gradient = torch.full_like(logits, -7.0)
    backend.gradient(torch.ones_like(terms), logits, labels, stats, spec, gradient)
    return terms, gradient


def _rows_before(value: float, columns: int = 33):
    """Two rows in a buffer that holds ``value`` behind each of them."""
    buffer = torch.full((2, 40), value)
    buffer[:, :columns] = make_case("normal_1", 2, columns, seed=1).logits
    return buffer[:, :columns], torch.tensor([3, 7])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing barrier", r"CUDA: row_kernel: thread \d+ of block 0: reads byte \d+ of shared memory"),
        (
            "histogram not clear",
            r"CUDA: topk_kernel: thread \d+ of block 0: \w+ byte \d+ of shared memory, which (nothing|thread)",
        ),
        (
            "histogram not complete",
            r"CUDA: topk_kernel: thread \d+ of block 0: \w+ byte \d+ of shared memory, which (several|another|thread)",
        ),
        ("divergent barrier", r"CUDA: row_kernel: divergent barrier: thread 0 waits at __syncthreads at reduce.cuh:"),
        (
            "shared row not filled",
            r"CUDA: row_kernel: thread 0 of block 0: reads byte \d+ of shared memory, which nothing",
        ),
    ],
)
def test_missing_and_divergent_barriers_and_unwritten_memory(tmp_path, name, error):
    case = make_case("normal_1", 2, 1000, seed=1)
    backend = _backend(tmp_path, name)
    with pytest.raises(RuntimeError, match=error):
        _terms(backend, *case, *([(0.0, 40, 40)] if "topk_kernel" in error else []))


def test_missing_barrier_before_the_two_columns(tmp_path):
    """Global memory is written in the wrong order, so the two columns may keep the values of the general form."""
    case = make_case("normal_1", 2, 1000, seed=1)
    _, expected = _run(cuda_emulated.BACKEND, *case)
    _, actual = _run(_backend(tmp_path, "missing barrier before the two columns"), *case)
    differ = (actual != expected).nonzero().tolist()
    assert [0, int(case.labels[0])] in differ
    assert len(differ) <= 4


def test_off_by_one_tail_is_read(tmp_path):
    logits, labels = _rows_before(1e30)
    expected, _ = _run(cuda_emulated.BACKEND, logits, labels)
    actual, _ = _run(_backend(tmp_path, "off-by-one tail"), logits, labels)
    assert torch.isfinite(expected).all()
    assert not torch.equal(actual, expected)


def test_off_by_one_tail_is_written(tmp_path):
    logits, labels = _rows_before(5.0)
    spec = SPEC._replace(vocab_size=33)
    for backend, rim in ((cuda_emulated.BACKEND, True), (_backend(tmp_path, "tail written"), False)):
        out = torch.full((2, 40), -7.0)
        terms, stats = backend.forward(logits, labels, spec)
        backend.gradient(torch.ones_like(terms), logits, labels, stats, spec, out[:, :33])
        assert bool((out[:, 33:] == -7.0).all()) == rim


def test_unchecked_label_forms_an_address(tmp_path):
    """The label of the first row points behind the row, at a number that a correct kernel never reads."""
    logits, labels = _rows_before(123.0)
    labels[0] = 35
    expected, _ = _run(cuda_emulated.BACKEND, logits, labels)
    actual, _ = _run(_backend(tmp_path, "unchecked label"), logits, labels)
    assert torch.isnan(expected[0]).all()
    assert torch.isfinite(actual[0]).all()


def test_offset_in_32_bits(tmp_path):
    """Rows are 2^32 elements apart (untouched pages take no memory), so a 32-bit offset reads the first row twice."""
    rows = make_case("normal_3", 2, 50, torch.bfloat16).logits
    try:
        storage = torch.empty(2**32 + 50, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for rows so far apart: {error}")
    far = storage.as_strided((2, 50), (2**32, 1)).copy_(rows)
    expected, _ = _run(cuda_emulated.BACKEND, rows)
    right, _ = _terms(cuda_emulated.BACKEND, far)
    wrong, _ = _terms(_backend(tmp_path, "int32 offset"), far)
    assert torch.equal(right, expected)
    assert torch.equal(wrong, expected[:1].expand(2, 3))


def test_the_module_of_the_suite_is_correct():
    """Without an injected fault the kernels of the tests above are correct."""
    case = make_case("lm_like", 3, 1000, seed=2, ignored=1)
    check_evaluation(evaluate(*case, backend=cuda_emulated.NAME), oracle(*case))
