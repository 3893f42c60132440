"""Stages about values: every row of every result against float64, between guard zones, on poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import EntropyTopK, TopK, backends, ops
from ..config import CarefConfig
from ..testing import REGIMES, check_gradient, check_identity, check_term, evaluate, oracle
from .fence import Fence
from .subject import Check, Subject, Unsupported, check_values, fenced_evaluation, operator_spec

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
DEFAULT = (2.0, 1.0)
# Every one-pass path, and of the two-pass ones a whole and a real exponent.
EXPONENTS = (DEFAULT, (2.0, 0.0), (2.0, 2.0), (4.0, 0.0), (4.0, 1.0), (4.0, 2.0), (1.0, 1.0), (1.5, 0.5))
# Below a tile, below a warp's tile and odd, not a multiple of a load, T5, Llama-3, Gemma.
VOCABULARIES = (7, 33, 1000, 4097, 32_128, 128_256, 262_144)
# Few rows, which several programs share; enough for several warps of one; enough for one warp each.
FEW, SOME, MANY = 24, 300, 4096
_DRAWN = 64
_IGNORED = 2


class Call(NamedTuple):
    """One call of the loss."""

    regime: str
    rows: int
    columns: int
    dtype: torch.dtype
    exponents: tuple[float, float] = DEFAULT

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.regime} {self.rows} x {self.columns} {dtype} alpha={self.exponents[0]:g} beta={self.exponents[1]:g}"
        )

    def tensors(self, subject: Subject) -> tuple[Tensor, Tensor]:
        """Logits and labels on the device; beyond 64 the drawn rows are repeated."""
        drawn = min(self.rows, _DRAWN)
        logits, labels = subject.case(self.regime, drawn, self.columns, self.dtype, ignored=_IGNORED)
        repeats = -(-self.rows // drawn)
        return logits.repeat(repeats, 1)[: self.rows], labels.repeat(repeats)[: self.rows]

    def options(self) -> dict[str, float]:
        """What the call passes besides its tensors."""
        return {"alpha": self.exponents[0], "beta": self.exponents[1]}


def calls(subject: Subject) -> Iterator[Call]:
    """Every kernel of every dtype, in the order of their value; the warm-up runs the same list."""
    full = subject.scale == 1 and subject.on_gpu
    for dtype in DTYPES:
        for columns in (33, 1000, 32_128, 128_256) if full else (33, 1000):
            yield Call("lm_like", FEW, columns, dtype)
        if full:
            yield Call("lm_like", SOME, 4097, dtype)
            yield Call("lm_like", MANY, 1000 if dtype == torch.float64 else 32_128, dtype)
    for dtype in DTYPES[: 2 if full else 1]:
        for exponents in EXPONENTS[1:]:
            yield Call("lm_like", FEW, 4097, dtype, exponents)
            if full:
                yield Call("lm_like", MANY, 1000, dtype, exponents)
    for regime in REGIMES:
        yield Call(regime, FEW, 32_128 if full else 1000, torch.float32)
    if full:
        yield from (Call(regime, FEW, 262_144, torch.bfloat16) for regime in ("lm_like", "near_uniform", "tied_maxima"))
        yield from (Call("normal_3", FEW, columns, torch.bfloat16) for columns in VOCABULARIES)


def smoke(_subject: Subject) -> Iterator[Check]:
    """Two small calls, with every control of the values and of the fence."""
    bugs = ("TailDropped", "StrayWrite", "Unwritten", "InputChanged", "AuxiliaryDropped")
    yield Check("33 columns, float32", partial(_value, call=Call("normal_1", 3, 33, torch.float32)), bugs)
    yield Check("1025 columns, bfloat16", partial(_value, call=Call("lm_like", 5, 1025, torch.bfloat16)))


def accuracy(subject: Subject) -> Iterator[Check]:
    """Terms and gradients of :func:`calls`, each part on its own."""
    control = Call("normal_1", 3, 33, torch.float32)
    yield Check(str(control), partial(_value, call=control), ("TailDropped", "AuxiliaryDropped", "IncomingIgnored"))
    for call in calls(subject):
        yield Check(str(call), partial(_value, call=call))


def _value(subject: Subject, call: Call) -> dict[str, float]:
    logits, labels = call.tensors(subject)
    # Every further part is a backward pass of four evaluations.
    parts = ("loss", "ce", "sced", "kl") if call.rows <= FEW else ("loss", "sced")
    errors = check_values(subject, logits, labels, parts, **call.options())
    if call.rows <= FEW:
        _incoming(subject, logits, labels, call)
    dtype = str(call.dtype).removeprefix("torch.")
    return {f"{name} {dtype}": error for name, error in errors.items()}


def _incoming(subject: Subject, logits: Tensor, labels: Tensor, call: Call) -> None:
    """A gradient comes in that differs from row to row and from term to term."""
    spec = operator_spec(call.columns, **call.options())
    grad_terms = torch.randn(call.rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad_terms = grad_terms.to(logits.device)
    fence = Fence()
    z, y = fence.constant(logits), fence.constant(labels)
    with fence.watch():
        terms, stats = ops.forward(z, y, *spec, subject.backend)
        gradient = ops.backward(grad_terms.to(terms.dtype), z, y, stats, *spec, subject.backend)
        subject.wait()
    wide = logits.double()
    _, exact_stats = ops.forward(wide, labels, *spec, "reference")
    exact = ops.backward(grad_terms.to(terms.dtype).double(), wide, labels, exact_stats, *spec, "reference")
    check_gradient(gradient, exact, label="incoming gradients")


# --------------------------------------------------------------------------------------------------- special values

_INF, _NAN = float("inf"), float("nan")


def special(_subject: Subject) -> Iterator[Check]:
    """Rows with NaN and infinities poison themselves alone; shifts, ties, one-hot and equal logits."""
    yield Check("NaN and infinities", _poisoned_rows, ("NanSwallowed",))
    yield Check("-inf columns", _masked_columns)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Check(f"equal logits, {dtype}", partial(_written_rows, dtype=dtype, kind="equal"))
        yield Check(f"one-hot, {dtype}", partial(_written_rows, dtype=dtype, kind="one-hot"))
    yield Check("one column", _one_column)
    yield Check("shift by 100", _shifted)
    yield Check("no rows", _no_rows)


def _poisoned_rows(subject: Subject) -> None:
    for columns in (33, 5000):
        logits, labels = subject.case("normal_1", 7, columns, torch.float32)
        logits[1, 5], logits[2, columns - 1], logits[3, 0] = _NAN, _NAN, _INF
        logits[4], logits[5, 7:9] = -_INF, _INF
        found = fenced_evaluation(subject, logits, labels, ("loss",))
        sick = torch.tensor([1, 2, 3, 4, 5], device=logits.device)
        well = torch.tensor([0, 6], device=logits.device)
        if not bool(found.terms.loss[sick].isnan().all()):
            raise AssertionError(f"{columns} columns: a row without a softmax has the loss {found.terms.loss[sick]}")
        if not bool(found.gradients["loss"][sick].isnan().all()):
            raise AssertionError(f"{columns} columns: a row without a softmax has a gradient")
        exact = oracle(logits[well], labels[well], ("loss",))
        check_term("loss", found.terms.loss[well], exact.terms.loss, label=f"{columns} columns, rows beside")
        check_gradient(found.gradients["loss"][well], exact.gradients["loss"], label="rows beside")


def _masked_columns(subject: Subject) -> None:
    logits, labels = subject.case("normal_1", 6, 3000, torch.float32)
    logits[:, 100:2900] = -_INF
    labels = labels.clamp(0, 50)
    actual, exact = fenced_evaluation(subject, logits, labels), oracle(logits, labels)
    for part, gradient in actual.gradients.items():
        check_gradient(gradient, exact.gradients[part], label=part)
    for name in actual.terms._fields:
        check_term(name, getattr(actual.terms, name), getattr(exact.terms, name))


def _written_rows(subject: Subject, dtype: torch.dtype, kind: str) -> None:
    columns = 1000
    logits = torch.zeros(4, columns, dtype=dtype, device=subject.device)
    labels = torch.tensor([0, 999, 5, 500], device=subject.device)
    if kind == "one-hot":
        logits -= 30
        logits[torch.arange(4), labels] = 30
    actual, exact = fenced_evaluation(subject, logits, labels), oracle(logits, labels)
    for name in actual.terms._fields:
        check_term(name, getattr(actual.terms, name), getattr(exact.terms, name), label=kind)
    # Of equal logits the gradients of SCED and KL are 0, which rounding does not keep; CE's is not.
    check_gradient(actual.gradients["ce"], exact.gradients["ce"], label=kind)


def _one_column(subject: Subject) -> None:
    logits = torch.tensor([[0.0], [5.0]], device=subject.device)
    found = fenced_evaluation(subject, logits, torch.zeros(2, dtype=torch.long, device=subject.device), ("loss",))
    if found.terms.loss.count_nonzero() or found.gradients["loss"].count_nonzero():
        raise AssertionError(f"a single column has p = 1, and the loss {found.terms.loss}")


def _shifted(subject: Subject) -> None:
    """Whole numbers, so that the shift is exact."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-8, 8, (5, 1000), generator=generator).float().to(subject.device)
    labels = torch.arange(5, device=subject.device)
    first, second = (fenced_evaluation(subject, z, labels, ("loss",)) for z in (logits, logits + 100))
    check_identity(second.terms.loss, first.terms.loss, "float32")
    check_identity(second.gradients["loss"], first.gradients["loss"], "float32")


