"""What a model makes of the held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import caref_loss
from ..harness import is_parsable
from .batches import EXPLANATION, LABEL, Encoded, collate
from .student import Student


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out examples: NLL and entropy in nats per token, terms per target row."""

    parsable: int
    generated: int
    label_nll: float
    explanation_nll: float
    answer_entropy: float
    ce: float
    sced: float
    kl: float
    answers: tuple[str, ...]


@torch.no_grad()
def evaluate(
    student: Student, items: Sequence[Encoded], batch_size: int, generated: int, after_batch: Callable[[], None]
) -> Evaluation:
    """Score ``items`` and let the model answer the first ``generated`` of them, 24 tokens each.

    ``after_batch`` is called after every batch of ``batch_size`` and after the generation.
    """
    student.model.eval()
    terms, entropies, parts = [], [], []
    for start in range(0, len(items), batch_size):
        batch = collate(items[start : start + batch_size])
        output = caref_loss(student.rows(batch), batch.labels, reduction="none", return_terms=True)
        terms.append(torch.stack([output.ce, output.sced, output.kl], -1))
        entropies.append(output.entropy)
        parts.append(batch.parts)
        after_batch()
    asked = items[:generated]
    answers = student.answers(asked, 24)
    after_batch()
    all_terms, entropy, part = torch.cat(terms).double(), torch.cat(entropies).double(), torch.cat(parts)
    ce, sced, kl = all_terms.mean(0).tolist()
    return Evaluation(
        parsable=sum(is_parsable(text, item.example.choices) for text, item in zip(answers, asked, strict=True)),
        generated=len(asked),
        label_nll=all_terms[part == LABEL, 0].mean().item(),
        explanation_nll=all_terms[part == EXPLANATION, 0].mean().item(),
        answer_entropy=entropy[part == LABEL].mean().item(),
        ce=ce,
        sced=sced,
        kl=kl,
        answers=tuple(answers),
    )


@torch.no_grad()
def sample_rows(student: Student, items: Sequence[Encoded], count: int) -> tuple[Tensor, Tensor]:
    """Logits (R, V) and labels (R,) of the first ``count`` target rows, or of all if there are fewer."""
    logits, labels = [], []
    for item in items:
        batch = collate([item])
        logits.append(student.rows(batch))
        labels.append(batch.labels)
        if sum(map(len, labels)) >= count:
            break
    return torch.cat(logits)[:count].clone(), torch.cat(labels)[:count].clone()
