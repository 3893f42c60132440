"""What a model's answers and its probabilities are worth.

Accuracy and nBERT are FEB's (allenai/feb scripts/metrics.py).  The calibration figures are extensions of this harness;
the paper has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .data import Example
from .formats import is_parsable, parse_answer

if TYPE_CHECKING:
    from torch import Tensor

    from .scorers import BertScorer

ECE_BINS = 15


def score_answers(answers: Sequence[str], examples: Sequence[Example], scorer: BertScorer | None) -> dict[str, Any]:
    """FEB's figures of generated answers, in percent of all examples, never of the parsable ones.

    ``nbert`` is the mean over examples of the best BERTScore over the references, 0 where the label is wrong; it is
    ``None`` without a scorer.  ``broken`` counts answers without a separator, ``unparsable`` those that do not name one
    of the options and a reason.

    Raises:
        ValueError: there is no example, or not one answer for each.
    """
    if not examples or len(answers) != len(examples):
        raise ValueError(f"answers must be one for each of at least 1 example; got {len(answers)} for {len(examples)}")
    parsed = [parse_answer(answer.strip()) for answer in answers]
    gold = [_label(example.label_text) for example in examples]
    right = [_label(one.label) == label for one, label in zip(parsed, gold, strict=True)]
    robust = [parse_answer(answer, "robust").label for answer in answers]
    metrics: dict[str, Any] = {
        "accuracy": _percent(right),
        "accuracy_robust": _percent([_label(one) == label for one, label in zip(robust, gold, strict=True)]),
        "broken": sum(one.broken for one in parsed),
        "unparsable": sum(not is_parsable(a, e.choices) for a, e in zip(answers, examples, strict=True)),
        "nbert": None,
        "bertscore": None,
        "bertscore_correct": None,
    }
    if scorer is not None:
        scores = scorer([one.explanation for one in parsed], [example.explanations for example in examples])
        correct = [score for score, is_right in zip(scores, right, strict=True) if is_right]
        metrics["nbert"] = sum(correct) / len(scores)
        metrics["bertscore"] = sum(scores) / len(scores)
        metrics["bertscore_correct"] = sum(correct) / len(correct) if correct else None
    return metrics


def calibration(log_likelihoods: Tensor, labels: Tensor) -> dict[str, float]:
    """How well the probabilities of the options agree with what is right.

    Args:
        log_likelihoods: (N, C), of ``label because`` for every option, in nats; -inf for options that an example lacks.
        labels: (N,), the right option.
    Returns:
        ``choice_accuracy``, ``confidence`` and ``ece`` (15 bins of equal width) in percent, ``brier`` (summed over
        the options, in [0, 2]), ``nll`` in nats.  Ties go to the first option.
    """
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    log_probs = log_likelihoods.double().log_softmax(-1)
    probabilities = log_probs.exp()
    target = torch.zeros_like(probabilities).scatter_(1, labels.unsqueeze(1), 1.0)
    confidence, choice = probabilities.max(-1)
    ece = multiclass_calibration_error(probabilities, labels, num_classes=log_probs.size(1), n_bins=ECE_BINS, norm="l1")
    return {
        "choice_accuracy": 100 * (choice == labels).double().mean().item(),
        "confidence": 100 * confidence.mean().item(),
        "ece": 100 * float(ece),
        "brier": (probabilities - target).square().sum(-1).mean().item(),
        "nll": -log_probs.gather(1, labels.unsqueeze(1)).mean().item(),
    }


def _label(text: str) -> str:
    return " ".join(text.lower().split())


def _percent(flags: Sequence[bool]) -> float:
    return 100 * sum(flags) / len(flags)
