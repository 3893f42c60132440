"""Tests of the Triton backend alone: the tiling on a GPU, rows that several programs share, refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import triton_interpreter
from cuda_device import device_of, missing

from caref_kernels import backends, caref_loss
from caref_kernels.backends import triton as package
from caref_kernels.backends.triton import tiling
from caref_kernels.config import RowSpec
from caref_kernels.testing import check_evaluation, check_identity, evaluate, make_case, oracle

H200 = tiling.Device(multiprocessors=132, warp_size=32)
STORAGES = {
    torch.bfloat16: tiling.Storage(2, True, True),
    torch.float16: tiling.Storage(2, True, False),
    torch.float32: tiling.Storage(4, True, False),
    torch.float64: tiling.Storage(8, True, False),
}
DEVICE = device_of("triton")
needs_kernels = pytest.mark.skipif(
    not triton_interpreter.ACTIVE and missing() is not None, reason=f"without TRITON_INTERPRET=1, and {missing()}"
)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("columns", [1, 1000, 32128, 128256, 262144, 2**24])
@pytest.mark.parametrize("rows", [1, 8, 1024, 4096, 10**6])
def test_launch_configs(rows, columns, dtype):
    """Tiles are powers of two within the limits of a launch, and there are no more splits than tiles."""
    for config in (
        tiling.forward_config(rows, columns, STORAGES[dtype], H200),
        tiling.backward_config(rows, columns, STORAGES[dtype], H200),
    ):
        tile = config.tile
        assert tile.threads == 32 * tile.warps <= 32 * tiling.MAX_WARPS
        assert tile.threads & (tile.threads - 1) == 0
        assert tile.vector * dtype.itemsize == tiling.VECTOR_BYTES
        assert tile.columns == tile.block * tile.loads == tile.threads * tile.parts * tile.width
        assert 1 <= config.splits <= max(1, -(-columns // tile.columns))


def test_few_wide_rows_use_the_whole_device():
    """8 rows of 262,144 columns use all multiprocessors, and the paper's head needs a single launch."""
    assert 8 * tiling.forward_config(8, 262144, STORAGES[torch.bfloat16], H200).splits >= 132
    assert 8 * tiling.backward_config(8, 262144, STORAGES[torch.bfloat16], H200).splits >= 132
    assert tiling.forward_config(1024, 32128, STORAGES[torch.bfloat16], H200).splits == 1
    assert tiling.forward_config(4096, 128256, STORAGES[torch.bfloat16], H200).tile.warps == 1


