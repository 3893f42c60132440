"""The target of a test: a backend on a device, possibly with an injected fault."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from caref_kernels import caref_loss
from caref_kernels.testing import make_case

NAMES = ("loss", "ce", "sced", "kl", "entropy", "gradient")


@dataclass(frozen=True)
class Target:
    """``backend`` has the injected fault, if there is one; ``correct`` never has; ``small`` reduces the shapes."""

    backend: str
    correct: str
    device: str
    small: bool = False

    def case(self, regime: str, rows: int, columns: int, dtype: torch.dtype, **options) -> tuple[Tensor, Tensor]:
        """:func:`caref_kernels.testing.make_case` on the device."""
        case = make_case(regime, rows, columns, dtype, **options)
        return case.logits.to(self.device), case.labels.to(self.device)

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """64 rows of a language model, three of them ignored."""
        return self.case("lm_like", 64, 1000 if self.small else 32_128, dtype, seed=seed, ignored=3)


def step(backend: str, logits: Tensor, labels: Tensor, **options) -> tuple[Tensor, ...]:
    """Loss, terms and gradient."""
    leaf = logits.detach().requires_grad_()
    out = caref_loss(leaf, labels, backend=backend, return_terms=True, **options)
    return (*(term.detach() for term in out[:5]), torch.autograd.grad(out.loss, leaf)[0])


def assert_identical(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Two results of :func:`step` are bitwise identical; NaN equals NaN."""
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan()), f"{name}: NaN in other places"
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), f"{name} differs"
