"""The backends that compute rows: their contract, the order of preference, and why one cannot run.

An explicit choice runs or raises an error with the reason.  ``"auto"`` takes the first backend in ``ORDER`` that can
run; if that is the reference, a warning is given once per device type, because the reference is slow.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Protocol

import torch
from torch import Tensor

from ..config import RowSpec
from ..distributed.local_stats import LocalStats
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

# The only environment variable of the package, read once: it replaces "auto" and is then as binding as the argument.
ENVIRONMENT_VARIABLE = "CAREF_KERNELS_BACKEND"
_default_choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto"


class Backend(Protocol):
    """The contract of a backend: rows in three steps, `sums`, `finish` and `gradient`.

    ``sums`` reduces the columns of a row to its maximum, its arg-max and a few sums; ``finish`` makes the terms and the
    statistics from the sums of all columns; ``gradient`` makes the gradient from the statistics.  For rows whose
    columns are all on this rank, ``forward`` is ``sums`` and ``finish`` in one call.  Rows of a sharded vocabulary take
    ``sums`` on every rank, two exchanges, and ``finish`` in plain torch (distributed/local_stats.py), because it reads
    about ten numbers a row.

    Logits are (N, V) or (B, T, V) with N = B * T rows, last stride 1 and any row strides.  ``targets`` (N,) contiguous:
    int32/int64 labels, a bool valid mask, or ``None`` (all rows are valid).  A label equal to ``spec.ignore_index``, or
    a mask of False, makes a row invalid: its terms, statistics and gradient are 0, whatever its logits hold.  Any other
    label outside [0, V) raises IndexError on the CPU; on a device, where an error would be a synchronisation, it makes
    the terms of the row NaN and its gradient 0.  No address is ever formed from it.  A row without a softmax (NaN,
    +inf, or only -inf) is NaN, and the other rows are not affected.
    """

    name: str

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """The reason why this backend cannot take ``logits``, or cannot do what ``spec`` asks for; or ``None``."""

    def forward(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
        """Terms (N, 3) and statistics (N, S), float32 (float64 for float64 logits).

        S = 5, or 8 with a top-k mask (``objective.statistics_of``).  With ``spec.smoothed`` the terms may have a fourth
        column, the mean over all columns of z - m; otherwise it takes another pass over the logits.
        """

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        """Write the gradient of the logits into ``out`` (their shape and dtype; may be the logits themselves).

        ``grad_terms`` (N, 3), any strides, is applied in the accumulation dtype before the one rounding.  If
        ``spec.is_extended`` it is (N, 5), see ``objective.column_grads``.
        """

    def sums(self, logits: Tensor, labels: Tensor, spec: RowSpec) -> LocalStats:
        """The statistics of this rank's columns (N, V_local), whose ``labels`` are as in distributed/local_stats.py."""

    def local_gradient(
        self, grad_terms: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        """Write the gradient of this rank's columns, whose arg-max and label may be on another rank, into ``out``."""


_BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), CudaBackend(), CpuBackend(), ReferenceBackend())
}
ORDER = tuple(_BACKENDS)
# These backends check labels on the device; so does Triton's interpreter, which takes the place of a GPU in tests.
DEVICE_CHECKED = ("triton", "cuda")


def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, ORDER))}; got {name!r}")
    return _BACKENDS[name]


def sharded(name: str) -> Backend:
    """The backend whose ``sums`` and ``local_gradient`` serve the backend called ``name``: so far the reference."""
    backend = get(name)
    return backend if hasattr(backend, "sums") else get("reference")


def select(choice: str, logits: Tensor, spec: RowSpec | None = None) -> str:
    """The name of the backend that runs for ``logits`` and ``spec``.

    Raises:
        ValueError: unknown backend.
        NotImplementedError: an explicit choice cannot run; the message gives its reason and the ones that could.
    """
    if choice == "auto":
        choice = _default_choice
    if choice != "auto":
        reason = get(choice).unsupported(logits, spec)
        if reason is not None:
            able = [name for name in ORDER if get(name).unsupported(logits, spec) is None]
            raise NotImplementedError(f"backend {choice!r} cannot run: {reason}; available here: {', '.join(able)}")
        return choice
    chosen = next(name for name in ORDER if get(name).unsupported(logits, spec) is None)
    if chosen == "reference":
        _warn_slow(logits.device.type)
    return chosen


def explain(logits: Tensor | None = None) -> str:
    """Print, and return, which backend would run for ``logits``, and why each of the others would not.

    Args:
        logits: the tensor to decide for; ``None`` means float32 logits on the CPU.
    """
    sample = torch.empty(1, 2) if logits is None else logits
    sample_name = f"{str(sample.dtype).removeprefix('torch.')} logits on {sample.device}"
    reasons = {name: get(name).unsupported(sample) for name in ORDER}
    if _default_choice == "auto":
        chosen = next((name for name in ORDER if reasons[name] is None), None)
    else:
        chosen = _default_choice if reasons.get(_default_choice, "") is None else None
        sample_name += f", {ENVIRONMENT_VARIABLE}={_default_choice}"
    lines = [f"caref_kernels backends for {sample_name}"]
    for name, reason in reasons.items():
        state = "runs" if name == chosen else "available" if reason is None else f"not available: {reason}"
        detail = getattr(get(name), "describe", str)() if reason is None else ""
        lines.append(f"  {name:<10} {state}{f' ({detail})' if detail else ''}")
    if chosen is not None and sharded(chosen).name != chosen:
        summing = sharded(chosen).name
        lines.append(f"  rows of a sharded vocabulary are summed by {summing}: {chosen} has no kernels for them")
    text = "\n".join(lines)
    sys.stdout.write(text + "\n")
    return text


_warned: set[str] = set()


def _warn_slow(device_type: str) -> None:
    if device_type in _warned or device_type == "meta" or torch.compiler.is_compiling():
        return
    _warned.add(device_type)
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("caref_kernels"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"caref_kernels runs its plain-PyTorch reference on {device_type!r} tensors: no fused backend is available "
        f"there (caref_kernels.explain(logits) says why); pass backend='reference' to choose it on purpose",
        RuntimeWarning,
        stacklevel=level,  # the caller of the package
    )
