"""The tensors of one case on one device: what an implementation is called with, and the check against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from caref_kernels import EntropyTopK, caref_loss
from caref_kernels.testing import Evaluation, check_gradient, check_identity, check_term, oracle

from .cases import Case, HeadCase
from .implementations import Implementation, Sparsity
from .sampling import Calls

# The first rows of a case are verified; the oracle holds about ten float64 copies of them.
VERIFIED_ROWS = 32
# Enough rows for several chunks.
VERIFIED_HEAD_ROWS = 320


class LossWorkspace:
    """The logits of one case, shared by all implementations; what a call overwrites is refreshed before the next."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.case = case
        self.values, self.labels = case.tensors(device)
        self._buffer = self.values.clone().requires_grad_()
        self._copy = torch.empty_like(self.values)
        self._oracles: dict[Sparsity | None, Evaluation] = {}

    def missing(self, one: Implementation) -> str | None:
        """Why ``one`` cannot run here, or ``None``."""
        return one.missing(self.values)

    def calls(self, one: Implementation) -> Calls:
        """What is timed; the copy counts as a forward pass."""
        if one.loss is None:
            return Calls(self.refresh, lambda logits: self._copy.copy_(logits.detach()), lambda *_: None)
        return Calls(
            self.refresh,
            lambda logits: one.loss(logits, self.labels),
            lambda logits, loss: torch.autograd.grad(loss, logits)[0],
        )

    def refresh(self) -> Tensor:
        """The logits with their values restored: not a leaf, as the output of a head, so that it may be overwritten."""
        with torch.no_grad():
            self._buffer.copy_(self.values)
        return self._buffer.view_as(self._buffer)

    def describe(self, one: Implementation) -> dict[str, float]:
        """Further fields of a row: how many columns a mask keeps, averaged over the rows."""
        if one.sparsity is None:
            return {}
        if not isinstance(one.sparsity, EntropyTopK):
            return {"mean_num_kept": min(one.sparsity.k, self.case.vocab)}
        out = caref_loss(self.values, self.labels, sparsity=one.sparsity, return_terms=True)
        return {"mean_num_kept": float(out.num_kept)}

    def forget_oracle(self) -> None:
        """Free the float64 values."""
        self._oracles.clear()

    def verify(self, one: Implementation) -> dict[str, float]:
        """Relative errors of the mean loss and of the worst row of the gradient, on the first rows.

        The package's own backends must keep every bound of every row.  Torch's compositions do not: eager misses the
        cap of the worst row, the row sum at large V and, in bfloat16, the correct rounding of 3 % of the entries.  They
        are held to the tolerance of the whole gradient.  Other libraries are held to a tolerance that shows that they
        compute the same thing, and their errors are reported.

        Raises:
            AssertionError: an error exceeds its tolerance; the message names the implementation.
        """
        if one.loss is None:
            return {}
        logits, labels = self.values[:VERIFIED_ROWS], self.labels[:VERIFIED_ROWS]
        if one.sparsity not in self._oracles:
            parts = ("loss", "ce") if one.sparsity is None else ("loss",)
            self._oracles[one.sparsity] = oracle(logits, labels, parts, sparsity=one.sparsity)
        expected = self._oracles[one.sparsity]
        view = logits.clone().requires_grad_().view_as(logits)  # a non-leaf, as the output of a head is
        loss = one.loss(view, labels)
        (gradient,) = torch.autograd.grad(loss, view)
        exact_loss = getattr(expected.terms, one.part).mean()
        exact_gradient = expected.gradients[one.part] / logits.size(0)
        _check(one, loss.detach(), gradient, exact_loss, exact_gradient)
        row_errors = (gradient.double() - exact_gradient).norm(dim=-1) / exact_gradient.norm(dim=-1)
        return {
            "loss": _rounded((loss.detach().double() - exact_loss).abs() / exact_loss),
            "gradient": _rounded(row_errors.max()),
        }


