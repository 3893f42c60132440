"""Labels out of range, ignored rows and empty batches; nothing is read or written outside the tensors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from cuda_device import device_of
from cuda_emulated import PREAMBLE
from torch.nn import functional

from caref_kernels import caref_loss, fused_sced, linear_caref_loss
from caref_kernels.testing import (
    check_evaluation,
    check_gradient,
    check_identity,
    check_term,
    evaluate,
    make_case,
    oracle,
)

BAD_LABELS = (5, 6, -1, -101, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63))


@pytest.mark.parametrize("label", BAD_LABELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_label_out_of_range(raising_backend, label, reduction):
    """A label is checked before any cast to 32 bits, in which 2**32 + 1 would be column 1."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, label, 1])
    with pytest.raises(IndexError, match=rf"labels: target {label} at row 2 is out of range \[0, 5\)"):
        caref_loss(logits, labels, reduction=reduction, backend=raising_backend)


def test_first_bad_label_is_named(raising_backend):
    logits = torch.zeros(4, 5)
    with pytest.raises(IndexError, match="target 9 at row 1 .*ignore_index=-100"):
        caref_loss(logits, torch.tensor([-100, 9, 0, 77], dtype=torch.int32), backend=raising_backend)


def test_row_of_a_bad_label_in_three_dimensions(raising_backend):
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = 8
    with pytest.raises(IndexError, match="target 8 at row 5"):
        caref_loss(torch.zeros(2, 3, 8), labels, backend=raising_backend)


@pytest.mark.parametrize("label", BAD_LABELS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_label_out_of_range_on_a_device(silent_backend, label, dtype):
    """Its row is NaN with a zero gradient, the other rows are unchanged, and the call stays asynchronous."""
    if not torch.iinfo(dtype).min <= label <= torch.iinfo(dtype).max:
        return
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, label, 1], dtype=dtype)
    rows = torch.tensor([0, 1, 3])
    for options in ({}, {"alpha": 1.5, "beta": 0.5}):
        expected = oracle(logits[rows], labels[rows], **options)
        leaf = logits.clone().requires_grad_()
        out = caref_loss(leaf, labels, reduction="none", return_terms=True, backend=silent_backend, **options)
        assert all(math.isnan(term.detach()[2]) for term in out[:5])
        check_term("loss", out.loss.detach()[rows], expected.terms.loss)
        gradient = torch.autograd.grad(out.loss.sum(), leaf)[0]
        assert torch.count_nonzero(gradient[2]) == 0
        check_gradient(gradient[rows], expected.gradients["loss"])


GUARD = 64
PATTERN = -12345.0


class Guarded:
    """A tensor inside a larger buffer whose margins hold a pattern."""

    def __init__(self, values: torch.Tensor) -> None:
        self.buffer = torch.full((values.numel() + 2 * GUARD,), PATTERN, dtype=values.dtype)
        self.view = self.buffer[GUARD:-GUARD].view(values.shape)
        self.view.copy_(values)
        self.values = values.clone()

    def rim_intact(self) -> bool:
        rim = torch.cat((self.buffer[:GUARD], self.buffer[-GUARD:]))
        return torch.equal(rim, torch.full_like(rim, PATTERN))

    def intact(self) -> bool:
        return self.rim_intact() and torch.equal(self.view, self.values)


def _ops_under_guard(backend, logits, labels, dtype):
    """Run forward and both backwards on guarded tensors; returns the inputs and the buffer of the gradient."""
    spec = (2.0, 1.0, logits.size(-1), -100, True, 0.0, 0, 0, False, 0, backend)
    inputs = [Guarded(logits), Guarded(labels)]
    terms, stats = torch.ops.caref_kernels.forward(inputs[0].view, inputs[1].view, *spec)
    inputs += [Guarded(torch.ones_like(terms)), Guarded(stats)]
    rows, targets, grad_terms, statistics = (guarded.view for guarded in inputs)
    gradient = torch.ops.caref_kernels.backward(grad_terms, rows, targets, statistics, *spec)
    overwritten = Guarded(logits)
    torch.ops.caref_kernels.backward_(grad_terms, overwritten.view, targets, statistics, *spec)
    return inputs, overwritten, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("columns", [1, 5, 63, 257, 1000])
