"""Stages about how kernels run: graphs, waiting, streams, determinism, compilation, schemas, memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import caref_loss, ops
from .subject import Check, Subject, Unsupported, operator_spec

ROWS, COLUMNS = 64, 32_128
# Of the device's clock, several milliseconds: longer than the host needs to queue what follows.
PAUSE_CYCLES = 20_000_000
# Bytes that the process may allocate while it runs out of memory.
_LIMIT = 2**32


def _case(subject: Subject, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    columns = COLUMNS if subject.scale == 1 else 1000
    return subject.case("lm_like", ROWS, columns, dtype, seed=seed, ignored=3)


def _step(backend: str, logits: Tensor, labels: Tensor, **options) -> tuple[Tensor, ...]:
    """Loss, terms and gradient."""
    leaf = logits.detach().requires_grad_()
    out = caref_loss(leaf, labels, backend=backend, return_terms=True, **options)
    return (*(term.detach() for term in out[:5]), torch.autograd.grad(out.loss, leaf)[0])


def _same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    names = ("loss", "ce", "sced", "kl", "entropy", "gradient")
    for name, one, other in zip(names, actual, expected, strict=True):
        same_nans = torch.equal(one.isnan(), other.isnan())
        if not same_nans or not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise AssertionError(f"{what}: {name} differs")


# ------------------------------------------------------------------------------------------------------------ graphs


def graphs(_subject: Subject) -> Iterator[Check]:
    """G06: a captured forward and backward pass, replayed on new logits and labels."""
    yield Check("20 replays", _replays, ("Remembering",))


def _replays(subject: Subject) -> None:
    logits, labels = _case(subject)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(subject.backend, logits, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(subject.backend, logits, labels)
    for seed in range(1, 21):
        other_logits, other_labels = _case(subject, seed)
        if seed == 20:
            other_labels.fill_(-100)
        logits.copy_(other_logits)
        labels.copy_(other_labels)
        graph.replay()
        _same(captured, _step(subject.clean, other_logits, other_labels), f"replay {seed}")


# ----------------------------------------------------------------------------------------------------------- waiting


def sync(_subject: Subject) -> Iterator[Check]:
    """G07: neither pass waits for the device."""
    for reduction in ("mean", "sum", "none"):
        bugs = ("Waiting",) if reduction == "mean" else ()
        yield Check(f"reduction {reduction}", partial(_without_waiting, reduction=reduction), bugs)


def _without_waiting(subject: Subject, reduction: str) -> None:
    logits, labels = _case(subject)
    options = {"reduction": reduction, "backend": subject.backend}
    leaf = logits.requires_grad_()
    items = torch.tensor(61.0, device=subject.device) if reduction == "mean" else None
    incoming = torch.ones(ROWS, device=subject.device) if reduction == "none" else None

    def both() -> None:
        loss = caref_loss(leaf, labels, **options)
        torch.autograd.grad(loss, leaf, incoming)
        if items is not None:
            caref_loss(leaf, labels, num_items=items, **options)

    both()  # what is compiled or read once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise AssertionError(f"it waits: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------------------------------- streams


def streams(_subject: Subject) -> Iterator[Check]:
    """G08, G09: the current stream and the tensors' device, not the default ones."""
    yield Check("behind a pause, 50 times", _behind_a_pause, ("DefaultStream",))
    yield Check("two streams at once", _two_streams)
    if torch.cuda.device_count() > 1:
        yield Check("second device", _second_device)


def _behind_a_pause(subject: Subject) -> None:
    values, labels = _case(subject)
    expected = _step(subject.clean, values, labels)
    logits, stream = torch.zeros_like(values), torch.cuda.Stream()
    for _ in range(50):
        logits.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(PAUSE_CYCLES)
            logits.copy_(values)
            actual = _step(subject.backend, logits, labels)
        stream.synchronize()
        torch.cuda.synchronize()
        _same(actual, expected, "behind a pause")


def _two_streams(subject: Subject) -> None:
    cases = [_case(subject, seed) for seed in (1, 2)]
    expected = [_step(subject.clean, *case) for case in cases]
    side = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(side):
            with torch.cuda.stream(stream):
                results[index].append(_step(subject.backend, *cases[index]))
    torch.cuda.synchronize()
    for index, found in enumerate(results):
        for one in found:
            _same(one, expected[index], f"stream {index}")


def _second_device(subject: Subject) -> None:
    logits, labels = _case(subject)
    expected = _step(subject.clean, logits, labels)
    with torch.cuda.device(0):
        actual = _step(subject.backend, logits.to("cuda:1"), labels.to("cuda:1"))
        if torch.cuda.current_device() != 0:
            raise AssertionError(f"the current device is now {torch.cuda.current_device()}")
    _same(tuple(one.to(logits.device) for one in actual), expected, "second device")


# ------------------------------------------------------------------------------------------------------- determinism


def determinism(subject: Subject) -> Iterator[Check]:
    """G11: the same bits 50 times, also while torch fills fresh memory with NaN."""
    dtypes = (torch.bfloat16, torch.float32) if subject.scale == 1 else (torch.float32,)
    for dtype in dtypes:
        bugs = ("Noisy",) if dtype == dtypes[0] else ()
        yield Check(f"50 times, {dtype}", partial(_repeated, dtype=dtype), bugs)
        yield Check(f"deterministic algorithms, {dtype}", partial(_filled_memory, dtype=dtype))