def _no_rows(subject: Subject) -> None:
    logits = torch.empty(0, 1000, device=subject.device)
    labels = torch.empty(0, dtype=torch.long, device=subject.device)
    found = evaluate(logits, labels, ("loss",), backend=subject.backend)
    if found.gradients["loss"].shape != (0, 1000):
        raise AssertionError(f"no rows have a gradient of shape {tuple(found.gradients['loss'].shape)}")


# ------------------------------------------------------------------------------------------------------------ labels

OUT_OF_RANGE = (-1, -2, -101, 2**31 - 1, 2**31, 2**32, -(2**31), 2**63 - 1, -(2**63))


def labels(subject: Subject) -> Iterator[Check]:
    """Ignored rows, both widths, and labels that are no column: no address is ever formed from one."""
    bugs = ("LabelWrapped",)
    yield Check("out of range, int64", partial(_bad_labels, dtype=torch.int64), bugs)
    yield Check("out of range, int32", partial(_bad_labels, dtype=torch.int32))
    yield Check("ignored rows", _ignored_rows)
    yield Check("int32", partial(_value, call=Call("lm_like", 5, 1025, torch.float32)))
    if subject.on_gpu:
        yield Check("out of range, 128256 columns", partial(_bad_labels, dtype=torch.int64, columns=128_256))


