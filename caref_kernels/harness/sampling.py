"""Few-shot samples of a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .data import DATASETS, Example


def sample_shots(dataset: str, examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` different examples, in an order that depends on ``seed`` and on the order of ``examples`` alone.

    The datasets whose label means the same in every example (ComVE, e-SNLI) are sampled evenly over the labels; the
    question-answering sets are not, as in FEB.

    Raises:
        ValueError: unknown dataset; ``count`` is not positive or does not divide evenly over the labels; there are too
            few examples, of a label or at all (never silently fewer).
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {dataset!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    generator = random.Random(seed)
    labels = DATASETS[dataset].labels
    if not labels:
        return generator.sample(_at_least(examples, count, dataset), count)
    if count % len(labels):
        raise ValueError(f"count must be a multiple of the {len(labels)} labels of {dataset}; got {count}")
    share = count // len(labels)
    chosen = []
    for label, name in enumerate(labels):
        pool = [example for example in examples if example.label == label]
        chosen += generator.sample(_at_least(pool, share, f"{dataset} with label {name!r}"), share)
    generator.shuffle(chosen)
    return chosen


def _at_least(pool: Sequence[Example], count: int, what: str) -> Sequence[Example]:
    if len(pool) < count:
        raise ValueError(f"{what}: {count} examples are needed; got {len(pool)}")
    return pool
