"""The suite on a GPU: the same tests, whose tensors are made on the CPU and moved.

A test says ``torch.randn(...)`` and ``make_case(...)``.  For a backend that needs a GPU these two names of its module
stand for themselves followed by a move, so that the values are those of every other backend.  Only the test's own
module changes: a tensor that the library makes on the wrong device is still an error.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import pytest
import torch
import triton_interpreter

CONSTRUCTORS = (
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
)  # fmt: skip
# Backends whose tensors lie on a GPU; under Triton's interpreter, which stands for one, on the CPU.
ON_CUDA = () if triton_interpreter.ACTIVE else ("triton",)
OF_THE_PACKAGE = ("make_case", "confident_logits", "make_problem")  # and of the tests of heads


def missing() -> str | None:
    """Why there is no CUDA device, or ``None``."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "no CUDA device: torch is a build for CPUs"
    return "no CUDA device"


def device_of(backend: str) -> str:
    """Where the tensors of the tests of a backend lie."""
    return "cuda" if backend in ON_CUDA else "cpu"


def move_tensors_of(module: types.ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what ``module`` makes from now on lie on ``device``."""
    for name in OF_THE_PACKAGE:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, moved(getattr(module, name), device))
    if getattr(module, "torch", None) is torch:
        substitute = types.ModuleType("torch")
        substitute.__dict__.update(torch.__dict__)
        for name in CONSTRUCTORS:
            setattr(substitute, name, moved(getattr(torch, name), device))
        monkeypatch.setattr(module, "torch", substitute)


def moved(make: Callable, device: str) -> Callable:
    """``make``, with its tensors on ``device`` unless the call names another one; strides stay as they are."""

    @functools.wraps(make)
    def made(*arguments, **options):
        if options.get("device") is not None:
            return make(*arguments, **options)
        leaf = options.pop("requires_grad", False)
        made_here = make(*arguments, **options)
        if isinstance(made_here, torch.Tensor):
            return made_here.to(device).requires_grad_(leaf)
        return type(made_here)(*(_at(part, device) for part in made_here))

    return made


def _at(part: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """``part`` on ``device``; a leaf stays one."""
    return None if part is None else part.detach().to(device).requires_grad_(part.requires_grad)
