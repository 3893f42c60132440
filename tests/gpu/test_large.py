"""Sizes: offsets beyond 32 bits, and as many rows as a launch must divide."""

from __future__ import annotations

import random

import pytest
import torch

from caref_kernels import caref_loss
from caref_kernels.testing import check_gradient, check_term, oracle

from . import faults
from .faults import notices

# One after the other in one process: together they would not fit.
pytestmark = pytest.mark.xdist_group("memory")


@pytest.fixture(autouse=True)
def _small_offsets(target, monkeypatch):
    """The small shapes stand for the large ones: their offsets exceed 16 bits."""
    if target.small:
        monkeypatch.setattr(faults.Offset32, "bits", 16)


def _need(target, size: int) -> None:
    if not target.small:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < size:
            pytest.skip(f"{size / 2**30:.0f} GiB of device memory are needed, {free / 2**30:.0f} are free")


@notices("Offset32")
def test_rows_far_apart(target):
    """Rows 2^31 elements apart, bitwise identical to the same rows packed."""
    rows, columns, stride = 4, 1000, (2**15 if target.small else 2**31) + 7
    _need(target, 2 * (3 * stride + columns))
    values, labels = target.case("lm_like", rows, columns, torch.bfloat16)
    memory = torch.zeros(3 * stride + columns, dtype=torch.bfloat16, device=target.device)
    far = memory.as_strided((rows, columns), (stride, 1))
    far.copy_(values)
    results = []
    for backend, logits in ((target.correct, values), (target.backend, far)):
        leaf = logits.detach().requires_grad_()
        loss = caref_loss(leaf, labels, reduction="none", backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for packed, apart in zip(*results, strict=True):
        assert torch.equal(packed, apart)


@pytest.mark.parametrize(
    ("rows", "fault"), [(3_000_000, None), (65_536, None), (1, None), (65_536, "IncomingIgnored")], ids=str
)
def test_many_rows(target, rows):
    """Statistics and incoming gradients far apart, more rows than a grid dimension holds, and one row."""
    if target.small:
        rows = -(-rows // 1000)
    drawn, labels = target.case("lm_like", min(rows, 1000), 8, torch.float32)
    repeats = -(-rows // len(drawn))
    logits, targets = drawn.repeat(repeats, 1)[:rows].requires_grad_(), labels.repeat(repeats)[:rows]
    loss = caref_loss(logits, targets, reduction="none", backend=target.backend)
    incoming = torch.linspace(0.5, 2, rows, device=target.device)
    gradient = torch.autograd.grad(loss, logits, incoming)[0]
    exact = oracle(drawn, labels, ("loss",))
    for first in (0, max(0, rows - len(drawn))):
        chosen = torch.arange(first, min(first + len(drawn), rows), device=target.device)
        within = chosen % len(drawn)
        check_term("loss", loss.detach()[chosen], exact.terms.loss[within], label=f"rows from {first}")
        expected = exact.gradients["loss"][within] * incoming[chosen, None].double()
        check_gradient(gradient[chosen], expected, label=f"rows from {first}")


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "fault"),
    [
        (65_536, 65_537, torch.float32, None),
        (40_000, 128_256, torch.bfloat16, None),
        (40_000, 128_256, torch.bfloat16, "Offset32"),
    ],
    ids=str,
)
def test_more_than_2_32_elements(target, rows, columns, dtype, fault):
    """61 different rows again and again: all equal rows have equal losses, and samples are compared with float64."""
    if target.small:
        rows, columns = rows // 400, columns // 100
    _need(target, int((3.4 if fault else 2.3) * rows * columns * dtype.itemsize))
    period = 61  # prime, so that a wrong offset meets another row
    drawn, labels = target.case("lm_like", period, columns, dtype)
    logits = torch.empty(rows, columns, dtype=dtype, device=target.device)
    for first in range(0, rows, period):
        part = min(period, rows - first)
        logits[first : first + part] = drawn[:part]
    targets = labels.repeat(-(-rows // period))[:rows]
    leaf = logits.requires_grad_()
    loss = caref_loss(leaf, targets, reduction="none", backend=target.backend)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    kept = loss.detach()
    assert torch.equal(kept, kept[:period].repeat(-(-rows // period))[:rows])
    exact = oracle(drawn, labels, ("loss",))
    edges = [0, 1, 32_766, 32_767, 32_768, rows - 1]
    for row in sorted({*(edge for edge in edges if edge < rows), *random.Random(0).sample(range(rows), 30)}):
        within = row % period
        check_term("loss", kept[row : row + 1], exact.terms.loss[within : within + 1], label=f"row {row}")
        check_gradient(gradient[row : row + 1], exact.gradients["loss"][within : within + 1], label=f"row {row}")