def _bad_labels(subject: Subject, dtype: torch.dtype, columns: int = 1025) -> None:
    limits = torch.iinfo(dtype)
    bad = [label for label in (columns, columns + 1, *OUT_OF_RANGE) if limits.min <= label <= limits.max]
    logits, right = subject.case("normal_1", len(bad) + 2, columns, torch.float32)
    wrong = right.to(dtype)
    wrong[1:-1] = torch.tensor(bad, dtype=dtype, device=logits.device)
    if not subject.checks_on_device:
        for label in bad:
            try:
                fenced_evaluation(subject, logits[:1], torch.full_like(wrong[:1], label), ("loss",))
            except IndexError:
                continue
            raise AssertionError(f"label {label} of {columns} columns was taken")
        return
    found = fenced_evaluation(subject, logits, wrong, ("loss",))
    gradient = found.gradients["loss"]
    if not bool(found.terms.loss[1:-1].isnan().all()):
        raise AssertionError(f"a label of {bad} has the loss {found.terms.loss[1:-1].tolist()}, expected NaN")
    if gradient[1:-1].count_nonzero():
        raise AssertionError("a row whose label is no column has a gradient")
    exact = oracle(logits[[0, -1]], right[[0, -1]], ("loss",))
    check_term("loss", found.terms.loss[[0, -1]], exact.terms.loss, label="rows beside")
    check_gradient(gradient[[0, -1]], exact.gradients["loss"], label="rows beside")


def _ignored_rows(subject: Subject) -> None:
    """They may hold anything, count for nothing, and get a gradient of exactly 0."""
    logits, targets = subject.case("normal_1", 6, 5000, torch.bfloat16)
    targets[[1, 4]] = CarefConfig.ignore_index
    logits[1] = _NAN
    found = fenced_evaluation(subject, logits, targets, ("loss",))
    if found.terms.loss[[1, 4]].count_nonzero() or found.gradients["loss"][[1, 4]].count_nonzero():
        raise AssertionError("an ignored row has a loss or a gradient")
    everything = torch.full_like(targets, CarefConfig.ignore_index)
    found = fenced_evaluation(subject, logits, everything, ("loss",))
    if found.gradients["loss"].count_nonzero():
        raise AssertionError("a batch of ignored rows has a gradient")


# -------------------------------------------------------------------------------------------------------------- mask


def topk(_subject: Subject) -> Iterator[Check]:
    """SCED over the top k of a row: fixed and adaptive budgets, ties, one, all."""
    policies = (TopK(1), TopK(7), TopK(100_000), EntropyTopK(scale=0.25), EntropyTopK(k_min=3, k_max=50))
    for policy in policies:
        for columns in (33, 4097, 32_128):
            name = f"{policy} of {columns}"
            bugs = ("TailDropped", "AuxiliaryDropped") if (policy, columns) == (policies[1], 33) else ()
            yield Check(name, partial(_masked_sced, policy=policy, columns=columns), bugs)
    yield Check("ties", partial(_masked_sced, policy=TopK(3), columns=4097, regime="tied_maxima"))


def _masked_sced(subject: Subject, policy, columns: int, regime: str = "lm_like") -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = subject.case(regime, 5, columns, dtype)
        spec = CarefConfig(sparsity=policy).row_spec(columns).for_columns(columns)
        reason = backends.get(subject.clean).unsupported(logits, spec)
        if reason is not None:
            raise Unsupported(reason)
        found = fenced_evaluation(subject, logits, targets, ("sced", "loss"), sparsity=policy)
        exact = oracle(logits, targets, ("sced", "loss"), sparsity=policy)
        check_term("sced", found.terms.sced, exact.terms.sced, label=str(policy))
        for part, gradient in found.gradients.items():
            check_gradient(gradient, exact.gradients[part], label=f"{policy} gradient of {part}")
