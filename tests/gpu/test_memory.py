"""Memory: the peak is the gradient or nothing, calls leave nothing behind, running out of it does no harm."""

from __future__ import annotations

import pytest
import torch

from caref_kernels import caref_loss

from .faults import notices
from .target import assert_identical, step

# Bytes that the process may allocate while it runs out of memory.
LIMIT = 2**32
# Alone in the process that runs these tests, one after the other.
pytestmark = pytest.mark.xdist_group("memory")


@pytest.mark.parametrize(
    ("inplace", "fault"), [(False, None), (True, None), (False, "ExtraCopy"), (True, "ExtraCopy"), (False, "Leaking")]
)
def test_peak_is_the_gradient_or_nothing(target, inplace):
    """Also when written in place; afterwards as much is allocated as before."""
    logits, labels = target.batch()
    logits, labels = logits.repeat(8, 1), labels.repeat(8)

    def call(view: torch.Tensor) -> None:
        loss = caref_loss(view, labels, backend=target.backend, inplace_backward=inplace)
        torch.autograd.grad(loss, view)

    for _ in range(2):  # the first call compiles
        view = logits.clone().requires_grad_().view_as(logits)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(view)
        extra = torch.cuda.max_memory_allocated() - before
        left = torch.cuda.memory_allocated() - before
    allowed = (2**16 if target.small else 2**20) + (0 if inplace else logits.nbytes)
    assert extra <= allowed, f"{extra} bytes above the logits, at most {allowed} are documented"
    assert left <= 0, f"{left} bytes stay allocated after the call"


@notices("Noisy")
def test_out_of_memory(target):
    """A gradient that does not fit raises torch's error, and the process computes as before."""
    limit = LIMIT // 2**8 if target.small else LIMIT
    free, total = torch.cuda.mem_get_info()
    if free < limit:
        pytest.skip(f"{limit} bytes of device memory are needed, {free} are free")
    logits, labels = target.batch()
    expected = step(target.correct, logits, labels)
    columns = 2**17
    rows = int(0.7 * limit / (2 * columns))  # the logits fit, the gradient does not
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        big = torch.zeros(rows, columns, dtype=torch.bfloat16, device=target.device).requires_grad_()
        loss = caref_loss(big, torch.zeros(rows, dtype=torch.long, device=target.device), backend=target.backend)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.autograd.grad(loss, big)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del big, loss
    torch.cuda.empty_cache()
    assert_identical(step(target.backend, logits, labels), expected)
