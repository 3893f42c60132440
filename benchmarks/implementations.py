"""What is compared: the implementations of a loss for every suite, each with the default weights.

The eager composition is what a careful user writes in plain torch: it has no avoidable temporary, and no power where a
product will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions, functional

from caref_kernels import CarefConfig, EntropyTopK, TopK, backends, caref_loss, linear_caref_loss, linear_chunks

from . import peers

Sparsity = TopK | EntropyTopK
# (logits, labels) or (hidden, weight, labels) -> loss
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Implementation:
    """A loss of (logits, labels) or, for a head, of (hidden, weight, labels).

    ``part`` names what it computes: the whole "loss" or "ce", cross-entropy alone.  ``loss`` is ``None`` for the copy,
    which is timed as a whole and computes nothing.  ``backend`` is the one it needs, ``package`` the other library that
    it comes from, ``sparsity`` the top-k policy of its SCED.
    """

    name: str
    meaning: str
    loss: Loss | None
    part: str = "loss"
    backend: str | None = None
    package: str | None = None
    sparsity: Sparsity | None = None

    def missing(self, tensor: Tensor) -> str | None:
        """Why it cannot run on the dtype and device of ``tensor``, or ``None``."""
        if self.package is not None:
            return peers.missing(self.package)
        return None if self.backend is None else backends.get(self.backend).unsupported(tensor)


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


def eager_masked_loss(logits: Tensor, labels: Tensor, policy: Sparsity) -> Tensor:
    """The masked loss as a careful user composes it: torch.topk once, and sums over its columns alone."""
    log_p = functional.log_softmax(logits, -1, dtype=torch.float32)
    p = log_p.exp()
    columns = logits.size(-1)
    log_ratio = log_p + math.log(columns)
    with torch.no_grad():
        if isinstance(policy, TopK):
            k = torch.full(logits.shape[:-1], min(policy.k, columns), device=logits.device)
        else:
            wanted = (policy.scale * (-(p * log_p).sum(-1)).exp()).ceil()
            k = wanted.clamp(policy.k_min, min(policy.k_max or columns, columns)).long()
        most = int(k.max())
        indices = logits.topk(most, -1).indices
        kept = torch.arange(most, device=k.device) < k[:, None]
    top, top_ratio = p.gather(-1, indices), log_ratio.gather(-1, indices)
    sced = torch.where(kept, (top * top_ratio).square() * (1 - top), 0.0).sum(-1).mean()
    kl = (p * log_ratio).sum(-1).mean()
    ce = functional.nll_loss(log_p, labels)
    return ce + CarefConfig.lambda_sced * sced + CarefConfig.lambda_kl * kl


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In float32, as Hugging Face computes it: on bfloat16 logits the loss itself would be rounded to 8 bits."""
    return functional.cross_entropy(logits.float(), labels)


@cache
def _compiled(loss: Loss) -> Loss:
    return torch.compile(loss, fullgraph=True, dynamic=False)


def _caref(backend: str, *, inplace: bool = False, **options) -> Loss:
    return lambda logits, labels: caref_loss(logits, labels, backend=backend, inplace_backward=inplace, **options)


# ------------------------------------------------------------------------------------------- losses of (logits, labels)

COPY = "copy"
_COMPOSED = (
    Implementation(COPY, "one copy of the logits, the unit", None),
    Implementation("cross-entropy", "F.cross_entropy alone, in float32", cross_entropy, part="ce"),
    Implementation("eager", "CAREF composed in plain PyTorch", eager_loss),
    Implementation("compiled", "torch.compile of it", lambda logits, labels: _compiled(eager_loss)(logits, labels)),
)
LOSSES = (
    *_COMPOSED,
    Implementation("reference", 'backend="reference"', _caref("reference"), backend="reference"),
    Implementation("cpu", 'backend="cpu"', _caref("cpu"), backend="cpu"),
    Implementation("cpu-inplace", 'backend="cpu", inplace_backward=True', _caref("cpu", inplace=True), backend="cpu"),
)

POLICIES: dict[str, Sparsity] = {"8": TopK(8), "64": TopK(64), "1024": TopK(1024), "exp(H)": EntropyTopK()}
DENSE = "dense"


def _eager_masked(name: str, policy: Sparsity) -> Implementation:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return eager_masked_loss(logits, labels, policy)

    return Implementation(name, "plain PyTorch with torch.topk", loss, sparsity=policy)


def _fused_masked(name: str, backend: str, policy: Sparsity) -> Implementation:
    text = f'backend="{backend}", sparsity={policy}'
    return Implementation(name, text, _caref(backend, sparsity=policy), backend=backend, sparsity=policy)


