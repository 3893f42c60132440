"""The shapes that are measured, each named after the model whose loss or head has it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from caref_kernels.testing import Case as Tensors
from caref_kernels.testing import make_case

# Real rows have a standard deviation of 3.2.
LOGITS = "normal_3"
SIGMA = 3.2
# The host draws 10 million columns per second, so a GPU case repeats its first rows.
DRAWN_ROWS = 64


@dataclass(frozen=True)
class Case:
    """Logits (rows, vocab) of one dtype, a label in every row; ``main`` marks the cases that the documents show."""

    name: str
    rows: int
    vocab: int
    dtype: torch.dtype = torch.float32
    main: bool = False

    @property
    def logits_bytes(self) -> int:
        """Bytes of one copy of the logits."""
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def title(self) -> str:
        """For tables: name, shape, dtype and size."""
        return f"{self.name}: {self.rows} x {self.vocab}, {_name(self.dtype)}, {self.logits_bytes / 2**20:.0f} MiB"

    def tensors(self, device: torch.device | str = "cpu") -> Tensors:
        """Seeded logits and labels; on a GPU only the first rows are drawn, and repeated."""
        if torch.device(device).type == "cpu":
            return make_case(LOGITS, self.rows, self.vocab, self.dtype)
        few = make_case(LOGITS, min(self.rows, DRAWN_ROWS), self.vocab, self.dtype)
        repeats = -(-self.rows // DRAWN_ROWS)
        logits = few.logits.to(device).repeat(repeats, 1)[: self.rows].contiguous()
        return Tensors(logits, few.labels.to(device).repeat(repeats)[: self.rows].contiguous())


@dataclass(frozen=True)
class HeadCase:
    """hidden (rows, features) and weight (vocab, features) of one dtype; every row has a label."""

    name: str
    rows: int
    vocab: int
    features: int
    dtype: torch.dtype = torch.float32
    frozen: bool = False
    main: bool = False

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits, if they were materialised."""
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def title(self) -> str:
        """For tables: name, shape, dtype, what is trained, and the size of the logits."""
        trained = "frozen head" if self.frozen else "trained head"
        return (
            f"{self.name}: {self.rows} x {self.vocab}, D = {self.features}, {_name(self.dtype)}, {trained}, "
            f"logits {self.logits_bytes / 2**20:.0f} MiB"
        )

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Seeded leaves hidden and weight, and labels."""
        made = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        weight = torch.randn(self.vocab, self.features, **made) * (SIGMA / self.features**0.5)
        hidden = torch.randn(self.rows, self.features, **made)
        labels = torch.randint(self.vocab, (self.rows,), **made)
        return hidden.to(self.dtype).requires_grad_(), weight.to(self.dtype).requires_grad_(not self.frozen), labels


CASES = (
    Case("flan-t5", 256, 32_128, main=True),
    Case("llama-3", 64, 128_256, main=True),
    # The two above stay just below the 32 MiB from which glibc maps and unmaps every temporary; this one is beyond.
    Case("smollm2", 256, 49_152),
    Case("flan-t5-bf16", 256, 32_128, torch.bfloat16),
    Case("llama-3-bf16", 64, 128_256, torch.bfloat16),
    # The same number of logits at the widest vocabulary, and fewer rows of T5's: for the plot against V and N.
    Case("gemma", 32, 262_144),
    Case("flan-t5-16-rows", 16, 32_128),
    Case("flan-t5-64-rows", 64, 32_128),
)

SPARSE_CASES = tuple(
    Case(f"{name}{suffix}", rows, vocab, dtype)
    for name, rows, vocab in (("flan-t5", 256, 32_128), ("llama-3", 64, 128_256), ("widest", 32, 262_144))
    for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16))
)

HEAD_CASES = (
    HeadCase("narrow", 4096, 32_128, 256, main=True),
    HeadCase("narrow-frozen", 4096, 32_128, 256, frozen=True),
    HeadCase("flan-t5-large", 1024, 32_128, 1024),
    HeadCase("flan-t5-large-frozen", 1024, 32_128, 1024, frozen=True),
    # The widest vocabularies, with the rows that a CPU gets through in seconds.
    HeadCase("llama-3.2-1b", 256, 128_256, 2048),
    HeadCase("gemma-3-270m", 256, 262_144, 640),
)

# few-rows is the last micro-batch of a long generation.
GPU_CASES = (
    Case("llama-3", 4096, 128_256, torch.bfloat16, main=True),
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

HEAD_GPU_CASES = (
    HeadCase("llama-3", 4096, 128_256, 4096, torch.bfloat16, main=True),
    HeadCase("llama-3-frozen", 4096, 128_256, 4096, torch.bfloat16, frozen=True),
    HeadCase("flan-t5-large", 1024, 32_128, 1024, torch.bfloat16),
    HeadCase("smollm2", 8192, 49_152, 576, torch.bfloat16),
    HeadCase("qwen", 4096, 151_936, 2048, torch.bfloat16),
    HeadCase("gemma", 4096, 262_144, 2304, torch.bfloat16),
)

_ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def shape_of(title: str) -> tuple[int, int, str]:
    """(rows, vocab, dtype) of the logits of a case, from its title.

    Raises:
        ValueError: not the title of a case.
    """
    match = re.match(r"[^:]+: (\d+) x (\d+), (?:D = \d+, )?(\w+), ", title)
    if match is None:
        raise ValueError(f"the title of a case must be like 'name: 8 x 100, float32, 1 MiB'; got {title!r}")
    return int(match[1]), int(match[2]), match[3]


def logits_bytes(title: str) -> int:
    """Bytes of one copy of the logits of the case with this title."""
    rows, vocab, dtype = shape_of(title)
    return rows * vocab * _ITEMSIZE[dtype]


Named = TypeVar("Named")


def by_name(names: list[str], cases: tuple[Named, ...]) -> tuple[Named, ...]:
    """The cases that are called ``names``, all of them for an empty list.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = {case.name: case for case in cases}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"cases must be among {', '.join(known)}; got {', '.join(unknown)}")
    return tuple(known[name] for name in names) or cases


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
