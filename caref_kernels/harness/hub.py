"""Hub copies of the datasets, for those who have a network: the same records as from the official files.

Only plain data are read; repositories that need a script are not here.  Their row order must be the official one for
FEB's splits to come out; the hash of a split tells.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from .data import DATASETS, Example
from .reading import Record


class _Copy(NamedTuple):
    repository: str
    convert: Callable[[Record, str], Example]


def load_hub(dataset: str, split: str, version: str) -> list[Example]:
    """All examples of a split, in the hub's order; arguments as for :func:`caref_kernels.harness.load`.

    Raises:
        ValueError: there is no copy, or a record is not as expected (repository:number: field).
        ModuleNotFoundError: the library ``datasets`` is not installed.
        OSError: the hub does not answer.
    """
    if dataset not in _COPIES:
        raise ValueError(f"{dataset} has no copy with explanations on the hub; use the official files")
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError("hub data need the library datasets; run: pip install datasets") from None
    copy = _COPIES[dataset]
    options = {"name": version} if dataset == "cos_e" else {}
    rows = datasets.load_dataset(copy.repository, split={"dev": "validation"}.get(split, split), **options)
    place = Path(copy.repository)
    return [copy.convert(Record(place, number, dict(row)), split) for number, row in enumerate(rows, 1)]


def _cos_e(record: Record, split: str) -> Example:
    names = ("id", "question", "answer", "abstractive_explanation")
    return _question(record, names, tuple(record.items("choices")), split)


def _ecqa(record: Record, split: str) -> Example:
    choices = tuple(record.text(f"q_op{number}") for number in range(1, 6))
    example = _question(record, ("q_no", "q_text", "q_ans", "taskA_pos"), choices, split)
    # One property a line there; FEB's rule makes sentences of them.
    lines = [line.strip() for line in example.explanations[0].splitlines() if line.strip()]
    text = (". ".join(lines) + ".").replace("..", ".")
    return Example(example.uid, example.inputs, choices, example.label, example.label_text, (text,), split)


def _question(record: Record, names: tuple[str, str, str, str], choices: tuple[str, ...], split: str) -> Example:
    uid, question, answer, reason = names
    label = record.index_in(answer, choices)
    return Example(
        record.text(uid), (record.text(question),), choices, label, choices[label], (record.text(reason),), split
    )


def _esnli(record: Record, split: str) -> Example:
    labels = DATASETS["esnli"].labels
    label = record.fields.get("label")
    if type(label) is not int or not 0 <= label < len(labels):
        raise record.fail("label", f"expected 0, 1 or 2; got {label!r}")
    more = (record.fields.get(f"explanation_{number}") or "" for number in (2, 3))
    texts = (record.text("explanation_1"), *(text.strip() for text in more if text.strip()))
    sentences = record.text("premise"), record.text("hypothesis")
    return Example(f"{split}:{record.line}", sentences, labels, label, labels[label], texts, split)


_COPIES = MappingProxyType(
    {
        "cos_e": _Copy("Salesforce/cos_e", _cos_e),
        "ecqa": _Copy("tasksource/ecqa", _ecqa),
        "esnli": _Copy("pwei07/esnli", _esnli),
    }
)