SPARSE_LOSSES = (
    Implementation(DENSE, "no mask", _caref("cpu"), backend="cpu"),
    *(_fused_masked(f"fused {name}", "cpu", policy) for name, policy in POLICIES.items()),
    *(_eager_masked(f"eager {name}", policy) for name, policy in POLICIES.items()),
)


def of_backend(name: str) -> tuple[Implementation, ...]:
    """The whole loss and, to compare with other libraries, cross-entropy alone, each in place as well; and masked."""
    no_weights = {"lambda_sced": 0.0, "lambda_kl": 0.0}
    text, ce = f'backend="{name}"', f'backend="{name}", both weights 0'
    return (
        Implementation(name, text, _caref(name), backend=name),
        Implementation(f"{name}-inplace", f"{text}, in place", _caref(name, inplace=True), backend=name),
        Implementation(f"{name}-ce", ce, _caref(name, **no_weights), "ce", name),
        Implementation(f"{name}-ce-inplace", f"{ce}, in place", _caref(name, inplace=True, **no_weights), "ce", name),
        _fused_masked(f"{name}-topk", name, EntropyTopK()),
    )


PEERS = (
    Implementation("liger", "Liger-Kernel's cross-entropy", peers.liger_rows, "ce", package="liger_kernel"),
    Implementation("quack", "quack's cross-entropy", peers.quack_rows, "ce", package="quack"),
    Implementation("quack-inplace", "quack's, in place", peers.quack_rows_inplace, "ce", package="quack"),
)
# Every backend that is not for the CPU, by its name; the reference for GPUs is the eager composition.
GPU_LOSSES = (
    *_COMPOSED,
    _eager_masked("eager-topk", EntropyTopK()),
    Implementation(
        "compiled-ce", "torch.compile of F.cross_entropy", lambda z, y: _compiled(cross_entropy)(z, y), "ce"
    ),
    *(one for name in backends.ORDER if name not in ("cpu", "reference") for one in of_backend(name)),
    *PEERS,
)

# ----------------------------------------------------------------------------------- losses of (hidden, weight, labels)


def _materialised(loss: Loss) -> Loss:
    return lambda hidden, weight, labels: loss(functional.linear(hidden, weight), labels)


def _fused_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_caref_loss(hidden, weight, labels, lambda_sced=0.0, lambda_kl=0.0)


def _torch_same_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    head = linear_chunks.Head(hidden, weight, None)
    rows = linear_chunks.auto_chunk_rows(len(hidden), head, weight.requires_grad)
    options = LinearCrossEntropyOptions(batch_chunk_size=rows)
    return functional.linear_cross_entropy(hidden, weight, labels, options=options)


_OWN_HEADS = (
    Implementation("eager", "F.linear, then CAREF composed in plain PyTorch", _materialised(eager_loss)),
    Implementation("logits", "F.linear, then caref_loss", _materialised(caref_loss)),
    Implementation("fused", "linear_caref_loss", linear_caref_loss),
    Implementation("fused-ce", "linear_caref_loss with both weights 0", _fused_ce, "ce"),
    Implementation("cross-entropy", "F.linear, then F.cross_entropy in float32", _materialised(cross_entropy), "ce"),
)
HEADS = (
    *_OWN_HEADS,
    Implementation("torch-chunked", "F.linear_cross_entropy with its own choice of chunks", peers.torch_head, "ce"),
    Implementation(
        "torch-same-chunks", "F.linear_cross_entropy with the chunks of linear_caref_loss", _torch_same_chunks, "ce"
    ),
)
# Other libraries that fuse a head with cross-entropy, and why the suite for CPUs does not have them.
NOT_ON_CPU = {
    "Liger-Kernel LigerFusedLinearCrossEntropyLoss": "Triton kernels, needs a GPU",
    "Cut Cross-Entropy linear_cross_entropy": "Triton kernels, needs a GPU",
    "TRL add_fused_lm_head": "measured on a GPU or not at all: its CPU path is plain PyTorch",
}
GPU_HEADS = (
    *_OWN_HEADS,
    Implementation("liger-head", "Liger-Kernel's fused head", peers.liger_head, "ce", package="liger_kernel"),
    Implementation("cut", "Cut Cross-Entropy", peers.cut_head, "ce", package="cut_cross_entropy"),
    Implementation("cut-exact", "the same, unfiltered", peers.cut_head_exact, "ce", package="cut_cross_entropy"),
    Implementation("trl-head", "TRL's fused head", peers.trl_head, "ce", package="trl"),
    Implementation("torch-head", "F.linear_cross_entropy", peers.torch_head, "ce", package="torch"),
    Implementation("quack-head", "quack's chunked linear cross-entropy", peers.quack_head, "ce", package="quack"),
)