def test_canaries_of_good_calls(backend, columns, dtype):
    case = make_case("normal_3", 5, columns, dtype, ignored=1)
    inputs, overwritten, gradient = _ops_under_guard(backend, *case, dtype)
    assert all(guarded.intact() for guarded in inputs)
    assert overwritten.rim_intact()
    assert torch.equal(overwritten.view, gradient)


@pytest.mark.parametrize("label", BAD_LABELS)
def test_canaries_of_bad_labels(raising_backend, label):
    """A label past the end of the last row: neither direction may write the margins, whatever it raises."""
    logits = Guarded(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))
    labels = Guarded(torch.tensor([0, 1, label]))
    spec = (2.0, 1.0, 5, -100, True, 0.0, 0, 0, False, 0, raising_backend)
    with pytest.raises(IndexError):
        torch.ops.caref_kernels.forward(logits.view, labels.view, *spec)
    stats = Guarded(torch.ones(3, 5))
    grad_terms = Guarded(torch.ones(3, 3))
    with pytest.raises(IndexError):
        torch.ops.caref_kernels.backward(grad_terms.view, logits.view, labels.view, stats.view, *spec)
    out = Guarded(logits.values)
    with pytest.raises(IndexError):
        torch.ops.caref_kernels.backward_(grad_terms.view, out.view, labels.view, stats.view, *spec)
    assert all(guarded.intact() for guarded in (logits, labels, stats, grad_terms))
    assert out.rim_intact()


@pytest.mark.parametrize("label", BAD_LABELS)
@pytest.mark.parametrize("columns", [5, 129])
def test_canaries_of_bad_labels_on_a_device(silent_backend, label, columns):
    logits = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, label])
    inputs, overwritten, gradient = _ops_under_guard(silent_backend, logits, labels, logits.dtype)
    assert all(torch.equal(torch.nan_to_num(guarded.view), torch.nan_to_num(guarded.values)) for guarded in inputs)
    assert all(guarded.rim_intact() for guarded in (*inputs, overwritten))
    if not 0 <= label < columns:
        assert torch.count_nonzero(gradient[2]) == 0
    assert torch.count_nonzero(gradient[:2]) == 2 * columns
    assert torch.equal(overwritten.view, gradient)


HOSTILE = """
import math, sys, torch, caref_kernels
spec = (2.0, 1.0, 64, -100, True, 0.0, 0, 0, False, 0, sys.argv[1])
torch.set_default_device(sys.argv[2])
for argmax in (-1.0, 64.0, 300.0, 1e9, -1e30, math.inf, math.nan):
    buffer = torch.full((3 * 64 + 8192,), -12345.0)
    logits = buffer[4096:-4096].view(3, 64).normal_()
    stats = torch.tensor([[0.0, argmax, 1.0, -0.5, 0.1]]).repeat(3, 1)
    torch.ops.caref_kernels.backward_(torch.ones(3, 3), logits, torch.tensor([0, 1, 2]), stats, *spec)
    rim = torch.cat((buffer[:4096], buffer[-4096:]))
    if not torch.equal(rim, torch.full_like(rim, -12345.0)):
        sys.exit(f"arg-max {argmax}: written outside the logits")
"""


