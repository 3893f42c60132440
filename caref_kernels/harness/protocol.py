"""FEB's few-shot splits: 60 seeds, 48 examples of the official training set, about 350 of the development set.

FEB (arXiv 2111.08284, code allenai/feb) samples with whatever its data library does: pandas for ComVE, Hugging Face
datasets for e-SNLI and COS-E, ``random`` for ECQA.  All three come down to numpy's and Python's generators, which are
replayed here without touching their global state.  FEB's own splits come out if the files hold FEB's rows in FEB's
order, that is, the complete official files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from .data import DATASETS, Example, check_dataset

if TYPE_CHECKING:
    import numpy as np

# allenai/feb scripts/feb_benchmark.py, in its order: a split is named by its position here.
SEEDS = (
    *(7004, 3639, 6290, 9428, 7056, 4864, 4273, 7632, 2689, 8219, 4523, 2175, 7356, 8975, 51, 4199, 4182, 1331, 2796),
    *(6341, 7009, 1111, 1967, 1319, 741, 7740, 1335, 9933, 6339, 3112, 1349, 8483, 2348, 834, 6895, 4823, 2913, 9962),
    *(178, 2147, 8160, 1936, 9991, 6924, 6595, 5358, 2638, 6227, 8384, 2769, 4512, 2051, 4779, 2498, 176, 9599, 1181),
    *(5320, 588, 4791),
)


class Sizes(NamedTuple):
    """How many examples a split has to train and to evaluate on."""

    train: int = 48
    dev: int = 350


class Shot(NamedTuple):
    """One example to train on, and which of its explanations is the target."""

    example: Example
    explanation: int


@dataclass(frozen=True)
class Split:
    """One few-shot split; ``hash`` is a sha256 over the content of its examples, in their order."""

    dataset: str
    seed: int
    train: tuple[Shot, ...]
    dev: tuple[Example, ...]
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        content = [[_content(shot.example), shot.explanation] for shot in self.train], [*map(_content, self.dev)]
        text = json.dumps([self.dataset, self.seed, *content], ensure_ascii=True)
        object.__setattr__(self, "hash", hashlib.sha256(text.encode()).hexdigest())


def feb_split(
    dataset: str, train: Sequence[Example], dev: Sequence[Example], seed: int, sizes: Sizes | None = None
) -> Split:
    """FEB's split of ``seed``.

    Args:
        dataset: a key of ``DATASETS``.
        train, dev: the official sets, complete and in file order.
        seed: one of ``SEEDS``, or any other number below 2**32.
        sizes: FEB's by default (for e-SNLI 350 is 116 of each label, 348 examples).
    Raises:
        ValueError: unknown dataset, sizes that leave a label without an example, or too few examples.
    """
    check_dataset(dataset)
    sizes = Sizes() if sizes is None else sizes
    labels = DATASETS[dataset].labels
    for name, size in sizes._asdict().items():
        if size < max(len(labels), 1):
            raise ValueError(f"{name} must be at least {max(len(labels), 1)} for {dataset}; got {size}")
    shots, chosen = _SAMPLERS[dataset](_Generators(seed), train, dev, sizes)
    return Split(dataset, seed, tuple(shots), tuple(chosen))


class _Generators:
    """What ``random.seed(seed)`` and ``np.random.seed(seed)`` start, without the global state."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._numpy = np
        self.legacy: np.random.RandomState = np.random.RandomState(seed)
        self.python = random.Random(seed)

    def pandas_sample(self, length: int, count: int) -> list[int]:
        """Rows of ``DataFrame.sample(n=count)``."""
        return self.legacy.choice(length, size=count, replace=False).tolist()

    def datasets_shuffle(self, length: int) -> list[int]:
        """Rows of ``datasets.Dataset.shuffle()`` without a seed: it takes one from numpy's state, and then a step."""
        _, state, position, *_ = self.legacy.get_state()
        seed = state[position] if position < len(state) else state[0]
        self.legacy.random_sample()
        return self._numpy.random.default_rng(seed).permutation(length).tolist()


def _comve(draw: _Generators, train: Sequence[Example], dev: Sequence[Example], sizes: Sizes):
    """Every training pair is a row for each of its three reasons; a label's rows are drawn from all of them."""
    shots: list[Shot] = []
    for label in range(2):
        part = [example for example in train if example.label == label]
        _require(part, sizes.train // 2, f"comve with label {label}")
        rows = draw.pandas_sample(3 * len(part), sizes.train // 2)
        shots += [Shot(part[row // 3], row % 3) for row in rows]
    chosen: list[Example] = []
    for label in range(2):
        part = [example for example in dev if example.label == label]
        _require(part, sizes.dev // 2, f"comve with label {label}")
        chosen += [part[row] for row in draw.pandas_sample(len(part), sizes.dev // 2)]
    return shots, chosen


def _esnli(draw: _Generators, train: Sequence[Example], dev: Sequence[Example], sizes: Sizes):
    taken = []
    for pool, count in ((train, sizes.train), (dev, sizes.dev)):
        chosen = []
        for label in range(3):
            part = [example for example in pool if example.label == label]
            _require(part, count // 3, f"esnli with label {label}")
            chosen += [part[i] for i in draw.datasets_shuffle(len(part))[: count // 3]]
        taken.append(chosen)
    return [Shot(example, 0) for example in taken[0]], taken[1]


def _cos_e(draw: _Generators, train: Sequence[Example], dev: Sequence[Example], sizes: Sizes):
    taken = []
    for pool, count in ((train, sizes.train), (dev, sizes.dev)):
        _require(pool, count, "cos_e")
        taken.append([pool[i] for i in draw.datasets_shuffle(len(pool))[:count]])
    return [Shot(example, 0) for example in taken[0]], taken[1]


def _ecqa(draw: _Generators, train: Sequence[Example], dev: Sequence[Example], sizes: Sizes):
    _require(train, sizes.train, "ecqa")
    _require(dev, sizes.dev, "ecqa")
    shots = [Shot(example, 0) for example in draw.python.sample(list(train), sizes.train)]
    return shots, draw.python.sample(list(dev), sizes.dev)


_SAMPLERS = MappingProxyType({"cos_e": _cos_e, "ecqa": _ecqa, "comve": _comve, "esnli": _esnli})


def _require(pool: Sequence, count: int, what: str) -> None:
    if len(pool) < count:
        raise ValueError(f"{what}: {count} examples are needed; got {len(pool)}")


def _content(example: Example) -> list:
    return [example.uid, example.inputs, example.choices, example.label, example.explanations]
