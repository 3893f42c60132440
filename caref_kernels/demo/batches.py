"""Examples as token batches of a causal language model, with the rows that carry a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..harness import BECAUSE, EXPLANATION, LABEL, Encoded, Encoder, Example, check_tokens

__all__ = [
    "BECAUSE",
    "EXPLANATION",
    "LABEL",
    "Batch",
    "Encoded",
    "check_tokens",
    "collate",
    "encode",
    "left_padded_prompts",
]


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens, padded on the right, and their R target rows.

    A row is the position in front of a target token: its logits predict that token.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    sequence: Tensor  # (R,) int64, which of the B
    position: Tensor  # (R,) int64, which of the T
    labels: Tensor  # (R,) int64
    parts: Tensor  # (R,) int64


def encode(dataset: str, example: Example, tokenizer) -> Encoded:
    """The tokens of ``example`` for a causal model.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    return Encoder(dataset, tokenizer, causal=True)(example)


def collate(items: Sequence[Encoded]) -> Batch:
    """The examples as one batch, padded on the right with token 0, which the mask hides."""
    width = max(len(item.prompt) + len(item.target) for item in items)
    input_ids = torch.zeros(len(items), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows = []
    for number, item in enumerate(items):
        tokens = item.prompt + item.target
        input_ids[number, : len(tokens)] = torch.tensor(tokens)
        attention_mask[number, : len(tokens)] = 1
        first = len(item.prompt) - 1
        rows += [(number, first + i, token, item.parts[i]) for i, token in enumerate(item.target)]
    return Batch(input_ids, attention_mask, *torch.tensor(rows).T.contiguous())


def left_padded_prompts(items: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """The prompts (B, T) padded on the left for generation, and their mask."""
    width = max(len(item.prompt) for item in items)
    input_ids = torch.zeros(len(items), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for number, item in enumerate(items):
        input_ids[number, width - len(item.prompt) :] = torch.tensor(item.prompt)
        attention_mask[number, width - len(item.prompt) :] = 1
    return input_ids, attention_mask
