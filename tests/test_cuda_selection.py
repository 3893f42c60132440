"""Top-k masks on the emulated CUDA device: rows that fit into shared memory, listed candidates, lists that overflow.

The tests of test_sparsity.py run on the emulated device too, as the backend "cuda-emulated".
"""

from __future__ import annotations

import ctypes
import math

import cuda_emulated
import pytest
import torch
from cuda_emulated import BACKEND, NAME

from caref_kernels import CarefConfig, EntropyTopK, TopK, backends, caref_loss, objective, ops, sparsity
from caref_kernels.testing import check_evaluation, evaluate, make_case, oracle, oracle_given

pytestmark = pytest.mark.skipif(cuda_emulated.compiler() is None, reason="no C++ compiler")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (Multiprocessors, bytes of shared memory) with which a row of 9,000 columns fits into shared memory, is listed, and is
# not listed because there is no memory for lists.
DEVICES = {"fits": (16, 200 * 1024), "listed": (16, 34 * 1024), "no lists": (2, 20 * 1024)}
COLUMNS = 9_000


def _statistics(logits, policy, labels=None):
    spec = CarefConfig(sparsity=policy, return_terms=True).row_spec(logits.size(-1))
    return ops.forward(logits, labels, spec, NAME)[1]


def _mask(logits, policy):
    return _statistics(logits, policy)[:, len(objective.STATISTICS) :]


def _exact_mask(logits, k):
    values = logits.to(objective.accumulation_dtype(logits.dtype))
    return sparsity.top_k_mask(values, torch.full((len(logits), 1), k)).statistics()


