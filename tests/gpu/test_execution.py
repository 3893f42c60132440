"""How kernels run: CUDA graphs, no synchronisation, streams and devices, determinism."""

from __future__ import annotations

import pytest
import torch

from caref_kernels import caref_loss

from .faults import notices
from .target import assert_identical, step

# Several milliseconds of the device's clock: longer than the host needs to queue what follows.
PAUSE_CYCLES = 20_000_000


@notices("Remembering")
def test_captured_graph_replays_on_new_logits(target):
    """20 replays of a captured forward and backward pass; in the last all rows are ignored."""
    logits, labels = target.batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(target.backend, logits, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(target.backend, logits, labels)
    for seed in range(1, 21):
        other_logits, other_labels = target.batch(seed)
        if seed == 20:
            other_labels.fill_(-100)
        logits.copy_(other_logits)
        labels.copy_(other_labels)
        graph.replay()
        assert_identical(captured, step(target.correct, other_logits, other_labels))


@pytest.mark.parametrize(
    ("reduction", "fault"), [("mean", None), ("sum", None), ("none", None), ("mean", "Waiting")], ids=str
)
def test_no_synchronisation(target, reduction):
    logits, labels = target.batch()
    options = {"reduction": reduction, "backend": target.backend}
    leaf = logits.requires_grad_()
    items = None if target.small else torch.tensor(61.0, device=target.device)  # the CPU reads and checks it
    incoming = torch.ones(len(labels), device=target.device) if reduction == "none" else None

    def both() -> None:
        loss = caref_loss(leaf, labels, **options)
        torch.autograd.grad(loss, leaf, incoming)
        if reduction == "mean":
            caref_loss(leaf, labels, num_items=items, **options)

    both()  # the first call may compile, and then synchronises
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise AssertionError(f"a pass synchronises: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


@notices("DefaultStream")
def test_current_stream(target):
    """The logits are copied behind a pause on another stream, 50 times: a kernel elsewhere would read zeros."""
    values, labels = target.batch()
    expected = step(target.correct, values, labels)
    logits, stream = torch.zeros_like(values), torch.cuda.Stream()
    for _ in range(50):
        logits.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(PAUSE_CYCLES)
            logits.copy_(values)
            actual = step(target.backend, logits, labels)
        stream.synchronize()
        torch.cuda.synchronize()
        assert_identical(actual, expected)


@notices("SharedStatistics")
def test_two_streams(target):
    """Two forward passes on streams of their own, then both backward passes: the calls share no memory."""
    cases = [target.batch(seed) for seed in (1, 2)]
    expected = [step(target.correct, *case)[-1] for case in cases]
    leaves = [logits.requires_grad_() for logits, _ in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    gradients = []
    for _ in range(20):
        losses = []
        for leaf, (_, labels), stream in zip(leaves, cases, streams, strict=True):
            with torch.cuda.stream(stream):
                losses.append(caref_loss(leaf, labels, backend=target.backend))
        gradients.append([torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)])
    torch.cuda.synchronize()
    for both in gradients:
        assert all(torch.equal(one, other) for one, other in zip(both, expected, strict=True))


@notices("Noisy")
def test_second_device(target):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    logits, labels = target.batch()
    expected = step(target.correct, logits, labels)
    with torch.cuda.device(0):
        actual = step(target.backend, logits.to("cuda:1"), labels.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert_identical(tuple(one.to(logits.device) for one in actual), expected)


@pytest.mark.parametrize(
    ("dtype", "fault"), [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, "Noisy")], ids=str
)
def test_bitwise_identical_50_times(target, dtype):
    logits, labels = target.batch(dtype=dtype)
    for rows in (3, len(logits)):
        first = step(target.backend, logits[:rows], labels[:rows])
        for _ in range(49):
            assert_identical(step(target.backend, logits[:rows], labels[:rows]), first)


@pytest.mark.parametrize(
    ("dtype", "fault"), [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, "Unwritten")], ids=str
)
def test_bitwise_identical_on_memory_filled_with_nan(target, dtype):
    """Under deterministic algorithms torch fills fresh memory with NaN."""
    logits, labels = target.batch(dtype=dtype)
    expected = step(target.correct, logits, labels)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device=target.device).isnan().all()
        assert_identical(step(target.backend, logits, labels), expected)
    finally:
        torch.use_deterministic_algorithms(False)
