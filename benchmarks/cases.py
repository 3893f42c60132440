"""The shapes that are measured, each named after the model whose loss has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from caref_kernels.testing import Case as Tensors
from caref_kernels.testing import make_case

# Real rows have a standard deviation of 3.2.
REGIME = "normal_3"


@dataclass(frozen=True)
class Case:
    """Logits (rows, vocab) of one dtype, a label in every row; ``must_hold`` marks the cases of the stated targets."""

    name: str
    rows: int
    vocab: int
    dtype: torch.dtype = torch.float32
    must_hold: bool = False

    @property
    def logits_bytes(self) -> int:
        """Bytes of one copy of the logits."""
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def title(self) -> str:
        """For tables: name, shape, dtype and size."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {self.rows} x {self.vocab}, {dtype}, {self.logits_bytes / 2**20:.0f} MiB"

    def tensors(self) -> Tensors:
        """Seeded logits and labels."""
        return make_case(REGIME, self.rows, self.vocab, self.dtype)


CASES = (
    Case("flan-t5", 256, 32_128, must_hold=True),
    Case("llama-3", 64, 128_256, must_hold=True),
    # The two above stay just below the 32 MiB from which glibc maps and unmaps every temporary; this one is beyond.
    Case("smollm2", 256, 49_152),
    Case("flan-t5-bf16", 256, 32_128, torch.bfloat16),
    Case("llama-3-bf16", 64, 128_256, torch.bfloat16),
)


def by_name(names: list[str]) -> tuple[Case, ...]:
    """The cases called ``names``, all of them for an empty list.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"cases must be among {', '.join(known)}; got {', '.join(unknown)}")
    return tuple(known[name] for name in names) or CASES