def _check(one: Implementation, loss: Tensor, gradient: Tensor, exact_loss: Tensor, exact_gradient: Tensor) -> None:
    if one.package is not None:
        check_identity(loss.view(1), exact_loss.view(1), "peer", label=one.name)
        check_identity(gradient, exact_gradient, "peer", label=one.name)
        return
    check_term(one.part, loss.view(1), exact_loss.view(1), label=one.name)
    # Rounding may move exp(H) across an integer, and k with it: no cap of single rows holds for a masked gradient.
    if one.backend is None or one.sparsity is not None:
        dtype = str(gradient.dtype).removeprefix("torch.")
        prefix = "eager_" if one.backend is None and dtype == "float32" else ""
        check_identity(gradient, exact_gradient, f"{prefix}{dtype}_gradient", label=one.name)
    else:
        check_gradient(gradient, exact_gradient, label=one.name)


class HeadWorkspace:
    """The hidden states and the weight of one case; nothing is overwritten, so nothing is refreshed."""

    def __init__(self, case: HeadCase, device: torch.device | str = "cpu") -> None:
        self.case = case
        self.hidden, self.weight, self.labels = case.tensors(device)
        self._exact: dict[str, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def missing(self, one: Implementation) -> str | None:
        """Why ``one`` cannot run here, or ``None``."""
        return one.missing(self.hidden)

    def calls(self, one: Implementation) -> Calls:
        """What is timed: the gradients of what is trained."""
        trained = [leaf for leaf in (self.hidden, self.weight) if leaf.requires_grad]
        return Calls(
            lambda: None,
            lambda _: one.loss(self.hidden, self.weight, self.labels),
            lambda _, loss: torch.autograd.grad(loss, trained),
        )

    def describe(self, one: Implementation) -> dict[str, float]:  # noqa: ARG002
        """No further fields."""
        return {}

    def verify(self, one: Implementation) -> dict[str, float]:
        """Relative errors of the loss and of each gradient on the first rows, held to the tolerances of their dtype.

        Raises:
            AssertionError: an error exceeds its tolerance; the message names the implementation.
        """
        hidden = self.hidden.detach()[:VERIFIED_HEAD_ROWS].clone().requires_grad_()
        labels = self.labels[:VERIFIED_HEAD_ROWS]
        if one.part not in self._exact:
            self._exact[one.part] = exact_head(hidden.detach(), self.weight.detach(), labels, one.part)
        exact_loss, exact_gradients = self._exact[one.part]
        loss = one.loss(hidden, self.weight, labels)
        low = "bfloat16_head" if self.case.dtype == torch.bfloat16 else None
        of_loss, of_gradient = ("peer", "peer") if one.package else (low or "float32_terms", low or "float32_gradient")
        label = f"{self.case.name}, {one.name}"
        check_identity(loss.detach().float().view(1), exact_loss.view(1), of_loss, label)
        errors = {"loss": _rounded((loss.detach().double() - exact_loss).abs() / exact_loss)}
        leaves = {"hidden": hidden, "weight": self.weight} if self.weight.requires_grad else {"hidden": hidden}
        found = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient, exact in zip(leaves, found, exact_gradients, strict=False):
            check_identity(gradient, exact, of_gradient, f"{label}, gradient of {name}")
            errors[f"gradient of {name}"] = _rounded((gradient.double() - exact).norm() / exact.norm())
        return errors

    def forget_oracle(self) -> None:
        """Free the float64 gradients, which take gigabytes at the widest vocabularies."""
        self._exact.clear()


def exact_head(hidden: Tensor, weight: Tensor, labels: Tensor, part: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Loss and gradients of hidden and weight in float64, 64 rows of logits at a time."""
    wide = weight.double()
    grad_weight = torch.zeros_like(wide)
    total, grads_hidden = wide.new_zeros(()), []
    options = {} if part == "loss" else {"lambda_sced": 0.0, "lambda_kl": 0.0}
    for block, own in zip(hidden.double().split(64), labels.split(64), strict=True):
        logits = (block @ wide.t()).requires_grad_()
        loss = caref_loss(logits, own, num_items=len(hidden), backend="reference", **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        grads_hidden.append(gradient @ wide)
        grad_weight.addmm_(gradient.t(), block)
    return total, (torch.cat(grads_hidden), grad_weight)


def _rounded(error: Tensor) -> float:
    """Two significant digits."""
    return float(f"{float(error):.1e}")
