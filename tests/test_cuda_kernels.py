"""Tests of the CUDA backend alone: refusals, rows that several blocks share, launch errors; on the emulated device.

The conformance suite runs on the emulated device too, as the backend "cuda-emulated", and on a CUDA device as "cuda".
"""

from __future__ import annotations

import ctypes
import math
import types

import cuda_emulated
import pytest
import torch
from cuda_emulated import BACKEND, NAME

from caref_kernels import backends, caref_loss
from caref_kernels.backends import devices
from caref_kernels.backends.cuda import CudaBackend, missing_image
from caref_kernels.config import RowSpec
from caref_kernels.testing import check_evaluation, check_identity, evaluate, make_case, oracle

needs_compiler = pytest.mark.skipif(cuda_emulated.compiler() is None, reason="no C++ compiler")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class WithModule(CudaBackend):
    """A backend whose module was built for these architectures."""

    def __init__(self, architectures: str | None) -> None:
        self.module = None if architectures is None else types.SimpleNamespace(CUDA_ARCHITECTURES=architectures)


@pytest.mark.parametrize(
    ("architectures", "reason"),
    [("", "built without nvcc"), ("80 90", "no CUDA device"), (None, None)],
)
def test_reasons(architectures, reason, monkeypatch):
    from caref_kernels.backends import cuda

    monkeypatch.setattr(devices, "has_device", lambda: False)
    monkeypatch.setattr(cuda, "MISSING", "the compiled module is missing")
    found = WithModule(architectures).unsupported(torch.empty(1, 2))
    assert found.startswith(reason or "the compiled module is missing")


def test_reason_where_there_is_a_device(monkeypatch):
    monkeypatch.setattr(devices, "has_device", lambda: True)
    assert WithModule("80").unsupported(torch.empty(1, 2)) == "logits are on cpu, this backend takes CUDA tensors"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80 90", (8, 0), True),
        ("80 90", (8, 9), True),
        ("86", (8, 0), False),
        ("80 90", (10, 0), False),
        ("80 90+PTX", (10, 0), True),
        ("80 90 100 120+PTX", (7, 5), False),
        ("80 90 100 120+PTX", (12, 1), True),
        ("80 90 100 120+PTX", (13, 0), True),
        ("80 90 100 120", (13, 0), False),
        ("90a", (9, 0), True),
        ("90a+PTX", (10, 0), False),
        ("100f", (10, 3), False),
        ("120+PTX", (9, 0), False),
    ],
)
def test_images(built, capability, runs):
    reason = missing_image(built, capability)
    if runs:
        assert reason is None
    else:
        number = f"{capability[0]}{capability[1]}"
        assert reason == f"no image for sm_{number} (built for sm_{built.replace(' ', ', sm_')})"


def test_order_and_refusal():
    assert backends.ORDER == ("triton", "cuda", "cpu", "reference")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(
        NotImplementedError, match=r"backend 'cuda' cannot run: (built without nvcc|no CUDA device|the comp)"
    ):
        caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), backend="cuda")


