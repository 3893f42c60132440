"""The four datasets of the paper, read from their official files into one record.

COS-E (with the CommonsenseQA files it refers to), ECQA, ComVE and e-SNLI.  No download and no dataset script: plain
JSONL and CSV through :mod:`.reading`, whose errors name file, line and field.

The package carries examples in all four formats under ``examples``, written for this project: 48 + 24 in ComVE's, 9 + 6
in each of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from .reading import Record, by_key, read_csv, read_jsonl

SPLITS = ("train", "dev", "test")
COS_E_VERSIONS = ("v1.0", "v1.11")


@dataclass(frozen=True)
class Example:
    """One example with its human explanations.

    ``inputs`` holds the question, ComVE's two sentences, or e-SNLI's premise and hypothesis, in this order.  ``label``
    is a position in ``choices`` and ``label_text`` what a model is to write for it: for the question-answering sets
    the choice itself, for ComVE ``choice1`` or ``choice2``, whichever sentence makes NO sense.
    """

    uid: str
    inputs: tuple[str, ...]
    choices: tuple[str, ...]
    label: int
    label_text: str
    explanations: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Dataset:
    """A dataset: its reader and, where every example has the same ones, its labels."""

    read: Callable[[Path, str, str], list[Example]]
    splits: tuple[str, ...]
    labels: tuple[str, ...] = ()


def load(dataset: str, folder: str | Path, split: str, *, version: str = COS_E_VERSIONS[0]) -> list[Example]:
    """All examples of a split, in file order.

    Args:
        dataset: a key of ``DATASETS``.
        folder: the dataset's own folder, or one that holds it under the name of the dataset.
        split: ``"train"``, ``"dev"`` (what the dataset may call validation), or ``"test"`` where it has explanations.
        version: of COS-E, ``"v1.0"`` (three choices; what FEB used) or ``"v1.11"`` (five); the others ignore it.
    Raises:
        FileNotFoundError: a file is not there; the message lists the places that were tried.
        ValueError: an unknown dataset, split or version; or a line of a file that cannot be read (file:line: field).
    """
    check_dataset(dataset)
    if split not in DATASETS[dataset].splits:
        raise ValueError(f"split must be one of {', '.join(DATASETS[dataset].splits)} for {dataset}; got {split!r}")
    if version not in COS_E_VERSIONS:
        raise ValueError(f"version must be one of {', '.join(COS_E_VERSIONS)}; got {version!r}")
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    return DATASETS[dataset].read(root, split, version)


def check_dataset(dataset: str) -> None:
    """Return if ``dataset`` is a key of ``DATASETS``.

    Raises:
        ValueError: otherwise.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {dataset!r}")


def embedded_examples(split: str) -> list[Example]:
    """The package's own ComVE-form examples, 48 for ``"train"`` and 24 for ``"dev"``.

    Raises:
        ValueError: another split.
        FileNotFoundError: the package was installed without its data files.
    """
    if split not in ("train", "dev"):
        raise ValueError(f"split must be one of train, dev; got {split!r}")
    return load("comve", Path(__file__).with_name("examples"), split)


def _find(root: Path, dataset: str, *names: str) -> Path:
    """The first of ``names`` that is a file under the dataset's folder or, for shared files, beside it."""
    places = [base / name for base in (root / dataset, root) for name in names]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"{dataset}: no such file: {', '.join(map(str, places))}")


def _read_cos_e(root: Path, split: str, version: str) -> list[Example]:
    name = f"cose_{split}_{version}"
    raw = f"{name}.jsonl", f"{name}_processed.jsonl"
    file = _find(root, "cos_e", *(f"{folder}{item}" for folder in (f"{version}/", "") for item in raw))
    questions = by_key(read_jsonl(_find_commonsense_qa(root, "cos_e", split, version)), "id")
    examples = []
    for uid, record in by_key(read_jsonl(file), "id").items():
        if uid not in questions:
            raise record.fail("id", f"{uid!r} is not in CommonsenseQA {version}, split {split}")
        explanation = record.text("explanation.open-ended")
        examples.append(_question_example(uid, questions[uid], explanation, split))
    return examples