def _repeated(subject: Subject, dtype: torch.dtype) -> None:
    logits, labels = _case(subject, dtype=dtype)
    for rows in (3, ROWS):
        first = _step(subject.backend, logits[:rows], labels[:rows])
        for count in range(49):
            _same(_step(subject.backend, logits[:rows], labels[:rows]), first, f"{rows} rows, repetition {count + 2}")


def _filled_memory(subject: Subject, dtype: torch.dtype) -> None:
    logits, labels = _case(subject, dtype=dtype)
    first = _step(subject.backend, logits, labels)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        _same(_step(subject.backend, logits, labels), first, "deterministic algorithms")
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------ compiler and schemas


def compiled(subject: Subject) -> Iterator[Check]:
    """C02 to C05: one graph, the bits of eager mode, other shapes without an error."""
    for dtype in (torch.bfloat16, torch.float32) if subject.scale == 1 else (torch.float32,):
        yield Check(f"torch.compile, {dtype}", partial(_as_eager, dtype=dtype))


def _as_eager(subject: Subject, dtype: torch.dtype) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return caref_loss(logits * 1.5, labels, reduction="sum", backend=subject.backend)

    whole = torch.compile(loss, fullgraph=True)
    for rows, columns in ((8, 1000), (8, 1000), (24, 4097)):
        logits, labels = subject.case("lm_like", rows, columns, dtype)
        eager_leaf, leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        expected, actual = loss(eager_leaf, labels), whole(leaf, labels)
        if not torch.equal(actual, expected):
            raise AssertionError(f"{rows} x {columns}: {float(actual)!r} compiled, {float(expected)!r} eager")
        expected.backward()
        actual.backward()
        if not torch.equal(leaf.grad, eager_leaf.grad):
            raise AssertionError(f"{rows} x {columns}: the compiled gradient has other bits")


def opcheck(_subject: Subject) -> Iterator[Check]:
    """C01: schemas, fakes and dispatch of every operator on this device."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield Check(f"{dtype}", partial(_operators, dtype=dtype))


def _operators(subject: Subject, dtype: torch.dtype) -> None:
    logits, labels = subject.case("lm_like", 6, 33, dtype)
    spec = (*operator_spec(33), subject.backend)
    terms, stats = ops.forward(logits, labels, *spec)
    torch.library.opcheck(ops.forward, (logits, labels, *spec))
    torch.library.opcheck(ops.backward, (terms + 1, logits, labels, stats, *spec))
    torch.library.opcheck(ops.backward_, (terms + 1, logits.clone(), labels, stats, *spec))


# ------------------------------------------------------------------------------------------------------------ memory


def memory(_subject: Subject) -> Iterator[Check]:
    """G12, G13: the gradient or nothing, back to the level before; an allocation that fails leaves a usable process."""
    yield Check("the gradient alone", partial(_peak, inplace=False), ("ExtraCopy",))
    yield Check("nothing in place", partial(_peak, inplace=True))
    yield Check("out of memory", _out_of_memory)


def _peak(subject: Subject, inplace: bool) -> None:
    logits, labels = _case(subject)
    logits, labels = logits.repeat(8, 1), labels.repeat(8)
    extra = 0
    for _ in range(2):  # the first call compiles
        view = logits.clone().requires_grad_().view_as(logits)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = caref_loss(view, labels, backend=subject.backend, inplace_backward=inplace)
        gradient = torch.autograd.grad(loss, view)[0]
        extra = torch.cuda.max_memory_allocated() - before
        del gradient, loss
        after = torch.cuda.memory_allocated()
    allowed = 2**20 + (0 if inplace else logits.nbytes)
    if extra > allowed:
        raise AssertionError(f"{extra} bytes above the logits, at most {allowed} are documented")
    if after > before:
        raise AssertionError(f"{after - before} bytes stay allocated after the call")


def _out_of_memory(subject: Subject) -> None:
    free, total = torch.cuda.mem_get_info()
    if free < _LIMIT:
        raise Unsupported(f"other processes hold the memory of the device; {free} bytes are free")
    logits, labels = _case(subject)
    expected = _step(subject.clean, logits, labels)
    torch.cuda.set_per_process_memory_fraction(min(1.0, _LIMIT / total))
    columns = 2**17
    rows = int(0.7 * _LIMIT / (2 * columns))  # the logits fit, the gradient does not
    big = torch.zeros(rows, columns, dtype=torch.bfloat16, device=subject.device).requires_grad_()
    loss = caref_loss(big, torch.zeros(rows, dtype=torch.long, device=subject.device), backend=subject.backend)
    try:
        torch.autograd.grad(loss, big)
    except torch.cuda.OutOfMemoryError:
        pass
    else:
        raise AssertionError(f"a gradient of {big.nbytes} bytes was made where {_LIMIT} are allowed in all")
    del big, loss
    torch.cuda.empty_cache()
    _same(_step(subject.backend, logits, labels), expected, "after running out of memory")
