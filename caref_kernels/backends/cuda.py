"""The backend of the CUDA C++ kernels, which passes tensors as raw pointers.  The kernels are in csrc/cuda.

The kernels are built with the package if nvcc is found, for the architectures that ``explain()`` names; running them
needs neither triton nor a compiler.  A call runs on the current stream and is asynchronous, so CUDA graphs can capture
it.
"""

from __future__ import annotations

import contextlib
import re
from types import ModuleType

import torch
from torch import Tensor

from ..config import RowSpec
from ..objective import TERMS, accumulation_dtype, statistics_of
from . import devices
from .compiled import MISSING, MODULE, add_gradients, add_outputs, row_params


class CudaBackend:
    """See :class:`caref_kernels.backends.Backend`."""

    name = "cuda"
    module: ModuleType | None = MODULE

    def unsupported(self, logits: Tensor, spec: RowSpec | None = None) -> str | None:
        """Requires a build with nvcc, logits on a CUDA device, and machine code or PTX for that device."""
        if self.module is None:
            return MISSING
        built = self.module.CUDA_ARCHITECTURES
        if not built:
            return "built without nvcc (put it on the path or set CUDA_HOME, and install again)"
        if logits.device.type != "cuda":
            if not devices.has_device():
                return "no CUDA device"
            return f"logits are on {logits.device}, this backend takes CUDA tensors"
        if torch.version.hip is not None:
            return f"{logits.device} is a ROCm device, and these kernels are built for CUDA"
        return missing_image(built, devices.capability(logits.device))

    def describe(self) -> str:
        return f"compiled for sm_{self.module.CUDA_ARCHITECTURES.replace(' ', ', sm_')}"

    def forward(self, logits: Tensor, targets: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
        params = row_params(self.module, logits, targets, spec)
        dtype, device = accumulation_dtype(logits.dtype), logits.device
        rows = params.outer_rows * params.inner_rows
        terms = torch.empty((rows, len(TERMS)), dtype=dtype, device=device)
        stats = torch.empty((rows, len(statistics_of(spec))), dtype=dtype, device=device)
        add_outputs(params, terms, stats)
        with self._guard(logits):
            # Memory for rows that several blocks share.  It may be freed before the kernels have run, because torch's
            # allocator reuses memory in the order of the stream.
            workspace = torch.empty(self.module.cuda_forward_workspace(params), dtype=torch.uint8, device=device)
            self.module.cuda_forward(params, self._stream(logits), workspace.data_ptr())
        return terms, stats

    def gradient(
        self, grad_terms: Tensor, logits: Tensor, targets: Tensor | None, stats: Tensor, spec: RowSpec, out: Tensor
    ) -> None:
        params = row_params(self.module, logits, targets, spec)
        add_gradients(params, grad_terms, stats, out)
        with self._guard(logits):
            self.module.cuda_backward(params, self._stream(logits))

    # The host emulation of the tests overrides the following two methods.

    def _guard(self, logits: Tensor) -> contextlib.AbstractContextManager:
        """Make the device of the logits current, because CUDA launches on the current device."""
        return torch.cuda.device_of(logits)

    def _stream(self, logits: Tensor) -> int:
        return torch.cuda.current_stream(logits.device).cuda_stream


def missing_image(built: str, capability: tuple[int, int]) -> str | None:
    """The reason why code for ``built`` ("80 90 120+PTX") does not run on a device of this capability, or ``None``.

    Machine code runs on its own and on later minor versions; the driver compiles PTX for any later version.
    """
    major, minor = capability
    for architecture in built.split():
        number, _, ptx = architecture.partition("+")
        digits = int(re.match(r"\d+", number).group())
        exact = not number.isdigit()  # 90a runs on one version only, 100f on one family only
        if (digits // 10, digits % 10) == capability or (digits // 10 == major and digits % 10 <= minor and not exact):
            return None
        if ptx and digits <= 10 * major + minor and not exact:
            return None
    return f"no image for sm_{major}{minor} (built for sm_{built.replace(' ', ', sm_')})"