@pytest.mark.parametrize(
    ("shape", "stride", "aligned16"), [((4, 64), 64, True), ((4, 63), 64, True), ((4, 63), 63, False)]
)
def test_aligned_rows(shape, stride, aligned16):
    rows = torch.empty(4 * 64 + 8).as_strided(shape, (stride, 1))
    assert rows.data_ptr() % tiling.VECTOR_BYTES == 0
    assert package._storage(rows).aligned16 == aligned16
    assert not package._storage(rows[:, 1:]).aligned16
    assert not package._storage(rows, rows[:, 1:]).aligned16


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Use the lanes and loads of a GPU, and enough multiprocessors that every row is split."""
    monkeypatch.setattr(package, "_device", lambda device: H200)
    tile = tiling._tile
    # Only the rounding to bfloat16 remains that of the interpreter.
    monkeypatch.setattr(tiling, "_tile", lambda *size: tile(*size)._replace(interpreted=triton_interpreter.ACTIVE))


@needs_kernels
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("dtype", "alpha", "beta"),
    [*((dtype, 2, 1) for dtype in STORAGES), (torch.float32, 4, 2), (torch.float32, 1.5, 0.5), (torch.bfloat16, 1, 0)],
)
def test_shared_rows_triton(dtype, alpha, beta):
    """Several programs share a row; its maximum is in the first, in a middle and in the last split, or tied."""
    columns = 40_000
    assert tiling.forward_config(4, columns, STORAGES[dtype], H200).splits > 1
    case = make_case("lm_like", 4, columns, dtype, seed=1, ignored=1)
    logits = case.logits.clone()
    labels = case.labels.clone()
    first, second, third = (labels != -100).nonzero().flatten().tolist()
    # Above the noise, but not so far that the two columns have p = 1/2 each and no other column has a gradient.
    logits[first, [3, columns - 2]] = 3.0
    logits[second, columns - 1] = 14.0
    logits[third, : columns // 2] = -math.inf
    labels[third] = columns - 5
    if DEVICE == "cuda":
        logits, labels = logits.cuda(), labels.cuda()
    actual = evaluate(logits, labels, ("loss", "sced"), alpha=alpha, beta=beta, backend="triton")
    check_evaluation(actual, oracle(logits, labels, ("loss", "sced"), alpha=alpha, beta=beta))
    _, stats = torch.ops.caref_kernels.forward(logits, labels, *RowSpec(alpha, beta, columns, -100, True), "triton")
    assert stats[:, 1].tolist() == [
        0.0 if row == -100 else float(z.argmax()) for row, z in zip(labels, logits, strict=True)
    ]
    # The splits add their sums of logits.
    logits = logits.nan_to_num(neginf=-9.0)
    smoothed = caref_loss(
        logits, labels, label_smoothing=0.5, alpha=alpha, beta=beta, backend="triton", return_terms=True
    )
    valid = labels != -100
    expected = -logits[valid].double().log_softmax(-1).mean()
    check_identity(smoothed.uniform_ce, expected, "float32_terms")


@needs_kernels
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("place", "value"), [(0, math.nan), (17_000, math.inf), (39_999, math.nan)])
def test_poison_in_one_split_triton(place, value):
    """A NaN reaches, through the sums of its split, the terms and the whole gradient of its row and of no other row."""
    logits = make_case("normal_1", 2, 40_000, seed=2).logits.to(DEVICE)
    labels = torch.tensor([1, 2], device=DEVICE)
    clean = evaluate(logits, labels, ("loss",), backend="triton")
    logits[1, place] = value
    poisoned = evaluate(logits, labels, ("loss",), backend="triton")
    for name, term in poisoned.terms._asdict().items():
        assert torch.isnan(term[1])
        assert torch.equal(term[0], getattr(clean.terms, name)[0]), name
    assert torch.isnan(poisoned.gradients["loss"][1]).all()
    assert torch.equal(poisoned.gradients["loss"][0], clean.gradients["loss"][0])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unaligned_rows_are_bitwise_identical_triton(dtype):
    """Two-byte loads instead of 16-byte loads: the instructions differ, but every thread has the same columns."""
    case = make_case("lm_like", 3, 2048, dtype, seed=3)
    storage = torch.empty(3 * 2051 + 1, dtype=dtype, device=DEVICE)
    unaligned = storage[1:].as_strided((3, 2048), (2051, 1)).copy_(case.logits)
    labels = case.labels.to(DEVICE)
    one, other = (evaluate(z, labels, backend="triton") for z in (case.logits.to(DEVICE), unaligned))
    for name, term in one.terms._asdict().items():
        assert torch.equal(term, getattr(other.terms, name)), name
    for part, gradient in one.gradients.items():
        assert torch.equal(gradient, other.gradients[part]), part


@needs_kernels
def test_one_warp_on_the_widest_row_triton(monkeypatch):
    """Each thread adds 4096 columns per sum; in float32 alone, SCED of a near-uniform row would be wrong by 2e-4."""
    tile = tiling._tile
    monkeypatch.setattr(package, "_device", lambda device: H200._replace(multiprocessors=0))
    monkeypatch.setattr(tiling, "_tile", lambda *size: tile(*size)._replace(interpreted=triton_interpreter.ACTIVE))
    case = make_case("near_uniform", 1, 262_144, seed=3)
    actual = evaluate(case.logits.to(DEVICE), case.labels.to(DEVICE), ("sced",), backend="triton")
    check_evaluation(actual, oracle(case.logits.to(DEVICE), case.labels.to(DEVICE), ("sced",)))


@needs_kernels
def test_splits_agree_with_one_program_triton(monkeypatch):
    case = make_case("normal_3", 2, 40_000, torch.float64, seed=4)
    logits, labels = case.logits.to(DEVICE), case.labels.to(DEVICE)
    results = []
    for multiprocessors in (1, 132):
        device = H200._replace(multiprocessors=multiprocessors, interpreted=triton_interpreter.ACTIVE)
        monkeypatch.setattr(package, "_device", lambda _, device=device: device)
        results.append(evaluate(logits, labels, backend="triton"))
    for name, term in results[0].terms._asdict().items():
        check_identity(results[1].terms._asdict()[name], term, "float64", name)
    for part, gradient in results[0].gradients.items():
        check_identity(results[1].gradients[part], gradient, "float64", part)


@needs_kernels
def test_a_maximum_that_rises_after_a_flush_triton(monkeypatch):
    """With one warp per row there are several flushes per row; a new maximum must move the flushed sums too."""
    device = H200._replace(multiprocessors=1, interpreted=triton_interpreter.ACTIVE)
    monkeypatch.setattr(package, "_device", lambda _: device)
    case = make_case("normal_1", 16, 9000, seed=5)
    logits, labels = case.logits.to(DEVICE), case.labels.to(DEVICE)
    logits[:, 5000], logits[:, 8500] = 7.0, 8.0  # the sums are flushed after 16 tiles of 256 columns
    check_evaluation(evaluate(logits, labels, ("loss",), backend="triton"), oracle(logits, labels, ("loss",)))


def test_reason_on_the_cpu():
    """Without the interpreter the backend refuses CPU tensors and names the tensors that it takes."""
    program = """
import torch
from caref_kernels import backends, caref_loss, explain
reason = backends.get("triton").unsupported(torch.empty(1, 2))
if not ("GPU" in reason or "not installed" in reason) or reason not in explain():
    raise SystemExit(f"reason {reason!r}")
try:
    caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), backend="triton")
except NotImplementedError as error:
    raise SystemExit(0 if reason in str(error) else str(error))
raise SystemExit("it ran")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr


def test_reason_without_triton(monkeypatch):
    monkeypatch.setattr(package, "INSTALLED", False)
    assert "triton is not installed" in backends.get("triton").unsupported(torch.empty(1, 2))
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run: triton is not installed"):
        caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), backend="triton")
