"""Examples as tokens, for encoder-decoder models and for causal ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .data import Example
from .formats import SEPARATOR, source_text, target_text

# What part of the target a token belongs to.
LABEL, BECAUSE, EXPLANATION = range(3)
# Ends the prompt of a causal model.
PROMPT_END = "\nanswer:"


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: a prompt, then ``label because explanation`` and the end token."""

    example: Example
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    parts: tuple[int, ...]  # LABEL, BECAUSE or EXPLANATION for every token of the target


@dataclass(frozen=True)
class Encoder:
    """How examples of a dataset become tokens of a model.

    Prompt and target are tokenised apart, so that no token spans the border.  A causal model's prompt ends with
    ``PROMPT_END`` and its target starts with a blank.

    Args:
        dataset: a key of ``DATASETS``.
        tokenizer: of the model.
        causal: whether the model is decoder-only.
        newline, end: as :func:`caref_kernels.harness.source_text` takes them.
        max_source, max_target: longest prompt and target in tokens, the end tokens included; ``None`` for no limit.
    Raises:
        ValueError: the tokenizer has no end token.
    """

    dataset: str
    tokenizer: Any
    causal: bool
    newline: str = "\\n"
    end: str = ""
    max_source: int | None = None
    max_target: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {type(self.tokenizer).__name__} has no end-of-sequence token")

    def __call__(self, example: Example, explanation: int = 0) -> Encoded:
        """The tokens of ``example`` with that one of its explanations."""
        target = self._blank + target_text(self.dataset, example, explanation)
        tokens, parts = self._parts(target, len(self._blank) + len(" ".join(example.label_text.split())))
        if self.max_target is not None:
            tokens, parts = tokens[: self.max_target - 1], parts[: self.max_target - 1]
        eos = self.tokenizer.eos_token_id
        return Encoded(example, self.prompt(example), (*tokens, eos), (*parts, EXPLANATION))

    def prompt(self, example: Example) -> tuple[int, ...]:
        """The tokens of the prompt."""
        text = source_text(self.dataset, example, newline=self.newline, end=self.end)
        tokens = tuple(self.tokenizer(text + (PROMPT_END if self.causal else ""))["input_ids"])
        if self.max_source is None or len(tokens) <= self.max_source:
            return tokens
        # The tail says what is asked for, or is the end token: the text in front of it is cut.
        tail = self._plain(PROMPT_END) if self.causal else (self.tokenizer.eos_token_id,)
        return tokens[: self.max_source - len(tail)] + tail

    def is_cut(self, example: Example, explanation: int = 0) -> bool:
        """Whether a limit cuts the prompt or the target of ``example``."""
        whole = Encoder(self.dataset, self.tokenizer, self.causal, self.newline, self.end)(example, explanation)
        limits = ((whole.prompt, self.max_source), (whole.target, self.max_target))
        return any(limit is not None and len(tokens) > limit for tokens, limit in limits)

    def candidates(self, example: Example) -> list[tuple[int, ...]]:
        """``label because`` of every choice of ``example``, as tokens."""
        choices = (" ".join(choice.lower().split()) for choice in example.choices)
        return [self._plain(self._blank + choice + SEPARATOR.rstrip()) for choice in choices]

    @property
    def _blank(self) -> str:
        return " " if self.causal else ""

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _parts(self, target: str, label_end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of ``target`` and the part that each of them begins in."""
        because_end = label_end + len(SEPARATOR.rstrip())
        if self.tokenizer.is_fast:
            encoding = self.tokenizer(target, add_special_tokens=False, return_offsets_mapping=True)
            starts = [start for start, _ in encoding["offset_mapping"]]
            tokens = tuple(encoding["input_ids"])
        else:
            # Without offsets a token begins where the text of the tokens before it ends.
            tokens = self._plain(target)
            starts = [len(self.tokenizer.decode(tokens[:count])) for count in range(len(tokens))]
        ends = ((LABEL, label_end), (BECAUSE, because_end))
        return tokens, tuple(next((part for part, end in ends if start < end), EXPLANATION) for start in starts)


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
