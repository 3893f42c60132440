"""The shapes that are measured, each named after the model whose loss has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from caref_kernels.testing import Case as Tensors
from caref_kernels.testing import make_case

# Real rows have a standard deviation of 3.2.
REGIME = "normal_3"
# Drawing them takes the host a second for every 10 million columns.
DRAWN_ROWS = 64


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

    def tensors(self, device: torch.device | str = "cpu") -> Tensors:
        """Seeded logits and labels; on a GPU only the first rows are drawn, and repeated."""
        if torch.device(device).type == "cpu":
            return make_case(REGIME, self.rows, self.vocab, self.dtype)
        few = make_case(REGIME, min(self.rows, DRAWN_ROWS), self.vocab, self.dtype)
        repeats = -(-self.rows // DRAWN_ROWS)
        logits = few.logits.to(device).repeat(repeats, 1)[: self.rows].contiguous()
        return Tensors(logits, few.labels.to(device).repeat(repeats)[: self.rows].contiguous())


CASES = (
    Case("flan-t5", 256, 32_128, must_hold=True),
    Case("llama-3", 64, 128_256, must_hold=True),
    # The two above stay just below the 32 MiB from which glibc maps and unmaps every temporary; this one is beyond.
    Case("smollm2", 256, 49_152),
    Case("flan-t5-bf16", 256, 32_128, torch.bfloat16),
    Case("llama-3-bf16", 64, 128_256, torch.bfloat16),
    # The same number of logits at the widest vocabulary, and fewer rows of T5's: for the plots against V and N.
    Case("gemma", 32, 262_144),
    Case("flan-t5-16-rows", 16, 32_128),
    Case("flan-t5-64-rows", 64, 32_128),
)

# On a GPU.  Limits and goals are stated for llama-3; few-rows is the last micro-batch of a long generation.
GPU_CASES = (
    Case("llama-3", 4096, 128_256, torch.bfloat16, must_hold=True),
    Case("flan-t5", 1024, 32_128, torch.bfloat16),
    Case("smollm2", 4096, 49_152, torch.bfloat16),
    Case("qwen", 4096, 151_936, torch.bfloat16),
    Case("gemma", 4096, 262_144, torch.bfloat16),
    Case("few-rows", 8, 262_144, torch.bfloat16),
    Case("llama-3-fp32", 4096, 128_256),
    Case("flan-t5-fp32", 1024, 32_128),
    # For the plot against N.
    Case("llama-3-8-rows", 8, 128_256, torch.bfloat16),
    Case("llama-3-64-rows", 64, 128_256, torch.bfloat16),
    Case("llama-3-512-rows", 512, 128_256, torch.bfloat16),
    Case("llama-3-16384-rows", 16_384, 128_256, torch.bfloat16),
)


def shape_of(title: str) -> tuple[int, int, str]:
    """(rows, vocab, dtype) of a case from its title, which results keep.

    Raises:
        ValueError: not the title of a case.
    """
    match = re.match(r"[^:]+: (\d+) x (\d+), (\w+), ", title)
    if match is None:
        raise ValueError(f"the title of a case must be like 'name: 8 x 100, float32, 1 MiB'; got {title!r}")
    return int(match[1]), int(match[2]), match[3]


def by_name(names: list[str], cases: tuple[Case, ...] = CASES) -> tuple[Case, ...]:
    """Those of ``cases`` that are called ``names``, all of them for an empty list.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = {case.name: case for case in cases}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"cases must be among {', '.join(known)}; got {', '.join(unknown)}")
    return tuple(known[name] for name in names) or cases
