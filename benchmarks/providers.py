"""The contestants, and the check that each computes what it is timed for.

Every provider maps logits (N, V) and labels (N,) to a mean loss with the default weights.  The eager composition is
what a careful user writes in plain torch: no avoidable temporary, no power where a product does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from caref_kernels import CarefConfig, EntropyTopK, TopK, backends, caref_loss
from caref_kernels.testing import Evaluation, check_gradient, check_identity, check_term, oracle

from . import peers

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One contestant.

    ``part`` names the part of the oracle that it computes: the whole "loss", or "ce" for a floor of reference.
    ``loss`` is ``None`` for the copy, which is timed as a whole and computes nothing.  ``backend`` is the one it needs,
    ``package`` the other library that it comes from, ``sparsity`` the mask of its SCED.
    """

    name: str
    meaning: str
    loss: Loss | None
    part: str = "loss"
    backend: str | None = None
    package: str | None = None
    sparsity: TopK | EntropyTopK | None = None

    def missing(self, logits: Tensor) -> str | None:
        """Why it cannot run on ``logits``, or ``None``."""
        if self.package is not None:
            return peers.missing(self.package)
        return None if self.backend is None else backends.get(self.backend).unsupported(logits)


class Errors(NamedTuple):
    """Relative errors against the float64 oracle: of the mean loss, and of the worst row of the gradient."""

    loss: float
    gradient: float


def eager_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The defaults of :func:`caref_kernels.caref_loss`, composed in plain torch."""
    log_p = functional.log_softmax(logits, -1, dtype=torch.float32)
    p = log_p.exp()
    log_ratio = log_p + math.log(logits.size(-1))
    product = p * log_ratio
    sced = (product.square() * (1 - p)).sum(-1).mean()
    kl = product.sum(-1).mean()
    ce = functional.nll_loss(log_p, labels)
    return ce + CarefConfig.lambda_sced * sced + CarefConfig.lambda_kl * kl


def eager_masked_loss(logits: Tensor, labels: Tensor, policy: TopK | EntropyTopK) -> Tensor:
    """The masked loss as a careful user composes it: torch.topk once, and sums over its columns alone."""
    log_p = functional.log_softmax(logits, -1, dtype=torch.float32 if logits.dtype.itemsize < 8 else torch.float64)
    p = log_p.exp()
    columns = logits.size(-1)
    log_ratio = log_p + math.log(columns)
    budget = policy.top_k_spec()
    with torch.no_grad():
        wanted = (budget.scale * (-(p * log_p).sum(-1)).exp()).ceil()
        k = wanted.clamp(budget.k_min, min(budget.k_max or columns, columns)).long()
        most = int(k.max())
        indices = logits.topk(most, -1).indices
        kept = torch.arange(most, device=k.device) < k[:, None]
    top, top_ratio = p.gather(-1, indices), log_ratio.gather(-1, indices)
    sced = torch.where(kept, (top * top_ratio).square() * (1 - top), 0.0).sum(-1).mean()
    kl = (p * log_ratio).sum(-1).mean()
    ce = functional.nll_loss(log_p, labels)
    return ce + CarefConfig.lambda_sced * sced + CarefConfig.lambda_kl * kl


@cache
def _compiled() -> Loss:
    return torch.compile(eager_loss, fullgraph=True, dynamic=False)


def _compiled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return _compiled()(logits, labels)


@cache
def _compiled_cross_entropy() -> Loss:
    return torch.compile(_cross_entropy, fullgraph=True, dynamic=False)


def _compiled_ce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return _compiled_cross_entropy()(logits, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    # In float32, as Hugging Face computes it: on bfloat16 logits the loss itself would be rounded to 8 bits.
    return functional.cross_entropy(logits.float(), labels)


def _caref(backend: str, *, inplace: bool = False, **options) -> Loss:
    return lambda logits, labels: caref_loss(logits, labels, backend=backend, inplace_backward=inplace, **options)


PROVIDERS = (
    Provider("copy", "one copy of the logits, the unit", None),
    Provider("cross-entropy", "F.cross_entropy alone, a floor of reference", _cross_entropy, part="ce"),
    Provider("eager", "CAREF composed in plain PyTorch", eager_loss),
    Provider("compiled", "torch.compile of the eager composition", _compiled_loss),
    Provider("reference", 'backend="reference"', _caref("reference"), backend="reference"),
    Provider("cpu", 'backend="cpu"', _caref("cpu"), backend="cpu"),
    Provider("cpu-inplace", 'backend="cpu", inplace_backward=True', _caref("cpu", inplace=True), backend="cpu"),
)


def _of_backend(name: str) -> tuple[Provider, ...]:
    """The whole loss and, to compare with other libraries, cross-entropy alone, each in place as well; and masked."""
    no_weights, mask = {"lambda_sced": 0.0, "lambda_kl": 0.0}, EntropyTopK()
    text = f'backend="{name}"'
    return (
        Provider(name, text, _caref(name), backend=name),
        Provider(f"{name}-inplace", f"{text}, inplace_backward=True", _caref(name, inplace=True), backend=name),
        Provider(f"{name}-ce", f"{text}, both weights 0", _caref(name, **no_weights), "ce", name),
        Provider(
            f"{name}-ce-inplace", f"{text}, both weights 0, inplace_backward=True",
            _caref(name, inplace=True, **no_weights), "ce", name,
        ),
        Provider(f"{name}-topk", f"{text}, sparsity={mask}", _caref(name, sparsity=mask), backend=name, sparsity=mask),
    )  # fmt: skip


def _eager_exp_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return eager_masked_loss(logits, labels, EntropyTopK())


PEERS = (
    Provider("liger", "Liger-Kernel's cross-entropy", peers.liger_rows, "ce", package="liger_kernel"),
    Provider("quack", "quack's cross-entropy", peers.quack_rows, "ce", package="quack"),
    Provider("quack-inplace", "quack's, inplace_backward=True", peers.quack_rows_inplace, "ce", package="quack"),
)
# Every backend that is not for the CPU, by its name; the reference for GPUs is the eager composition.
GPU_PROVIDERS = (
    *(provider for provider in PROVIDERS if provider.backend is None),
    Provider("eager-topk", "the eager composition with torch.topk", _eager_exp_entropy, sparsity=EntropyTopK()),
    Provider("compiled-ce", "torch.compile of F.cross_entropy", _compiled_ce_loss, "ce"),
    *(one for name in backends.ORDER if name not in ("cpu", "reference") for one in _of_backend(name)),
    *PEERS,
)


def differentiate(provider: Provider, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss () and gradient (N, V) of one provider; the logits may be overwritten."""
    view = logits.detach().requires_grad_().view_as(logits)  # a non-leaf, as the result of a head is
    loss = provider.loss(view, labels)
    (gradient,) = torch.autograd.grad(loss, view)
    return loss.detach(), gradient