def _find_commonsense_qa(root: Path, dataset: str, split: str, version: str) -> Path:
    file = f"{split}_rand_split.jsonl"
    shared = f"commonsenseqa_{version}/{file}"
    own = (f"{version}/{file}", f"cqa/{file}")
    # The last place is right only for a folder that holds a single version.
    return _find(root, dataset, *own, shared, f"../{shared}", f"../../{shared}", file)


def _question_example(uid: str, question: Record, explanation: str, split: str) -> Example:
    """A question of CommonsenseQA with an explanation."""
    letters, texts = [], []
    for choice in question.items("question.choices"):
        item = Record(question.path, question.line, {"question": {"choices": choice}})
        letters.append(item.text("question.choices.label"))
        texts.append(item.text("question.choices.text"))
    label = question.index_in("answerKey", tuple(letters))
    stem = question.text("question.stem")
    return Example(uid, (stem,), tuple(texts), label, texts[label], (explanation,), split)


def _read_ecqa(root: Path, split: str, version: str) -> list[Example]:  # noqa: ARG001 - one signature for all readers
    own_name = {"train": "train", "dev": "validation", "test": "test"}[split]
    try:
        prepared = _find(root, "ecqa", f"ecqa_{own_name}.jsonl")
    except FileNotFoundError:
        return _join_ecqa(root, split)
    return [_prepared_ecqa(record, split) for record in _unique_ids(read_jsonl(prepared))]


def _unique_ids(records) -> list[Record]:
    """All records; an ``id`` may be missing (FEB's own preprocessing writes none) but not repeated."""
    records = list(records)
    by_key((record for record in records if "id" in record.fields), "id")
    return records


def _prepared_ecqa(record: Record, split: str) -> Example:
    """One line of FEB's preprocessed layout, ``{id, question, answer, choices, explanation}``."""
    uid = record.text("id") if "id" in record.fields else f"{split}:{record.line}"
    choices = tuple(choice.strip() if isinstance(choice, str) else "" for choice in record.items("choices"))
    if not all(choices):
        raise record.fail("choices", "expected non-empty strings")
    label = record.index_in("answer", choices)
    explanation = record.text("explanation")
    return Example(uid, (record.text("question"),), choices, label, choices[label], (explanation,), split)


def _join_ecqa(root: Path, split: str) -> list[Example]:
    """The official distribution: ``ecqa.jsonl``, the authors' lists of ids, and CommonsenseQA v1.11."""
    annotations = by_key(read_jsonl(_find(root, "ecqa", "ecqa.jsonl")), "id")
    questions: dict[str, Record] = {}
    for part in ("train", "dev"):
        questions |= by_key(read_jsonl(_find_commonsense_qa(root, "ecqa", part, "v1.11")), "id")
    own_name = {"train": "train", "dev": "val", "test": "test"}[split]
    ids = by_key(read_csv(_find(root, "ecqa", f"author_split/{own_name}_ids.txt"), ("id",)), "id")
    examples = []
    for uid, record in ids.items():
        if uid not in annotations or uid not in questions:
            raise record.fail("id", f"{uid!r} is not in {'ecqa.jsonl' if uid in questions else 'CommonsenseQA v1.11'}")
        positives = annotations[uid].items("positives")
        if not all(isinstance(text, str) and text.strip() for text in positives):
            raise annotations[uid].fail("positives", "expected non-empty strings")
        # FEB's rule: only the positive properties, as sentences.
        explanation = (". ".join(text.strip() for text in positives) + ".").replace("..", ".")
        examples.append(_question_example(uid, questions[uid], explanation, split))
    return examples