def test_hostile_statistics_stay_inside(fused_backend):
    """A saved arg-max out of range writes nothing outside; in a process of its own, which a stray write would end."""
    command = [sys.executable, "-c", PREAMBLE + HOSTILE, fused_backend, device_of(fused_backend)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, (run.returncode, run.stderr)


@pytest.mark.parametrize("flag", [["-O"], ["-OO"]])
def test_checks_survive_python_optimised(flag):
    program = """
import sys, torch
from caref_kernels import backends, caref_loss
torch.set_num_threads(1)
for name in backends.ORDER:
    if name in backends.DEVICE_CHECKED or backends.get(name).unsupported(torch.empty(1, 2)) is not None:
        continue
    try:
        caref_loss(torch.zeros(2, 5), torch.tensor([0, 5]), backend=name)
    except IndexError as error:
        if "target 5 at row 1 is out of range [0, 5)" in str(error):
            continue
    sys.exit(f"{name}: no IndexError")
try:
    caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), alpha=0.5, backend="reference")
except ValueError:
    sys.exit(7)
"""
    run = subprocess.run(
        [sys.executable, *flag, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 7, run.stderr


@pytest.mark.parametrize("num_items", [None, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_ignored_is_a_mean_over_nothing(backend, dtype, reduction, num_items):
    if num_items is not None and reduction != "mean":
        num_items = None
    leaf = torch.randn(3, 11).to(dtype).requires_grad_()
    options = {"reduction": reduction, "num_items": num_items, "backend": backend}
    loss = caref_loss(leaf, torch.full((3,), -100), **options)
    assert loss.requires_grad
    if reduction == "mean" and num_items is None:
        assert math.isnan(loss.detach())
    else:
        assert torch.equal(loss.detach(), torch.zeros(3 if reduction == "none" else ()))
    loss.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(3, 11, dtype=dtype))


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", torch.tensor(math.nan)), ("sum", torch.tensor(0.0)), ("none", torch.zeros(0))]
)
def test_no_rows_give_an_empty_gradient(backend, reduction, expected):
    for shape in ((0, 7), (2, 0, 7)):
        leaf = torch.zeros(shape, requires_grad=True)
        labels = torch.zeros(shape[:-1], dtype=torch.long)
        for loss in (
            caref_loss(leaf, labels, reduction=reduction, backend=backend),
            fused_sced(leaf, reduction=reduction, backend=backend),
        ):
            reshaped = loss.detach().flatten() if reduction == "none" else loss.detach()
            assert torch.equal(torch.nan_to_num(reshaped, nan=-1), torch.nan_to_num(expected, nan=-1))
            gradient = torch.autograd.grad(loss.sum(), leaf)[0]
            assert gradient.shape == shape


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 30, 255, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignore_index(backend, ignore_index, reduction):
    """Ignored rows are left out of every term and of the count, for an index inside or outside the vocabulary."""
    case = make_case("lm_like", 8, 31, seed=3)
    labels = torch.tensor([0, 30, 4, ignore_index, 7, ignore_index, 1, 2])
    keep = labels != ignore_index
    leaf = case.logits.clone().requires_grad_()
    out = caref_loss(leaf, labels, ignore_index=ignore_index, reduction=reduction, return_terms=True, backend=backend)
    ce = functional.cross_entropy(case.logits.double(), labels, ignore_index=ignore_index, reduction=reduction)
    check_term("ce", out.ce.detach(), ce)
    rows = oracle(case.logits[keep], labels[keep], ("loss",), ignore_index=ignore_index)
    for name in ("loss", "sced", "kl", "entropy"):
        values = getattr(rows.terms, name)
        whole = torch.zeros(8, dtype=torch.float64).masked_scatter(keep, values)
        expected = {"mean": values.mean(), "sum": values.sum(), "none": whole}[reduction]
        check_identity(getattr(out, name).detach(), expected, "float32_terms", name)
    out.loss.sum().backward()
    assert torch.count_nonzero(leaf.grad[~keep]) == 0
    scale = int(keep.sum()) if reduction == "mean" else 1
    check_gradient(leaf.grad[keep], rows.gradients["loss"] / scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ignored_row_may_hold_anything(backend, dtype, value):
    clean = make_case("normal_1", 4, 40, dtype, seed=4)
    labels = clean.labels.clone()
    labels[2] = -100
    dirty = clean.logits.clone()
    dirty[2] = value
    before, after = (evaluate(logits, labels, backend=backend) for logits in (clean.logits, dirty))
    for name, term in after.terms._asdict().items():
        assert torch.equal(term, getattr(before.terms, name)), name
        assert term[2] == 0
    for part, gradient in after.gradients.items():
        assert torch.equal(gradient, before.gradients[part]), part
        assert torch.count_nonzero(gradient[2]) == 0


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_valid_masks_rows(backend, mask_dtype):
    """In ``fused_sced(valid=...)`` 0 leaves a row out, whatever it holds, and any other number keeps it."""
    logits = make_case("lm_like", 5, 40, seed=5).logits
    valid = torch.tensor([1, 0, 1, 1, 0]).to(mask_dtype)
    if mask_dtype != torch.bool:
        valid[2] = 200
    dirty = logits.clone()
    dirty[1] = math.nan
    leaf = dirty.requires_grad_()
    keep = valid != 0
    expected = oracle(logits[keep], torch.zeros(3, dtype=torch.long), ("sced",))
    loss = fused_sced(leaf, valid=valid, reduction="none", backend=backend)
    check_term("sced", loss.detach()[keep], expected.terms.sced, least_unit=1e-3)
    assert torch.count_nonzero(loss.detach()[~keep]) == 0
    mean = fused_sced(leaf, valid=valid, backend=backend)
    check_identity(mean.detach(), expected.terms.sced.mean(), "float32_terms")
    mean.backward()
    assert torch.count_nonzero(leaf.grad[~keep]) == 0
    check_gradient(leaf.grad[keep], expected.gradients["sced"] / 3)


def test_label_dtypes(backend):
    case = make_case("lm_like", 4, 40, seed=6, ignored=1)
    wide = evaluate(*case, backend=backend)
    narrow = evaluate(case.logits, case.labels.int(), backend=backend)
    for name, term in narrow.terms._asdict().items():
        assert torch.equal(term, getattr(wide.terms, name)), name
    for part, gradient in narrow.gradients.items():
        assert torch.equal(gradient, wide.gradients[part]), part


@pytest.mark.parametrize("ignore_index", [2**32 + 3, -(2**32), 2**40, -(2**31) - 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignore_index_that_int32_labels_cannot_hold(backend, ignore_index, reduction):
    """No int32 label equals such an index, also if its lowest 32 bits are those of a label."""
    case = make_case("lm_like", 4, 40, seed=8)
    labels = torch.tensor([3, 0, 5, 3])
    options = {"ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    weight = make_case("normal_1", 40, 6, seed=9).logits
    hidden = make_case("normal_1", 4, 6, seed=10).logits
    for loss, leaf in (
        (lambda leaf, labels: caref_loss(leaf, labels, **options), case.logits),
        (lambda leaf, labels: linear_caref_loss(leaf, weight, labels, **options), hidden),
    ):
        results = []
        for kind in (labels, labels.int()):
            leaf = leaf.detach().clone().requires_grad_()
            value = loss(leaf, kind)
            results.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
        for wide, narrow in zip(*results, strict=True):
            assert torch.equal(wide, narrow)
    rows = oracle(case.logits, labels, ()).terms.loss
    narrow = caref_loss(case.logits, labels.int(), **options)
    check_identity(narrow, rows if reduction == "none" else rows.mean(), "float32_terms")


def test_shapes_with_two_leading_dimensions_equal_the_flattened_call(backend):
    """Logits (B, T, V) with labels (B, T) give the result of the flattened call."""
    case = make_case("lm_like", 6, 40, seed=7, ignored=1)
    flat = evaluate(*case, backend=backend)
    stacked = evaluate(case.logits.view(2, 3, 40), case.labels.view(2, 3), backend=backend)
    assert stacked.terms.loss.shape == (2, 3)
    assert all(term.shape == (2, 3) for term in stacked.terms)
    assert torch.equal(stacked.terms.loss.flatten(), flat.terms.loss)
    for part, gradient in stacked.gradients.items():
        assert torch.equal(gradient.view(6, 40), flat.gradients[part]), part
    check_evaluation(flat, oracle(*case))
