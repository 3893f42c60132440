"""The text forms of an example: FEB's prompts and targets, and the way back from a generated answer.

FEB (arXiv 2111.08284) chose one form for each dataset: UnifiedQA's for the question-answering sets and ComVE, a plain
one for e-SNLI.  The target is always ``label because explanation``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .data import Example, check_dataset

SEPARATOR = " because "
# What FEB puts for the explanation of an answer without the separator.
UNKNOWN = "UNK"
# UnifiedQA was trained with a backslash and an n between question and options, not with a line break.
LITERAL_NEWLINE = "\\n"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Answer(NamedTuple):
    """A generated answer taken apart; ``broken`` if it had no separator."""

    label: str
    explanation: str
    broken: bool


def source_text(dataset: str, example: Example, *, newline: str = LITERAL_NEWLINE, end: str = "") -> str:
    """The prompt of ``example``, white space collapsed.

    Args:
        dataset: a key of ``DATASETS``.
        newline: what stands between question and options in the UnifiedQA forms.
        end: appended to the UnifiedQA forms; FEB puts ``"</s>"`` there, so that its inputs end with two such tokens.
    Raises:
        ValueError: unknown dataset, or more options than letters.
    """
    check_dataset(dataset)
    first, *rest = example.inputs
    if dataset == "esnli":
        return _collapse(f"explain nli hypothesis: {rest[0]} premise: {first}")
    if dataset == "comve":
        body = f"what is more nonsensical? {newline} choice1: {first.lower()} choice2: {rest[0].lower()}"
    else:
        if len(example.choices) > len(_LETTERS):
            raise ValueError(f"choices must be at most {len(_LETTERS)}; got {len(example.choices)} in {example.uid}")
        options = (f"({letter}) {choice.lower()}" for letter, choice in zip(_LETTERS, example.choices, strict=False))
        body = f"{first.lower()} {newline} {' '.join(options)}"
    return _collapse(f"explain {body}{end}")


def target_text(dataset: str, example: Example, explanation: int = 0) -> str:
    """``label because explanation`` of ``example``, lower-cased and with white space collapsed.

    Args:
        dataset: a key of ``DATASETS``.
        explanation: which of the example's explanations.
    Raises:
        ValueError: unknown dataset.
        IndexError: there is no such explanation.
    """
    check_dataset(dataset)
    return _collapse(f"{example.label_text}{SEPARATOR}{example.explanations[explanation]}".lower())


def parse_answer(text: str, mode: Literal["faithful", "robust"] = "faithful") -> Answer:
    """Take a generated line apart at the separator.

    ``"faithful"`` does what FEB's metrics do: a second separator cuts the explanation off, and without one the whole
    line is the label.  ``"robust"`` collapses white space first and keeps everything after the first separator.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ("faithful", "robust"):
        raise ValueError(f"mode must be 'faithful' or 'robust'; got {mode!r}")
    if mode == "faithful":
        parts = text.split(SEPARATOR)
        return Answer(text, UNKNOWN, True) if len(parts) == 1 else Answer(parts[0].strip(), parts[1].strip(), False)
    line = _collapse(text)
    label, found, explanation = line.partition(SEPARATOR)
    return Answer(label, explanation, False) if found else Answer(line, UNKNOWN, True)


def is_parsable(text: str, choices: Sequence[str]) -> bool:
    """Whether ``text`` is one of ``choices`` (compared without case and outer punctuation), because, and a reason."""
    answer = parse_answer(text, "robust")
    return not answer.broken and bool(answer.explanation) and _plain(answer.label) in {_plain(c) for c in choices}


def _plain(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", _collapse(text).lower())


def _collapse(text: str) -> str:
    return " ".join(text.split())