def expectation(logits: Tensor, labels: Tensor) -> Evaluation:
    """What the providers are verified against: every row's terms and gradients in float64."""
    return oracle(logits, labels, parts=("loss", "ce"))


def verify(provider: Provider, logits: Tensor, labels: Tensor, expected: Evaluation) -> Errors:
    """Hold one provider to the tolerances of :mod:`caref_kernels.testing` on the inputs it will be timed on.

    The package's own backends keep every bound of every row.  Torch's compositions do not (eager misses the cap of the
    worst row, the row sum at large V and, in bfloat16, the correct rounding of 3 % of the entries), so they are held to
    the identity of the whole gradient.  Other libraries are held to what shows that they compute the same thing: their
    errors are reported, not judged.

    Raises:
        AssertionError: an error exceeds its tolerance; the message names the provider.
    """
    loss, gradient = differentiate(provider, logits.clone(), labels)
    if provider.sparsity is not None:
        expected = oracle(logits, labels, parts=("loss",), sparsity=provider.sparsity)
    exact_loss = getattr(expected.terms, provider.part).mean()
    exact_gradient = expected.gradients[provider.part] / logits.size(0)
    if provider.package is not None:
        check_identity(loss.view(1), exact_loss.view(1), "peer", label=provider.name)
        check_identity(gradient, exact_gradient, "peer", label=provider.name)
    else:
        _verify_own(provider, loss, gradient, exact_loss, exact_gradient)
    row_errors = (gradient.double() - exact_gradient).norm(dim=-1) / exact_gradient.norm(dim=-1)
    return Errors(float((loss.double() - exact_loss).abs() / exact_loss), float(row_errors.max()))


def _verify_own(provider: Provider, loss: Tensor, gradient: Tensor, exact_loss: Tensor, exact_gradient: Tensor) -> None:
    check_term(provider.part, loss.view(1), exact_loss.view(1), label=provider.name)
    # Rounding may move exp(H) across an integer, and k with it: no cap of single rows holds for a masked gradient.
    if provider.backend is None or provider.sparsity is not None:
        dtype = str(gradient.dtype).removeprefix("torch.")
        prefix = "eager_" if provider.backend is None and dtype == "float32" else ""
        check_identity(gradient, exact_gradient, f"{prefix}{dtype}_gradient", label=provider.name)
    else:
        check_gradient(gradient, exact_gradient, label=provider.name)
