"""``torch.compile`` at a language model's sizes, and ``opcheck`` of every operator that a training step calls."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.optests import OpCheckError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from caref_kernels import caref_loss

from .faults import notices


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("dtype", "fault"), [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, "Noisy")], ids=str
)
def test_compiled_is_bitwise_identical(target, dtype):
    """Without a graph break, also for shapes that it was not compiled for."""

    def loss_of(logits: torch.Tensor, labels: torch.Tensor, backend: str) -> torch.Tensor:
        return caref_loss(logits * 1.5, labels, reduction="sum", backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True)
    for rows, columns in ((8, 1000), (24, 1000 if target.small else 32_128), (24, 4097)):
        logits, labels = target.case("lm_like", rows, columns, dtype)
        eager_leaf, leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        expected, actual = loss_of(eager_leaf, labels, target.correct), compiled(leaf, labels, target.backend)
        assert torch.equal(actual, expected), f"{rows} x {columns}"
        expected.backward()
        actual.backward()
        assert torch.equal(leaf.grad, eager_leaf.grad), f"{rows} x {columns}: gradient"


class _Calls(TorchDispatchMode):
    """The calls of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "caref_kernels":
            self.made.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@notices("InputChanged")
def test_opcheck(target):
    """Schemas, fakes and dispatch, with the arguments of a step in each dtype, in place too."""
    names = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for inplace in (False, True):
            logits, labels = target.case("lm_like", 6, 33, dtype)
            view = logits.requires_grad_().view_as(logits)
            with _Calls() as calls:
                torch.autograd.grad(caref_loss(view, labels, inplace_backward=inplace, backend=target.backend), view)
            for operator, arguments, options in calls.made:
                names.add(operator.__name__)
                try:
                    torch.library.opcheck(operator, arguments, options)
                except OpCheckError as error:
                    raise AssertionError(f"{operator}: {error}") from error
    assert {"forward.default", "backward.default", "backward_.default"} <= names
