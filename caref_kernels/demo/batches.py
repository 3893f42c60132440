"""Examples as token batches of a causal language model, with the rows that carry a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..harness import Example, source_text, target_text

# What part of the target a row predicts.
LABEL, BECAUSE, EXPLANATION = range(3)
PROMPT_END = "\nanswer:"


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: a prompt, then `` label because explanation`` and the end token."""

    example: Example
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    parts: tuple[int, ...]  # LABEL, BECAUSE or EXPLANATION for every token of the target


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
    """The tokens of ``example``.  Prompt and target are tokenised apart, so that no token spans the border.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no end-of-sequence token")
    target = " " + target_text(dataset, example)
    label_end = 1 + len(" ".join(example.label_text.split()))
    because_end = label_end + len(" because")
    encoding = tokenizer(target, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoding["offset_mapping"]]
    parts = [LABEL if start < label_end else BECAUSE if start < because_end else EXPLANATION for start in starts]
    return Encoded(
        example,
        tuple(tokenizer(source_text(dataset, example) + PROMPT_END)["input_ids"]),
        (*encoding["input_ids"], tokenizer.eos_token_id),
        (*parts, EXPLANATION),
    )


def check_tokens(items: Sequence[Encoded], vocabulary: int, max_length: int) -> None:
    """Return if a model of ``vocabulary`` embeddings and ``max_length`` positions can take every example.

    Raises:
        ValueError: otherwise, naming the example.
    """
    for item in items:
        largest, length = max(item.prompt + item.target), len(item.prompt) + len(item.target)
        if largest >= vocabulary:
            raise ValueError(
                f"example {item.example.uid}: token {largest} is not below the model's {vocabulary} embeddings; "
                "the tokenizer belongs to another model"
            )
        if length > max_length:
            raise ValueError(
                f"example {item.example.uid}: at most {max_length} tokens fit into the model; got {length}"
            )


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