_COMVE_LABELS = ("choice1", "choice2")
_COMVE_FILES = {
    "train": (("Training_Data", "Training  Data", "Training Data"), "data_all", "answers_all"),
    "dev": (("Dev_Data", "Dev Data"), "dev_data", "gold_answers"),
    "test": (("Test_Data", "Test Data"), "test_data", "gold_answers"),
}


def _read_comve(root: Path, split: str, version: str) -> list[Example]:  # noqa: ARG001
    folders, data, answers = _COMVE_FILES[split]

    def find(name: str) -> Path:
        return _find(root, "comve", *(f"{folder}/{name}.csv" for folder in folders))

    pairs = by_key(read_csv(find(f"subtaskA_{data}")), "id")
    labels = by_key(read_csv(find(f"subtaskA_{answers}"), ("id", "label")), "id")
    reasons = by_key(read_csv(find(f"subtaskC_{answers}"), ("id", "r1", "r2", "r3")), "id")
    _require_same_ids(pairs, labels)
    _require_same_ids(pairs, reasons)
    examples = []
    for uid, pair in pairs.items():
        # 0 or 1: the sentence that makes no sense, not the sensible one.
        label = labels[uid].index_in("label", ("0", "1"))
        texts = tuple(reasons[uid].text(f"r{number}") for number in (1, 2, 3))
        sentences = pair.text("sent0"), pair.text("sent1")
        examples.append(Example(uid, sentences, _COMVE_LABELS, label, _COMVE_LABELS[label], texts, split))
    return examples


def _require_same_ids(first: dict[str, Record], second: dict[str, Record]) -> None:
    for here, there in ((first, second), (second, first)):
        for uid, record in here.items():
            if uid not in there:
                other = next(iter(there.values())).path
                raise record.fail("id", f"{uid!r} is not in {other}")


# The order of the hub's label numbers; other copies of e-SNLI number them differently, so only names are read.
_ESNLI_LABELS = ("entailment", "neutral", "contradiction")
_ESNLI_FILES = {
    "train": (("esnli_train_1.csv", "esnli_train_2.csv"), ("esnli_train.csv",), ("esnli_train_subset.csv",)),
    "dev": (("esnli_dev.csv",), ("esnli_dev_subset.csv",)),
    "test": (("esnli_test.csv",), ("esnli_test_subset.csv",)),
}


def _read_esnli(root: Path, split: str, version: str) -> list[Example]:  # noqa: ARG001
    records = chain.from_iterable(map(read_csv, _esnli_files(root, _ESNLI_FILES[split])))
    return [_esnli_example(record, split) for record in by_key(records, "pairID").values()]


def _esnli_files(root: Path, groups: Sequence[tuple[str, ...]]) -> list[Path]:
    """The official training set is two files, and one of them alone would be a silently shorter set."""
    for group in groups:
        try:
            first = _find(root, "esnli", group[0])
        except FileNotFoundError:
            continue
        return [first, *(_find(root, "esnli", name) for name in group[1:])]
    names = [group[0] for group in groups]
    return [_find(root, "esnli", *names)]


def _esnli_example(record: Record, split: str) -> Example:
    label = record.index_in("gold_label", _ESNLI_LABELS)
    explanations = [record.text("Explanation_1")]
    for name in ("Explanation_2", "Explanation_3"):
        if record.fields.get(name, "").strip():
            explanations.append(record.text(name))
    sentences = record.text("Sentence1"), record.text("Sentence2")
    return Example(
        record.text("pairID"), sentences, _ESNLI_LABELS, label, _ESNLI_LABELS[label], tuple(explanations), split
    )


DATASETS = MappingProxyType(
    {
        "cos_e": Dataset(_read_cos_e, ("train", "dev")),
        "ecqa": Dataset(_read_ecqa, SPLITS),
        "comve": Dataset(_read_comve, SPLITS, _COMVE_LABELS),
        "esnli": Dataset(_read_esnli, SPLITS, _ESNLI_LABELS),
    }
)
