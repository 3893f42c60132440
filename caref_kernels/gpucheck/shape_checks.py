"""Stages about layouts and about autograd: the same bits wherever rows lie, derivatives, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from .. import caref_loss, fused_sced, linear_caref_loss
from ..testing import GRADCHECK, check_identity, evaluate
from .subject import Check, Subject
from .value_checks import EXPONENTS


def layouts(_subject: Subject) -> Iterator[Check]:
    """Views of every kind give the bits of their contiguous copies."""
    for columns in (33, 1000, 4096):
        for name in _VIEWS:
            bugs = ("StrideAssumed",) if (name, columns) == ("wide rows", 33) else ()
            yield Check(f"{name}, {columns} columns", partial(_same_bits, name=name, columns=columns), bugs)


def _view(name: str, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(columns)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return _VIEWS[name](noise, columns)


_VIEWS = {
    "wide rows": lambda noise, columns: noise(5, columns + 24)[:, :columns],
    "odd rows": lambda noise, columns: noise(5, columns + 3)[:, 1 : 1 + columns],
    "shifted by an element": lambda noise, columns: noise(5 * columns + 1)[1:].view(5, columns),
    "every second row": lambda noise, columns: noise(10, columns)[::2],
    "backwards in time": lambda noise, columns: noise(3, 4, columns)[:, :-1],
    "transposed batch": lambda noise, columns: noise(4, 3, columns).transpose(0, 1),
    "expanded": lambda noise, columns: noise(1, columns).expand(5, columns),
}


def _same_bits(subject: Subject, name: str, columns: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = _view(name, columns, dtype, subject.device)
        targets = torch.arange(logits.shape[:-1].numel(), device=subject.device).view(logits.shape[:-1])
        plain = evaluate(logits.contiguous(), targets, ("loss", "sced"), backend=subject.clean)
        viewed = evaluate(logits, targets, ("loss", "sced"), backend=subject.backend)
        for term in plain.terms._fields:
            if not torch.equal(getattr(viewed.terms, term), getattr(plain.terms, term)):
                raise AssertionError(f"{dtype}: {term} differs from that of the contiguous copy")
        for part, gradient in plain.gradients.items():
            if not torch.equal(viewed.gradients[part], gradient):
                raise AssertionError(f"{dtype}: the gradient of {part} differs from that of the contiguous copy")


# ---------------------------------------------------------------------------------------------------------- autograd


def autograd(subject: Subject) -> Iterator[Check]:
    """Derivatives against finite differences in float64, reductions, in place, mixed precision."""
    for exponents in EXPONENTS:
        bugs = ("IncomingIgnored", "AuxiliaryDropped") if exponents == EXPONENTS[0] else ()
        yield Check(f"gradcheck alpha, beta = {exponents}", partial(_gradcheck, exponents=exponents), bugs)
    yield Check("gradcheck of fused_sced", _gradcheck_sced)
    yield Check("reductions and num_items", _reductions)
    yield Check("in place", _inplace)
    yield Check("second derivative refused", _second_derivative)
    if subject.on_gpu:
        yield Check("float16 with a loss scale", _scaled_float16)


def _gradcheck(subject: Subject, exponents: tuple[float, float]) -> None:
    leaf = subject.case("normal_1", 4, 9, torch.float64)[0].clone().requires_grad_()
    targets = torch.tensor([1, -100, 6, 0], device=subject.device)

    def terms(logits: Tensor):
        alpha, beta = exponents
        options = {"alpha": alpha, "beta": beta, "lambda_sced": 0.7, "lambda_kl": 0.3, "backend": subject.backend}
        return caref_loss(logits, targets, reduction="none", return_terms=True, **options)[:4]

    _finite_differences(terms, leaf)


def _gradcheck_sced(subject: Subject) -> None:
    leaf = subject.case("normal_1", 4, 9, torch.float64)[0].clone().requires_grad_()
    valid = torch.tensor([True, False, True, True], device=subject.device)
    _finite_differences(lambda logits: fused_sced(logits, valid=valid, backend=subject.backend), leaf)


def _finite_differences(function, leaf: Tensor) -> None:
    try:
        torch.autograd.gradcheck(function, leaf, **GRADCHECK)
    except GradcheckError as error:
        raise AssertionError(f"gradcheck: {str(error)[:400]}") from error


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def _reductions(subject: Subject) -> None:
    logits, targets = subject.case("lm_like", 6, 1025, torch.float32, ignored=2)
    leaf = logits.requires_grad_()
    rows = caref_loss(leaf, targets, reduction="none", backend=subject.backend)
    items = torch.tensor(11.0, device=subject.device)
    for loss, expected in (
        (caref_loss(leaf, targets, reduction="sum", backend=subject.backend), rows.sum()),
        (caref_loss(leaf, targets, backend=subject.backend), rows.sum() / 4),
        (caref_loss(leaf, targets, num_items=items, backend=subject.backend), rows.sum() / 11),
    ):
        check_identity(loss.detach(), expected.detach(), "float32")
        expected_gradient = torch.autograd.grad(expected, leaf, retain_graph=True)[0]
        check_identity(_gradient(loss, leaf), expected_gradient, "float32_gradient")


def _inplace(subject: Subject) -> None:
    logits, targets = subject.case("lm_like", 5, 1025, torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    expected = _gradient(caref_loss(leaf, targets, backend=subject.backend), leaf)
    view = logits.clone().requires_grad_().view_as(logits)
    loss = caref_loss(view, targets, inplace_backward=True, backend=subject.backend)
    gradient = _gradient(loss, view)
    if gradient.data_ptr() != view.data_ptr() or not torch.equal(gradient, expected):
        raise AssertionError("the gradient written into the logits is not that of the ordinary backward pass")


def _second_derivative(subject: Subject) -> None:
    logits, targets = subject.case("normal_1", 3, 9, torch.float64)
    leaf = logits.clone().requires_grad_()
    loss = caref_loss(leaf, targets, backend=subject.backend)
    gradient = torch.autograd.grad(loss, leaf, create_graph=True)[0]
    try:
        gradient.square().sum().backward()
    except RuntimeError as error:
        if "double backward" not in str(error):
            raise
        return
    raise AssertionError("a second derivative was computed without an error")


def _scaled_float16(subject: Subject) -> None:
    """A head under autocast and a loss scale: the steps of float32, and an overflow skips one."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 4097, device=subject.device)
    exact = torch.nn.Linear(64, 4097, device=subject.device)
    exact.load_state_dict(head.state_dict())
    optimizers = [torch.optim.SGD(one.parameters(), lr=1.0) for one in (head, exact)]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    hidden = torch.randn(32, 64, device=subject.device)
    targets = torch.randint(4097, (32,), device=subject.device)
    for _ in range(3):
        with torch.autocast("cuda", dtype=torch.float16):
            logits = head(hidden)
        scaler.scale(caref_loss(logits, targets, backend=subject.backend)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        caref_loss(exact(hidden), targets, backend="reference").backward()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    check_identity(head.weight.detach(), exact.weight.detach(), "bfloat16_gradient", "weights after three steps")
    before, scale = head.weight.detach().clone(), scaler.get_scale()
    with torch.autocast("cuda", dtype=torch.float16):
        logits = head(hidden)
    scaler.scale(caref_loss(logits, targets, backend=subject.backend) * float("inf")).backward()
    scaler.step(optimizers[0])
    scaler.update()
    if not torch.equal(head.weight.detach(), before) or scaler.get_scale() >= scale:
        raise AssertionError("an overflow did not skip the step and lower the scale")


# ------------------------------------------------------------------------------------------------------------- heads


def heads(subject: Subject) -> Iterator[Check]:
    """linear_caref_loss against materialised float64 logits: chunks, a bias, a frozen weight, ignored rows."""
    for dtype in (torch.float32, torch.bfloat16) if subject.on_gpu else (torch.float32,):
        for chunk_rows in (None, 17):
            bugs = ("TailDropped", "AuxiliaryDropped") if (dtype, chunk_rows) == (torch.float32, None) else ()
            name = f"{dtype}, chunks of {chunk_rows or 'the default'}"
            yield Check(name, partial(_head, dtype=dtype, chunk_rows=chunk_rows), bugs)
        yield Check(f"{dtype}, frozen weight", partial(_head, dtype=dtype, chunk_rows=None, frozen=True))


def _head(subject: Subject, dtype: torch.dtype, chunk_rows: int | None, frozen: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns, features = 70, 33, 16
    made = [torch.randn(*shape, generator=generator) for shape in ((rows, features), (columns, features), (columns,))]
    hidden, weight, bias = (one.to(dtype).to(subject.device) for one in made)
    targets = torch.arange(rows, device=subject.device) % columns
    targets[5] = -100
    trained = [hidden] if frozen else [hidden, weight, bias]
    for one in trained:
        one.requires_grad_()
    exact = [one.detach().double().requires_grad_(one.requires_grad) for one in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*exact)
    expected = caref_loss(logits, targets, alpha=2.0, lambda_sced=5.0, backend="reference")
    options = {"lambda_sced": 5.0, "chunk_rows": chunk_rows, "backend": subject.backend}
    actual = linear_caref_loss(hidden, weight, targets, bias, **options)
    identity = "bfloat16_head" if dtype == torch.bfloat16 else "float32_gradient"
    check_identity(actual.detach(), expected.detach(), "bfloat16_head" if dtype == torch.bfloat16 else "float32_terms")
    wide = torch.autograd.grad(expected, [one for one in exact if one.requires_grad])
    for name, one, other in zip(("hidden", "weight", "bias"), torch.autograd.grad(actual, trained), wide, strict=False):
        check_identity(one, other, identity, f"gradient of {name}")
