"""The heads that are measured, each named after the model that has it, and what computes their loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions, functional

from caref_kernels import caref_loss, linear_caref_loss, linear_chunks
from caref_kernels.testing import check_identity

from .providers import eager_loss

# Real rows have a standard deviation of 3.2.
SIGMA = 3.2
VERIFIED_ROWS = 320
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadCase:
    """hidden (rows, features) and weight (vocab, features) of one dtype; every row has a label."""

    name: str
    rows: int
    vocab: int
    features: int
    dtype: torch.dtype = torch.float32
    frozen: bool = False
    must_hold: bool = False

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits that are not made."""
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def title(self) -> str:
        """For tables: name, shape, dtype, what is trained, and the size of the logits."""
        dtype = str(self.dtype).removeprefix("torch.")
        trained = "frozen head" if self.frozen else "trained head"
        return (
            f"{self.name}: {self.rows} x {self.vocab}, D = {self.features}, {dtype}, {trained}, "
            f"logits {self.logits_bytes / 2**20:.0f} MiB"
        )

    def tensors(self, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Seeded leaves: hidden, weight and labels, of the first ``rows`` rows."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.vocab, self.features, generator=generator) * (SIGMA / self.features**0.5)
        hidden = torch.randn(self.rows, self.features, generator=generator)[:rows]
        labels = torch.randint(self.vocab, (self.rows,), generator=generator)[:rows]
        leaves = hidden.to(self.dtype).requires_grad_(), weight.to(self.dtype).requires_grad_(not self.frozen)
        return *leaves, labels


CASES = (
    HeadCase("must-hold", 4096, 32_128, 256, must_hold=True),
    HeadCase("must-hold-frozen", 4096, 32_128, 256, frozen=True),
    HeadCase("flan-t5-large", 1024, 32_128, 1024),
    HeadCase("flan-t5-large-frozen", 1024, 32_128, 1024, frozen=True),
    # The widest vocabularies, with the rows that a CPU gets through in seconds.
    HeadCase("llama-3.2-1b", 256, 128_256, 2048),
    HeadCase("gemma-3-270m", 256, 262_144, 640),
)


@dataclass(frozen=True)
class HeadProvider:
    """One contestant; ``part`` is "loss" for all of CAREF or "ce" for cross-entropy alone."""

    name: str
    meaning: str
    loss: Loss
    part: str = "loss"


def _materialised(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda hidden, weight, labels: loss(functional.linear(hidden, weight), labels)


def _torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int | None = None) -> Tensor:
    options = LinearCrossEntropyOptions(batch_chunk_size=rows)
    return functional.linear_cross_entropy(hidden, weight, labels, options=options)


def _torch_chunked_as_ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    head = linear_chunks.Head(hidden, weight, None)
    return _torch_chunked(
        hidden, weight, labels, linear_chunks.auto_chunk_rows(len(hidden), head, weight.requires_grad)
    )


def _cross_entropy_of_ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_caref_loss(hidden, weight, labels, lambda_sced=0, lambda_kl=0)


PROVIDERS = (
    HeadProvider("eager", "F.linear, then CAREF composed in plain PyTorch", _materialised(eager_loss)),
    HeadProvider("logits", "F.linear, then caref_loss", _materialised(caref_loss)),
    HeadProvider("fused", "linear_caref_loss", linear_caref_loss),
    HeadProvider("fused-ce", "linear_caref_loss with both weights 0", _cross_entropy_of_ours, "ce"),
    HeadProvider(
        "cross-entropy",
        "F.linear, then F.cross_entropy in float32",
        _materialised(lambda logits, labels: functional.cross_entropy(logits.float(), labels)),
        "ce",
    ),
    HeadProvider("torch-chunked", "F.linear_cross_entropy with its own choice of chunks", _torch_chunked, "ce"),
    HeadProvider(
        "torch-chunked-as-ours",
        "F.linear_cross_entropy with the rows per chunk of linear_caref_loss",
        _torch_chunked_as_ours,
        "ce",
    ),
)
# What else fuses a head with cross-entropy, and why it is not here.
MISSING = (
    ("Liger-Kernel LigerFusedLinearCrossEntropyLoss", "Triton kernels, needs a GPU"),
    ("Cut Cross-Entropy linear_cross_entropy", "Triton kernels, needs a GPU"),
    ("TRL add_fused_lm_head", "measured on a GPU or not at all: its CPU path is plain PyTorch"),
)


class HeadWorkspace:
    """The tensors of one case, for :mod:`benchmarks.sampling`; nothing is overwritten, so nothing is refreshed."""

    def __init__(self, case: HeadCase) -> None:
        self.case = case
        self.hidden, self.weight, self.labels = case.tensors()

    def forward(self, provider: HeadProvider) -> Tensor:
        """The provider's mean loss."""
        return provider.loss(self.hidden, self.weight, self.labels)

    def backward(self, result: Tensor) -> tuple[Tensor, ...]:
        """The gradients of what is trained."""
        return torch.autograd.grad(result, [one for one in (self.hidden, self.weight) if one.requires_grad])


def verify(case: HeadCase) -> dict[str, dict[str, float]]:
    """Relative errors of every provider against materialised float64 logits, on the first rows of the case.

    Raises:
        AssertionError: an error exceeds its budget; the message names the provider.
    """
    hidden, weight, labels = case.tensors(VERIFIED_ROWS)
    expected = {part: exact_loss_and_gradients(hidden, weight, labels, part) for part in ("loss", "ce")}
    errors = {}
    for provider in PROVIDERS:
        loss = provider.loss(hidden, weight, labels)
        exact_loss, exact_gradients = expected[provider.part]
        check_identity(loss.detach(), exact_loss, "float32_terms", f"{case.name}, {provider.name}")
        leaves = [one for one in (hidden, weight) if one.requires_grad]
        gradients = torch.autograd.grad(loss, leaves)
        for gradient, exact in zip(gradients, exact_gradients, strict=False):
            check_identity(gradient, exact, "float32_gradient", f"{case.name}, gradient of {provider.name}")
        pairs = zip(gradients, exact_gradients, strict=False)
        worst = max(float((gradient.double() - exact).norm() / exact.norm()) for gradient, exact in pairs)
        errors[provider.name] = {
            "loss": float((loss.detach().double() - exact_loss).abs() / exact_loss),
            "gradient": worst,
        }
    return errors


def exact_loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: str
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Loss and gradients in float64, a few rows of logits at a time."""
    wide = weight.detach().double()
    grad_weight = torch.zeros_like(wide)
    total, grads_hidden = wide.new_zeros(()), []
    options = {} if part == "loss" else {"lambda_sced": 0, "lambda_kl": 0}
    for rows in torch.arange(len(hidden)).split(64):
        block = hidden.detach()[rows].double()
        logits = (block @ wide.t()).requires_grad_()
        loss = caref_loss(logits, labels[rows], num_items=len(hidden), backend="reference", **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        grads_hidden.append(gradient @ wide)
        grad_weight.addmm_(gradient.t(), block)
    return total, (torch.cat(grads_hidden), grad_weight)


def by_name(names: list[str]) -> tuple[HeadCase, ...]:
    """The cases called ``names``, all of them for an empty list.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"cases must be among {', '.join(known)}; got {', '.join(unknown)}")
    return tuple(known[name] for name in names) or CASES
