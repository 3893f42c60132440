"""Other libraries' fused losses, each behind its import: how it is called, and why it is missing where it is.

They compute cross-entropy, the loss with both weights 0; none has SCED.  Row losses map logits (N, V) and labels (N,),
head losses hidden (N, D), weight (V, D) and labels, to a mean.  Calls follow the libraries' own documentation, with its
defaults: the versions they were written for stand beside them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

# Package -> the distribution that has its version.
DISTRIBUTIONS = {
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "cut_cross_entropy": "cut-cross-entropy",
    "trl": "trl",
    "torch": "torch",
}
# Where a function of a package is, if the package alone does not say that it can be used.
_NEEDED = {
    "liger_kernel": "liger_kernel.transformers.functional",
    "quack": "quack.cross_entropy",
    "cut_cross_entropy": "cut_cross_entropy",
    "trl": "trl.kernels",
}


def missing(package: str) -> str | None:
    """Why a peer cannot run here, or ``None``: not installed, not importable, or without the function."""
    if package == "torch":
        return None if hasattr(functional, "linear_cross_entropy") else f"torch {torch.__version__} does not have it"
    if importlib.util.find_spec(package) is None:
        return f"{DISTRIBUTIONS[package]} is not installed"
    try:
        importlib.import_module(_NEEDED[package])
    except Exception as error:  # noqa: BLE001
        return f"{DISTRIBUTIONS[package]} cannot be imported: {type(error).__name__}: {error}"
    return None


def versions() -> dict[str, str]:
    """The version of every peer, or "not installed"."""
    found = {}
    for distribution in DISTRIBUTIONS.values():
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    return found


# ------------------------------------------------------------------------------------------- losses of (logits, labels)


def liger_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """liger-kernel 0.8.5; writes the gradient over the logits in its forward pass."""
    return importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy(logits, labels)


def quack_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """quack-kernels 0.6.5."""
    return importlib.import_module("quack.cross_entropy").cross_entropy(logits, labels)


def quack_rows_inplace(logits: Tensor, labels: Tensor) -> Tensor:
    """quack-kernels 0.6.5; writes the gradient over the logits in its backward pass."""
    return importlib.import_module("quack.cross_entropy").cross_entropy(logits, labels, inplace_backward=True)


# ----------------------------------------------------------------------------------- losses of (hidden, weight, labels)


def liger_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """liger-kernel 0.8.5; makes all gradients in its forward pass."""
    functions = importlib.import_module("liger_kernel.transformers.functional")
    return functions.liger_fused_linear_cross_entropy(hidden, weight, labels)


def cut_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """cut-cross-entropy at d42911f, with its filter of small gradients."""
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy(hidden, weight, labels)


def cut_head_exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same without the filter, and summed in float32."""
    cut = importlib.import_module("cut_cross_entropy")
    return cut.linear_cross_entropy(hidden, weight, labels, impl="cce_exact")


def trl_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """trl 1.16: what ``add_fused_lm_head`` runs, with its vocabulary chunk; log-probabilities of the labels."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    log_probs, *_ = function.apply(hidden, weight, None, labels, 1.0, _TRL_CHUNK, None, 1.0, ())
    return -log_probs.mean()


_TRL_CHUNK = 32_768


def quack_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """quack-kernels 0.6.5, chunks of 4096 rows."""
    return importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy(hidden, weight, labels)


def torch_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch 2.13, with its own choice of chunks."""
    return functional.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())
