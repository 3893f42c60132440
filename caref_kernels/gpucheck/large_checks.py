"""Stages about sizes: offsets beyond 32 bits, many rows, and random calls until the time is over."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch

from .. import caref_loss
from ..testing import REGIMES, check_gradient, check_term, oracle
from .subject import Check, Subject, Unsupported, check_values
from .value_checks import EXPONENTS, FEW

_CHECKED = 30


def large(subject: Subject) -> Iterator[Check]:
    """G01 to G05."""
    stride = 2**31 + 7 if subject.scale == 1 else 2**15 + 7
    yield Check("rows 2^31 elements apart", partial(_far_rows, stride=stride), ("Offset32",))
    yield Check("statistics and incoming gradients far apart", partial(_many_rows, rows=3_000_000, columns=8))
    yield Check("65536 rows", partial(_many_rows, rows=65_536, columns=8))
    yield Check("one row", partial(_many_rows, rows=1, columns=8))
    if subject.scale == 1:
        shapes = ((65_536, 65_537, torch.float32), (40_000, 128_256, torch.bfloat16))
        for rows, columns, dtype in shapes:
            name = f"{rows} x {columns}, {dtype}"
            yield Check(name, partial(_beyond_32_bits, rows=rows, columns=columns, dtype=dtype))


def _need(subject: Subject, size: int) -> None:
    if subject.on_gpu:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < size:
            raise Unsupported(f"{size / 2**30:.0f} GiB of device memory are needed, {free / 2**30:.0f} are free")


def _far_rows(subject: Subject, stride: int) -> None:
    """Four rows of 1000 columns: the bits of the same rows packed."""
    rows, columns = 4, 1000
    _need(subject, 2 * (3 * stride + columns))
    values, labels = subject.case("lm_like", rows, columns, torch.bfloat16)
    memory = torch.empty(3 * stride + columns, dtype=torch.bfloat16, device=subject.device)
    far = memory.as_strided((rows, columns), (stride, 1))
    far.copy_(values)
    results = []
    for backend, logits in ((subject.clean, values), (subject.backend, far)):
        leaf = logits.detach().requires_grad_()
        loss = caref_loss(leaf, labels, reduction="none", backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for name, packed, apart in zip(("loss", "gradient"), *results, strict=True):
        if not torch.equal(packed, apart):
            raise AssertionError(f"the {name} of rows {stride} elements apart has other bits")


def _many_rows(subject: Subject, rows: int, columns: int) -> None:
    rows = rows if subject.scale == 1 or rows == 1 else max(2, rows // 1000)
    drawn, labels = subject.case("lm_like", min(rows, 1000), columns, torch.float32)
    repeats = -(-rows // len(drawn))
    logits, targets = drawn.repeat(repeats, 1)[:rows].requires_grad_(), labels.repeat(repeats)[:rows]
    loss = caref_loss(logits, targets, reduction="none", backend=subject.backend)
    incoming = torch.linspace(0.5, 2, rows, device=subject.device)
    gradient = torch.autograd.grad(loss, logits, incoming)[0]
    exact = oracle(drawn, labels, ("loss",))
    for first in (0, max(0, rows - len(drawn))):
        chosen = torch.arange(first, min(first + len(drawn), rows), device=subject.device)
        within = chosen % len(drawn)
        check_term("loss", loss.detach()[chosen], exact.terms.loss[within], label=f"rows from {first}")
        expected = exact.gradients["loss"][within] * incoming[chosen, None].double()
        check_gradient(gradient[chosen], expected, label=f"rows from {first}")


def _beyond_32_bits(subject: Subject, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Sampled rows against float64, the others against what their equals give: every row is one of a few."""
    _need(subject, int(2.3 * rows * columns * dtype.itemsize))
    period = 61  # prime, so that a wrong offset meets another row
    drawn, labels = subject.case("lm_like", period, columns, dtype)
    logits = torch.empty(rows, columns, dtype=dtype, device=subject.device)
    for first in range(0, rows, period):
        part = min(period, rows - first)
        logits[first : first + part] = drawn[:part]
    targets = labels.repeat(-(-rows // period))[:rows]
    leaf = logits.requires_grad_()
    loss = caref_loss(leaf, targets, reduction="none", backend=subject.backend)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    kept = loss.detach()
    if not torch.equal(kept, kept[:period].repeat(-(-rows // period))[:rows]):
        raise AssertionError("equal rows have different losses")
    chance = random.Random(0)
    edges = [0, 1, 32_766, 32_767, 32_768, rows - 1]
    chosen = sorted({*(edge for edge in edges if edge < rows), *(chance.randrange(rows) for _ in range(_CHECKED))})
    exact = oracle(drawn, labels, ("loss",))
    for row in chosen:
        within = row % period
        check_term("loss", kept[row : row + 1], exact.terms.loss[within : within + 1], label=f"row {row}")
        expected = exact.gradients["loss"][within : within + 1]
        check_gradient(gradient[row : row + 1], expected, label=f"row {row}")


def fuzz(_subject: Subject, count: int = 100_000) -> Iterator[Check]:
    """G15: random calls, each between guard zones; the name holds all that makes one again."""
    for seed in range(count):
        chance = random.Random(seed)
        columns = chance.choice((chance.randint(1, 300), chance.randint(1, 5000), 8 * chance.randint(1, 4000)))
        rows = chance.choice((1, 2, 7, FEW, 60))
        dtype = chance.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
        exponents = chance.choice(EXPONENTS)
        regime = chance.choice([name for name in REGIMES if name not in _LEFT_OUT])
        name = f"seed {seed}: {regime} {rows} x {columns} {dtype} alpha, beta = {exponents}"
        bugs = ("TailDropped", "StrayWrite") if seed == 0 else ()
        arguments = {"regime": regime, "rows": rows, "columns": columns, "dtype": dtype, "exponents": exponents}
        yield Check(name, partial(_random_call, seed=seed, **arguments), bugs)


# Their gradients are held to looser bounds in the suite, exponent by exponent.
_LEFT_OUT = ("near_uniform", "confident_1e-12")


def _random_call(subject: Subject, seed: int, regime: str, rows: int, columns: int, **how) -> dict[str, float]:
    if seed == 0:
        regime, columns = "normal_1", 33
    logits, labels = subject.case(regime, rows, columns, how["dtype"], seed=seed, ignored=min(1, rows - 1))
    alpha, beta = how["exponents"]
    return check_values(subject, logits, labels, ("loss", "sced"), alpha=alpha, beta=beta)