# Devices on which a row belongs to one block, to several, and to more than the 32 lanes that combine them.
DEVICES = {"one block": (1, 2000 * 1024), "several blocks": (16, 100 * 1024), "many blocks": (1, 20 * 1024)}


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "alpha", "beta"),
    [*((dtype, 2, 1) for dtype in DTYPES), (torch.float32, 4, 2), (torch.float32, 1.5, 0.5), (torch.bfloat16, 1, 0),
     (torch.float64, 4, 0)],
)  # fmt: skip
def test_shared_rows(device, dtype, alpha, beta):
    """The maximum of a row is in its first, in a middle and in its last block, or tied."""
    columns = 40_001
    case = make_case("lm_like", 4, columns, dtype, seed=1, ignored=1)
    logits, labels = case.logits.clone(), case.labels.clone()
    first, second, third = (labels != -100).nonzero().flatten().tolist()
    # Above the noise, but not so far that the two columns have p = 1/2 each and no other column has a gradient.
    logits[first, [3, columns - 2]] = 3.0
    logits[second, columns - 1] = 14.0
    logits[third, : columns // 2] = -math.inf
    labels[third] = columns - 5
    with BACKEND.device(*DEVICES[device]):
        actual = evaluate(logits, labels, ("loss", "sced"), alpha=alpha, beta=beta, backend=NAME)
        _, stats = torch.ops.caref_kernels.forward(
            logits, labels, alpha, beta, columns, -100, True, 0.0, 0, 0, False, 0, NAME
        )
    check_evaluation(actual, oracle(logits, labels, ("loss", "sced"), alpha=alpha, beta=beta))
    assert stats[:, 1].tolist() == [
        0.0 if row == -100 else float(z.argmax()) for row, z in zip(labels, logits, strict=True)
    ]


@needs_compiler
def test_devices_agree():
    case = make_case("normal_3", 2, 40_000, torch.float64, seed=4)
    results = []
    for device in DEVICES.values():
        with BACKEND.device(*device):
            results.append(evaluate(*case, backend=NAME))
    for other in results[1:]:
        for name, term in results[0].terms._asdict().items():
            check_identity(other.terms._asdict()[name], term, "float64", name)
        for part, gradient in results[0].gradients.items():
            check_identity(other.gradients[part], gradient, "float64", part)


@needs_compiler
@pytest.mark.parametrize("place", [0, 17_000, 39_999])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_poison_in_one_block(place, value):
    """A NaN reaches, through the sums of its block, the terms and the whole gradient of its row and of no other row."""
    logits, labels = make_case("normal_1", 2, 40_000, seed=2).logits, torch.tensor([1, 2])
    clean = evaluate(logits, labels, ("loss",), backend=NAME)
    logits[1, place] = value
    poisoned = evaluate(logits, labels, ("loss",), backend=NAME)
    for name, term in poisoned.terms._asdict().items():
        assert torch.isnan(term[1])
        assert torch.equal(term[0], getattr(clean.terms, name)[0]), name
    assert torch.isnan(poisoned.gradients["loss"][1]).all()
    assert torch.equal(poisoned.gradients["loss"][0], clean.gradients["loss"][0])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_misaligned_rows_are_bitwise_identical(dtype, offset):
    """Rows that start at any element use other loads, but every thread has the same columns."""
    case = make_case("lm_like", 3, 2049, dtype, seed=3)
    storage = torch.empty(3 * 2051 + 8, dtype=dtype)
    misaligned = storage[offset:].as_strided((3, 2049), (2051, 1)).copy_(case.logits)
    one, other = (evaluate(z, case.labels, backend=NAME) for z in (case.logits, misaligned))
    for name, term in one.terms._asdict().items():
        assert torch.equal(term, getattr(other.terms, name)), name
    for part, gradient in one.gradients.items():
        assert torch.equal(gradient, other.gradients[part]), part


@needs_compiler
def test_more_rows_than_a_launch_has_blocks():
    case = make_case("lm_like", 13, 9000, seed=5, ignored=2)
    for options in ({}, {"alpha": 1.5, "beta": 0.5}):
        expected = evaluate(*case, backend=NAME, **options)
        with BACKEND.device(most_blocks=17):
            actual = evaluate(*case, backend=NAME, **options)
        for name, term in expected.terms._asdict().items():
            assert torch.equal(term, getattr(actual.terms, name)), name
        for part, gradient in expected.gradients.items():
            assert torch.equal(gradient, actual.gradients[part]), part


@needs_compiler
@pytest.mark.parametrize(
    ("launch", "kernel"),
    [(1, "row_kernel"), (2, "combine_kernel"), (3, "second_kernel"), (4, "combine_sced_kernel")],
)
def test_failed_launches_raise_with_the_kernels_name(launch, kernel):
    """The error names the kernel, and the next call succeeds."""
    logits, labels = make_case("normal_1", 2, 40_000, seed=6)
    spec = (1.5, 0.5, 40_000, -100, True, 0.0, 0, 0, False, 0, NAME)
    BACKEND.controls.cuda_emulation_fail(launch, 209)
    with pytest.raises(RuntimeError, match=f"CUDA: {kernel}: no kernel image is available for execution on the device"):
        torch.ops.caref_kernels.forward(logits, labels, *spec)
    terms, stats = torch.ops.caref_kernels.forward(logits, labels, *spec)
    assert torch.isfinite(terms).all()
    BACKEND.controls.cuda_emulation_fail(1, 209)
    with pytest.raises(RuntimeError, match="CUDA: gradient_kernel: no kernel image"):
        torch.ops.caref_kernels.backward(torch.ones(2, 3), logits, labels, stats, *spec)


@needs_compiler
def test_more_than_48_kilobytes_of_shared_memory_are_requested():
    """A row of 40,000 float32 columns takes 160 kB; without the request the launch is refused, as on a GPU."""
    case = make_case("normal_1", 1, 40_000, seed=6)
    with BACKEND.device(1, 700 * 1024):
        check_evaluation(evaluate(*case, ("loss",), backend=NAME), oracle(*case, ("loss",)))


@needs_compiler
@pytest.mark.skipif(not cuda_emulated.SANITIZE, reason="guard zones are for the sanitized build")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "label"), [(1, 0), (33, 5), (1000, 1_000_000), (9001, -7)])
def test_nothing_around_the_tensors_is_touched(dtype, columns, label):
    """Every tensor of a call lies between guard zones; AddressSanitizer ends the process at an access to them."""
    guard = 1 << 16
    zones = []

    def guarded(tensor):
        size = tensor.numel() * tensor.element_size()
        buffer = torch.zeros(size + 2 * guard, dtype=torch.uint8)
        inside = buffer[guard : guard + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        # The zone behind starts exactly where the tensor ends, which the sanitizer allows at any byte.
        for start, length in ((buffer.data_ptr(), guard), (buffer.data_ptr() + guard + size, guard)):
            sanitizer.__asan_poison_memory_region(ctypes.c_void_p(start), ctypes.c_size_t(length))
            zones.append((start, length, buffer))
        return inside

    sanitizer = ctypes.CDLL(None)
    case = make_case("normal_1", 3, columns, dtype, seed=7)
    labels = torch.tensor([0, label, columns - 1])
    spec = RowSpec(2.0, 1.0, columns, -100, True)
    try:
        logits, targets = guarded(case.logits), guarded(labels)
        terms, stats = BACKEND.forward(logits, targets, spec)
        gradient = guarded(torch.zeros_like(logits))
        BACKEND.gradient(guarded(torch.ones_like(terms)), logits, targets, guarded(stats), spec, gradient)
        inside = 0 <= label < columns
        assert torch.isfinite(terms[[0, 2]]).all()
        assert torch.isfinite(terms[1]).all() == inside
    finally:
        for start, length, _ in zones:
            sanitizer.__asan_unpoison_memory_region(ctypes.c_void_p(start), ctypes.c_size_t(length))
