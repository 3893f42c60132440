"""The emulation of CUDA stops at every mistake that it is for: in kernels of its own, and planted in the product's.

The first half shows what it detects; the second patches csrc/cuda and shows that what the suite runs would notice.
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
def planted(tmp_path_factory):
    """Runs a kernel of planted.cu by name: its error, or what it has written."""
    folder = tmp_path_factory.mktemp("planted")
    library = cuda_emulated.build_library(ROOT / "tests" / "cuda_emulation" / "planted.cu", folder)
    run_planted = ctypes.CDLL(str(library)).run_planted
    run_planted.restype = ctypes.c_char_p

    def run(name: str) -> str | list[int]:
        out = (ctypes.c_int * 64)()
        error = run_planted(name.encode(), out)
        return list(out) if error is None else error.decode()

    return run


def test_right_kernels_run(planted):
    assert planted("reverse") == list(range(64))[::-1]
    assert planted("neighbours") == [index ^ 1 for index in range(64)]
    assert planted("votes") == [7] * 64
    assert planted("sum") == [sum(range(64))] * 64
    assert planted("scan") == [lane + 1 + lane.bit_length() for lane in range(32)] * 2


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing barrier", "reads byte 252 of shared memory, which nothing has written"),
        (
            "reuse",
            "thread 32 of block 0: reads byte 0 of shared memory, which thread 0 has written since the last barrier",
        ),
        ("late reuse", "writes byte 0 of shared memory, which another thread has read since the last barrier"),
        ("half a barrier", "divergent barrier: thread 0 waits at __syncthreads at planted.cu:"),
        ("two barriers", "divergent barrier: thread 0 waits at __syncthreads at planted.cu:"),
        ("missing lane", "divergent warp: thread 0 waits at __shfl_xor_sync at planted.cu:"),
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
def test_mistakes_are_named(planted, name, error):
    assert error in planted(name)


# ------------------------------------------------------------------------------- planted in the product


class Planted(NamedTuple):
    """A mistake in csrc/: the text, what replaces it, and the unit to compile again, of float32 unless it says more."""

    file: str
    text: str
    replacement: str
    unit: str


MISTAKES = {
    "missing barrier": Planted(
        "cuda/reduce.cuh", "__syncthreads();  // the first warp reads what the others have written", "", "forward"
    ),
    "missing barrier before the two columns": Planted(
        "cuda/backward.cu",
        "__syncthreads();  // the two columns are written after the general form of them",
        "",
        "backward",
    ),
    "off-by-one tail": Planted(
        "cuda/storage.cuh", "column < columns_ ? data_", "column <= columns_ ? data_", "forward"
    ),
    "tail written": Planted(
        "cuda/storage.cuh", "if (column < columns_) data_[column]", "if (column <= columns_) data_[column]", "backward"
    ),
    "unchecked label": Planted(
        "cuda/slices.cuh", "(target.label < 0 || target.label >= columns)", "target.label < 0 && columns", "forward"
    ),
    "int32 offset": Planted(
        "row_layout.h",
        "return (row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride;",
        "return static_cast<int32_t>((row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride);",
        "forward_BFloat16",
    ),
    "histogram not clear": Planted("cuda/select.cuh", "__syncthreads();  // the histogram is clear", "", "select"),
    "histogram not whole": Planted("cuda/select.cuh", "__syncthreads();  // the histogram is whole", "", "select"),
    "divergent barrier": Planted(
        "cuda/reduce.cuh",
        "  __syncthreads();  // the first warp",
        "  if (warp == 0) __syncthreads();  // the first warp",
        "forward",
    ),
    "shared row not filled": Planted(
        "cuda/row_sums.cuh", "row[index] = vector;", "if (index > 0) row[index] = vector;", "forward"
    ),
}


def _backend(tmp_path: Path, name: str) -> cuda_emulated.EmulatedCudaBackend:
    """One unit with that mistake; everything else is the module of the suite."""
    mistake = MISTAKES[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / mistake.file
    text = source.read_text(encoding="utf-8")
    assert text.count(mistake.text) == 1
    source.write_text(text.replace(mistake.text, mistake.replacement), encoding="utf-8")
    unit = mistake.unit if "_" in mistake.unit else f"{mistake.unit}_Float32"
    path = cuda_emulated.build(tmp_path, tmp_path, (unit,))
    return cuda_emulated.EmulatedCudaBackend(path)


def _terms(backend, logits, labels=None, budget=(0.0, 0, 0)):
    """Terms and statistics."""
    return backend.forward(logits, labels, RowSpec(*SPEC[:5], *budget)._replace(vocab_size=logits.size(-1)))


def _run(backend, logits, labels=None):
    """Terms and the gradient of their sum."""
    spec = SPEC._replace(vocab_size=logits.size(-1))
    terms, stats = _terms(backend, logits, labels)
    gradient = torch.full_like(logits, -7.0)
    backend.backward(torch.ones_like(terms), logits, labels, stats, spec, gradient)
    return terms, gradient


def _row_before(value: float, columns: int = 33):
    """Two rows of a buffer that holds ``value`` behind each of them."""
    buffer = torch.full((2, 40), value)
    buffer[:, :columns] = make_case("normal_1", 2, columns, seed=1).logits
    return buffer[:, :columns], torch.tensor([3, 7])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing barrier", r"CUDA: row_kernel: thread \d+ of block 0: reads byte \d+ of shared memory"),
        (
            "histogram not clear",
            r"CUDA: mask_kernel: thread \d+ of block 0: \w+ byte \d+ of shared memory, which (nothing|thread)",
        ),
        (
            "histogram not whole",
            r"CUDA: mask_kernel: thread \d+ of block 0: \w+ byte \d+ of shared memory, which (several|another|thread)",
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
        _terms(backend, *case, *([(0.0, 40, 40)] if "mask_kernel" in error else []))


def test_missing_barrier_before_the_two_columns(tmp_path):
    """Writes to global memory in the wrong order: the values are those of the general form."""
    case = make_case("normal_1", 2, 1000, seed=1)
    _, expected = _run(cuda_emulated.BACKEND, *case)
    _, actual = _run(_backend(tmp_path, "missing barrier before the two columns"), *case)
    differ = (actual != expected).nonzero().tolist()
    assert [0, int(case.labels[0])] in differ
    assert len(differ) <= 4


def test_off_by_one_tail_is_read(tmp_path):
    logits, labels = _row_before(1e30)
    expected, _ = _run(cuda_emulated.BACKEND, logits, labels)
    actual, _ = _run(_backend(tmp_path, "off-by-one tail"), logits, labels)
    assert torch.isfinite(expected).all()
    assert not torch.equal(actual, expected)


def test_off_by_one_tail_is_written(tmp_path):
    logits, labels = _row_before(5.0)
    spec = SPEC._replace(vocab_size=33)
    for backend, rim in ((cuda_emulated.BACKEND, True), (_backend(tmp_path, "tail written"), False)):
        out = torch.full((2, 40), -7.0)
        terms, stats = backend.forward(logits, labels, spec)
        backend.backward(torch.ones_like(terms), logits, labels, stats, spec, out[:, :33])
        assert bool((out[:, 33:] == -7.0).all()) == rim


def test_unchecked_label_forms_an_address(tmp_path):
    """The label of the first row points behind it, at a number that a checked kernel never looks at."""
    logits, labels = _row_before(123.0)
    labels[0] = 35
    expected, _ = _run(cuda_emulated.BACKEND, logits, labels)
    actual, _ = _run(_backend(tmp_path, "unchecked label"), logits, labels)
    assert torch.isnan(expected[0]).all()
    assert torch.isfinite(actual[0]).all()


def test_offset_in_32_bits(tmp_path):
    """Rows 2^32 elements apart, in pages that take memory only when touched: 32 bits give the first row again."""
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


def test_the_module_of_the_suite_is_right(tmp_path):
    """The tests above differ from it by one line each."""
    case = make_case("lm_like", 3, 1000, seed=2, ignored=1)
    check_evaluation(evaluate(*case, backend=cuda_emulated.NAME), oracle(*case))