def _rows(dtype, columns=COLUMNS):
    """Noise; ties; one value; subnormals and both zeros; mostly -inf; ascending; one large value for each thread."""
    generator = torch.Generator().manual_seed(columns)
    noise = torch.randn(columns, generator=generator)
    ties = torch.randint(-9, 9, (columns,), generator=generator) / 4.0
    small = torch.randint(-40, 40, (columns,), generator=generator).to(dtype) * torch.finfo(dtype).smallest_normal / 64
    rare = torch.where(noise > 1.5, noise, -math.inf)
    width = 16 // dtype.itemsize  # columns of a vector; the 512 threads of a long row take vectors in turn
    index = torch.arange(columns)
    tops = torch.where((index < 512 * width) & (index % width == 1), 5 + noise, -9 + noise)
    rows = [noise, ties, torch.full((columns,), -3.25), small, rare, torch.linspace(-9, 9, columns), tops]
    return torch.stack([row.to(dtype) for row in rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_exact(device, dtype):
    """For k around the numbers of warps, threads and finite columns, every statistic equals that of a sort."""
    logits = _rows(dtype)
    with BACKEND.device(*DEVICES[device]):
        for k in (17, 4000) if cuda_emulated.SANITIZE else (1, 16, 17, 512, 513, 4000, COLUMNS):
            assert torch.equal(_mask(logits, TopK(k)), _exact_mask(logits, k)), k


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 127, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_rows(dtype, columns):
    logits = _rows(dtype, columns)[[0, 1, 2, 3, 5]]
    for k in {1, 2, columns // 2 + 1, columns}:
        assert torch.equal(_mask(logits, TopK(k)), _exact_mask(logits, min(k, columns))), k


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "alpha", "beta"),
    [(torch.float32, 2, 1), (torch.float64, 2, 1), (torch.bfloat16, 2, 1), (torch.float32, 1.5, 0.5),
     (torch.float16, 4, 2), (torch.float64, 3, 0)],
)  # fmt: skip
@pytest.mark.parametrize("policy", [TopK(3), EntropyTopK(), EntropyTopK(scale=0.1)], ids=str)
def test_terms_and_gradients(device, dtype, alpha, beta, policy):
    """Shared and single rows, tied maxima, and a label outside the mask."""
    case = make_case("lm_like", 3, COLUMNS, dtype, seed=1)
    logits, labels = case.logits.clone(), case.labels.clone()
    logits[1, [3, 5000]] = 3.0
    labels[1], labels[2] = 5000, int(logits[2].argmin())
    options = {"alpha": alpha, "beta": beta}
    with BACKEND.device(*DEVICES[device]):
        num_kept = caref_loss(
            logits, labels, sparsity=policy, reduction="none", return_terms=True, backend=NAME, **options
        ).num_kept
        actual = evaluate(logits, labels, ("loss", "sced"), sparsity=policy, backend=NAME, **options)
    check_evaluation(actual, oracle_given(num_kept, logits, labels, ("loss", "sced"), **options))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_a_topk_mask(device):
    """Ignored, out-of-range, NaN, infinite and empty rows in one batch leave the other rows bitwise identical."""
    logits, labels = make_case("normal_1", 7, COLUMNS, seed=2)
    labels[1:3] = torch.tensor([-100, COLUMNS + 7])
    with BACKEND.device(*DEVICES[device]):
        clean = _statistics(logits, EntropyTopK(), labels)
        logits[3, 17], logits[4, 8_990], logits[5] = math.nan, math.inf, -math.inf
        stats = _statistics(logits, EntropyTopK(), labels)
        gradient = evaluate(logits, labels, ("loss",), sparsity=EntropyTopK(), backend=NAME).gradients["loss"]
    for row in (0, 6):
        assert torch.equal(stats[row], clean[row])
        assert torch.isfinite(gradient[row]).all()
    mask = stats[:, len(objective.STATISTICS) :]
    assert torch.equal(mask[1], torch.zeros(3))
    assert torch.isnan(mask[2:6]).all()
    assert torch.count_nonzero(gradient[1:3]) == 0
    assert torch.isnan(gradient[3:6]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", [TopK(40), EntropyTopK()], ids=str)
def test_equal_rows_are_bitwise_identical(device, policy):
    """The emulated device runs the warps of even and of odd blocks in opposite orders."""
    case = make_case("lm_like", 1, COLUMNS, seed=3)
    logits, labels = case.logits.expand(4, -1), case.labels.expand(4)
    with BACKEND.device(*DEVICES[device]):
        stats = _statistics(logits, policy)
        gradient = evaluate(logits, labels, ("loss",), sparsity=policy, backend=NAME).gradients["loss"]
    assert torch.equal(stats, stats[:1].expand_as(stats))
    assert torch.equal(gradient, gradient[:1].expand_as(gradient))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_and_strided_rows(device, dtype):
    case = make_case("lm_like", 3, 2049, dtype, seed=4)
    storage = torch.empty(3 * 2051 + 8, dtype=dtype)
    misaligned = storage[3:].as_strided((3, 2049), (2051, 1)).copy_(case.logits)
    with BACKEND.device(*DEVICES[device]):
        one, other = (
            evaluate(z, case.labels, ("sced",), sparsity=EntropyTopK(), backend=NAME) for z in (case.logits, misaligned)
        )
    assert torch.equal(one.terms.sced, other.terms.sced)
    assert torch.equal(one.gradients["sced"], other.gradients["sced"])


def test_more_rows_than_a_launch_has_blocks():
    case = make_case("lm_like", 13, COLUMNS, seed=5, ignored=2)
    for shared in (200 * 1024, 34 * 1024):
        with BACKEND.device(16, shared):
            expected = evaluate(*case, sparsity=TopK(9), backend=NAME)
        with BACKEND.device(16, shared, 5):
            actual = evaluate(*case, sparsity=TopK(9), backend=NAME)
        assert torch.equal(actual.terms.sced, expected.terms.sced)
        assert torch.equal(actual.gradients["sced"], expected.gradients["sced"])


@pytest.mark.parametrize("subnormal", [1e-40, -1e-40])
def test_subnormal_numbers(subnormal):
    """A subnormal number differs from 0, and 0 and -0 are tied, in the forward and in the backward."""
    rows = [[0.0, -0.0, subnormal, -1.0, -0.0], [-0.0, 0.0, -1.0, subnormal, -3.0], [-1.0, -2.0, subnormal, -1.0, -3.0]]
    logits, labels = torch.tensor(rows), torch.tensor([1, 3, 1])
    for k in (1, 2, 3):
        stats = _statistics(logits, TopK(k))
        assert torch.equal(stats[:, len(objective.STATISTICS) :], _exact_mask(logits, k))
        actual = evaluate(logits, labels, ("loss", "sced"), sparsity=TopK(k), backend=NAME)
        check_evaluation(actual, oracle(logits, labels, ("loss", "sced"), sparsity=TopK(k)))


@pytest.mark.parametrize(("launch", "kernel"), [(1, "row_kernel"), (2, "combine_kernel"), (3, "topk_kernel")])
def test_failed_launches_raise_with_the_kernels_name(launch, kernel):
    logits = make_case("normal_1", 2, 40_000, seed=6).logits
    BACKEND.controls.cuda_emulation_fail(launch, 209)
    with pytest.raises(RuntimeError, match=f"CUDA: {kernel}: no kernel image is available for execution on the device"):
        _statistics(logits, TopK(3))
    assert torch.equal(_mask(logits, TopK(3)), _exact_mask(logits, 3))


def test_a_row_that_fits_takes_one_launch():
    """No other launch follows, and the backend does not refuse a top-k mask."""
    spec = CarefConfig(sparsity=TopK(2)).row_spec(8)
    assert backends.get(NAME).unsupported(torch.empty(1, 8), spec) is None
    assert "selection" not in (backends.get("cuda").unsupported(torch.empty(1, 8), spec) or "")
    logits = make_case("normal_1", 2, COLUMNS, seed=7).logits
    BACKEND.controls.cuda_emulation_fail(2, 209)  # a second launch would fail
    try:
        assert torch.equal(_mask(logits, TopK(3)), _exact_mask(logits, 3))
    finally:
        BACKEND.controls.cuda_emulation_fail(0, 0)


@pytest.mark.skipif(not cuda_emulated.SANITIZE, reason="guard zones are for the sanitized build")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33, 9001])
def test_nothing_around_the_rows_is_touched(dtype, columns):
    """The logits lie between guard zones; AddressSanitizer ends the process at an access to them."""
    guard, size = 1 << 16, 3 * columns * dtype.itemsize
    buffer = torch.zeros(size + 2 * guard, dtype=torch.uint8)
    case = make_case("normal_1", 3, columns, dtype, seed=8)
    logits = buffer[guard : guard + size].view(dtype).view(3, columns).copy_(case.logits)
    sanitizer = ctypes.CDLL(None)
    zones = [(buffer.data_ptr(), guard), (buffer.data_ptr() + guard + size, guard)]
    for start, length in zones:
        sanitizer.__asan_poison_memory_region(ctypes.c_void_p(start), ctypes.c_size_t(length))
    try:
        for device in DEVICES.values():
            with BACKEND.device(*device):
                for k in (1, columns):
                    assert torch.equal(_mask(logits, TopK(k)), _exact_mask(case.logits, k))
    finally:
        for start, length in zones:
            sanitizer.__asan_unpoison_memory_region(ctypes.c_void_p(start), ctypes.c_size_t(length))
