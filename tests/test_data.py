"""The dataset readers on small written files, the real files where they are, prompts, answers and samples."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from real_data import DATA, require_data

from caref_kernels.harness import (
    COS_E_VERSIONS,
    DATASETS,
    Example,
    embedded_examples,
    is_parsable,
    load,
    parse_answer,
    source_text,
    target_text,
)
from caref_kernels.harness.reading import MAX_LINE_BYTES

QUESTIONS = [
    {
        "id": f"q{number}",
        "answerKey": key,
        "question": {"stem": f"Question {number}?", "choices": [{"label": c, "text": f"Option {c}"} for c in "ABC"]},
    }
    for number, key in enumerate("BA")
]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_cos_e(root: Path, version: str = "v1.0") -> Path:
    explanations = [
        {"id": q["id"], "explanation": {"open-ended": f"Reason {q['id']}", "selected": ""}} for q in QUESTIONS
    ]
    write_lines(root / f"{version}/train_rand_split.jsonl", [json.dumps(q) for q in QUESTIONS])
    return write_lines(root / f"{version}/cose_train_{version}.jsonl", [json.dumps(e) for e in explanations])


def write_ecqa(root: Path) -> Path:
    lines = [
        {
            "id": f"e{n}",
            "question": "Where?",
            "answer": "here",
            "choices": ["there", "here"],
            "explanation": "So it is.",
        }
        for n in range(2)
    ]
    return write_lines(root / "ecqa_train.jsonl", [json.dumps(line) for line in lines])


def write_comve(root: Path, folder: str = "Training  Data") -> Path:
    write_lines(root / folder / "subtaskA_answers_all.csv", ["7,1", "8,0"])
    write_lines(root / folder / "subtaskC_answers_all.csv", ['7,"One, two",Three,Four', "8,Five,Six,Seven"])
    return write_lines(
        root / folder / "subtaskA_data_all.csv",
        ["id,sent0,sent1", '7,He ate rice.,"He ate, say, a car."', "8,Mad.,Sane."],
    )


def write_esnli(root: Path) -> Path:
    write_lines(
        root / "esnli_train_1.csv",
        [
            "pairID,gold_label,Sentence1,Sentence2,Explanation_1,Sentence1_marked_1",
            "a#1,neutral,P one.,H one.,Because,x",
        ],
    )
    return write_lines(
        root / "esnli_train_2.csv",
        [
            "pairID,gold_label,Sentence1,Sentence2,Explanation_1,Explanation_2",
            'b#1,contradiction,P2.,H2.,"Two\nlines",',
        ],
    )


WRITERS = {"cos_e": write_cos_e, "ecqa": write_ecqa, "comve": write_comve, "esnli": write_esnli}


@pytest.mark.parametrize("version", COS_E_VERSIONS)
def test_cos_e_joins_its_questions(tmp_path: Path, version: str) -> None:
    write_cos_e(tmp_path, version)
    first, second = load("cos_e", tmp_path, "train", version=version)
    other = next(name for name in COS_E_VERSIONS if name != version)
    with pytest.raises(FileNotFoundError, match=f"cos_e: no such file: .*cose_train_{other}"):
        load("cos_e", tmp_path, "train", version=other)
    assert first == Example(
        "q0", ("Question 0?",), ("Option A", "Option B", "Option C"), 1, "Option B", ("Reason q0",), "train"
    )
    assert second.label_text == "Option A"


def test_cos_e_names_a_missing_question(tmp_path: Path) -> None:
    write_cos_e(tmp_path)
    write_lines(tmp_path / "v1.0/train_rand_split.jsonl", [json.dumps(QUESTIONS[0])])
    with pytest.raises(ValueError, match=r"cose_train_v1\.0\.jsonl:2: id: 'q1' is not in CommonsenseQA v1\.0"):
        load("cos_e", tmp_path, "train")


def test_ecqa_reads_the_prepared_layout(tmp_path: Path) -> None:
    write_ecqa(tmp_path / "ecqa")
    first, _ = load("ecqa", tmp_path, "train")
    assert first == Example("e0", ("Where?",), ("there", "here"), 1, "here", ("So it is.",), "train")


def test_ecqa_joins_the_official_files_by_febs_rule(tmp_path: Path) -> None:
    write_lines(tmp_path / "author_split/val_ids.txt", ["q1"])
    annotations = [{"id": q["id"], "positives": ["One thing", "another."], "negatives": []} for q in QUESTIONS]
    write_lines(tmp_path / "ecqa.jsonl", [json.dumps(a) for a in annotations])
    for split, question in zip(("train", "dev"), QUESTIONS, strict=True):
        write_lines(tmp_path / f"cqa/{split}_rand_split.jsonl", [json.dumps(question)])
    (only,) = load("ecqa", tmp_path, "dev")
    assert (only.uid, only.label_text, only.explanations) == ("q1", "Option A", ("One thing. another.",))


@pytest.mark.parametrize("folder", ["Training  Data", "Training_Data"])
def test_comve_label_is_the_nonsensical_sentence(tmp_path: Path, folder: str) -> None:
    write_comve(tmp_path, folder)
    first, second = load("comve", tmp_path, "train")
    assert first.inputs[first.label] == "He ate, say, a car."
    assert (first.label_text, first.explanations) == ("choice2", ("One, two", "Three", "Four"))
    assert second.inputs[second.label] == "Mad."


def test_esnli_reads_both_training_files_and_names(tmp_path: Path) -> None:
    write_esnli(tmp_path)
    first, second = load("esnli", tmp_path, "train")
    assert (first.label, first.label_text, second.label, second.label_text) == (1, "neutral", 2, "contradiction")
    assert second.explanations == ("Two\nlines",)
    text = (tmp_path / "esnli_train_2.csv").read_text(encoding="utf-8")
    (tmp_path / "esnli_train_2.csv").write_text(text.replace("b#1", "a#1"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"esnli_train_2\.csv:3: pairID: 'a#1' occurs twice, first at \S*_1\.csv:2"):
        load("esnli", tmp_path, "train")
    (tmp_path / "esnli_train_2.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"esnli_train_2\.csv"):
        load("esnli", tmp_path, "train")


CORRUPTIONS = {
    "not JSON": ("ecqa", '{"id": "e2", ', r":1: line: not valid JSON"),
    "deep JSON": ("ecqa", "[" * 100_000, r":1: line: not valid JSON"),
    "not an object": ("ecqa", "[1, 2]", r":1: line: expected a JSON object; got \[1, 2\]"),
    "missing field": ("ecqa", '{"id": "e2", "question": "?"}', r":1: choices: missing"),
    "null field": ("ecqa", '{"choices": ["a"], "answer": null}', r":1: answer: expected a non-empty string; got None"),
    "choice of a wrong type": ("ecqa", '{"question": "?", "choices": [1]}', r":1: choices: expected non-empty strings"),
    "label out of set": (
        "ecqa",
        '{"question": "?", "choices": ["a"], "answer": "b", "explanation": "c"}',
        r":1: answer: expected one of 'a'; got 'b'",
    ),
    "answer key out of set": (
        "cos_e questions",
        json.dumps(QUESTIONS[0] | {"answerKey": "Z"}),
        r":1: answerKey: expected one of 'A', 'B', 'C'; got 'Z'",
    ),
    "choices are no list": (
        "cos_e questions",
        json.dumps(QUESTIONS[0] | {"question": {"stem": "?", "choices": "A"}}),
        r":1: question\.choices: expected a non-empty list",
    ),
    "explanation is no object": (
        "cos_e",
        '{"id": "q0", "explanation": "text"}',
        r":1: explanation\.open-ended: missing",
    ),
    "too few columns": (
        "comve",
        "id,sent0,sent1\n7,only one",
        r":2: line: expected 3 fields \(id, sent0, sent1\); got 2",
    ),
    "too many columns": ("comve", "id,sent0,sent1\n7,a,b,c", r":2: line: expected 3 fields .*; got 4"),
    "open quote": ("comve", 'id,sent0,sent1\n7,"a,b', r": line: not valid CSV"),
    "text after a quote": ("comve", 'id,sent0,sent1\n7,"a"b,c', r":2: line: not valid CSV"),
    "repeated column": ("comve", "id,sent0,sent0\n7,a,b", r":1: line: a column name occurs twice"),
    "missing column": ("comve", "id,sent0\n7,a\n8,b", r":2: sent1: missing"),
    "blank sentence": ("comve", "id,sent0,sent1\n7, ,b\n8,a,b", r":2: sent0: expected a non-empty string; got ' '"),
    "unknown id": ("comve", "id,sent0,sent1\n9,a,b", r":2: id: '9' is not in .*subtaskA_answers_all\.csv"),
    "id without a sentence pair": ("comve", "id,sent0,sent1\n7,a,b", r":2: id: '8' is not in .*subtaskA_data_all\.csv"),
    "repeated id": (
        "comve",
        "id,sent0,sent1\n7,a,b\n7,c,d",
        r":3: id: '7' occurs twice, first at \S*A_data_all\.csv:2",
    ),
    "label of another order": (
        "esnli",
        "pairID,gold_label,Sentence1,Sentence2,Explanation_1\nb,2,p,h,e",
        r":2: gold_label: expected one of 'entailment', 'neutral', 'contradiction'; got '2'",
    ),
    "no explanation": (
        "esnli",
        "pairID,gold_label,Sentence1,Sentence2,Explanation_1\nb,neutral,p,h,",
        r":2: Explanation_1: expected a non-empty string",
    ),
    "header only": ("esnli", "pairID,gold_label", r":1: file: holds no record"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupt_file_names_line_and_field(tmp_path: Path, name: str) -> None:
    target, text, message = CORRUPTIONS[name]
    dataset, _, part = target.partition(" ")
    path = WRITERS[dataset](tmp_path)
    if part:
        path = tmp_path / "v1.0/train_rand_split.jsonl"
    path.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(dataset, tmp_path, "train")


@pytest.mark.parametrize("dataset", WRITERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r":1: file: holds no record"),
        (b"\n\n", r":1: file: holds no record"),
        (b"id,x\n7,\0\n", r":2: line: holds a NUL byte"),
        (b"\xff\xfe", r":1: line: not UTF-8"),
        (b"x" * (MAX_LINE_BYTES + 1), rf":1: line: longer than {MAX_LINE_BYTES} bytes"),
    ],
    ids=["empty", "blank", "nul", "encoding", "long line"],
)
def test_corrupt_bytes_name_the_line(tmp_path: Path, dataset: str, content: bytes, message: str) -> None:
    path = WRITERS[dataset](tmp_path)
    # A JSONL reader meets the first line first.
    path.write_bytes(content.replace(b"id,x\n", b"\n") if path.suffix == ".jsonl" else content)
    with pytest.raises(ValueError, match=message):
        load(dataset, tmp_path, "train")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    path = write_comve(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [example.uid for example in load("comve", tmp_path, "train")] == ["7", "8"]


@pytest.mark.parametrize("dataset", WRITERS)
def test_a_missing_file_names_the_places(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{dataset}: no such file: .*{tmp_path.name}"):
        load(dataset, tmp_path, "train")


def test_bad_arguments_give_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset must be one of cos_e, ecqa, comve, esnli; got 'snli'"):
        load("snli", tmp_path, "train")
    with pytest.raises(ValueError, match=r"split must be one of train, dev for cos_e; got 'test'"):
        load("cos_e", tmp_path, "test")
    with pytest.raises(ValueError, match=r"version must be one of v1\.0, v1\.11; got 'v2'"):
        load("cos_e", tmp_path, "dev", version="v2")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load("comve", tmp_path / "none", "train")
    with pytest.raises(ValueError, match="split must be one of train, dev; got 'test'"):
        embedded_examples("test")


@pytest.mark.parametrize(
    ("dataset", "split", "uids"),
    [
        ("comve", "dev", ["1363", "392", "540", "3", "560"]),
        ("esnli", "train", ["7863808892.jpg#3r1e", "3268428191.jpg#0r1e", "1466440286.jpg#3r1e"]),
        (
            "esnli",
            "dev",
            ["2001867714.jpg#2r1c", "7700959654.jpg#4r1c", "3547524138.jpg#2r1n", "2892992529.jpg#0r1e"],
        ),
    ],
)
def test_official_files_give_every_row(dataset: str, split: str, uids: list[str]) -> None:
    """Rows as their authors published them, with quotes, commas and references of their own."""
    examples = load(dataset, require_data(DATA / dataset).parent, split)
    assert [example.uid for example in examples] == uids
    assert all(example.choices[example.label] == example.label_text for example in examples)
    assert {len(example.explanations) for example in examples} == {1 if split == "train" else 3}
    if dataset == "esnli":
        assert [example.label_text[0] for example in examples] == [uid[-1] for uid in uids]


def test_comve_label_order_on_the_official_false_sentences() -> None:
    """Subtask C repeats the nonsensical sentence: an independent witness of the label order."""
    with require_data(DATA / "comve/Dev_Data/subtaskC_dev_data.csv").open(encoding="utf-8", newline="") as file:
        false = {row["id"]: row["FalseSent"].strip() for row in csv.DictReader(file)}
    examples = load("comve", DATA, "dev")
    assert {example.label for example in examples} == {0, 1}
    assert all(example.inputs[example.label] == false[example.uid] for example in examples)


def test_comve_test_split_has_its_own_names(tmp_path: Path) -> None:
    (tmp_path / "Test Data").mkdir()
    for path in (DATA / "comve" / "Dev_Data").glob("*.csv"):
        (tmp_path / "Test Data" / path.name.replace("dev_data", "test_data")).write_bytes(path.read_bytes())
    examples = load("comve", tmp_path, "test")
    assert {example.split for example in examples} == {"test"}
    assert [example.inputs for example in examples] == [example.inputs for example in load("comve", DATA, "dev")]


def test_missing_data_are_a_failure_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_data(tmp_path) == tmp_path
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="missing test data: .*none"):
        require_data(tmp_path / "none")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="missing test data"):
        require_data(tmp_path / "none")


def test_embedded_examples_are_whole_and_balanced() -> None:
    train, dev = embedded_examples("train"), embedded_examples("dev")
    assert (len(train), len(dev)) == (48, 24)
    for examples in (train, dev):
        assert len(set(Counter(example.label for example in examples).values())) == 1
    both = train + dev
    sentences = [sentence for example in both for sentence in example.inputs]
    assert len(set(sentences)) == 2 * len(both)
    assert all(len(set(example.explanations)) == 3 for example in both)
    assert all(text.endswith(".") and text[0].isupper() for e in both for text in (*e.inputs, *e.explanations))
    folder = Path(load.__code__.co_filename).with_name("examples") / "comve"
    for name, examples in (("Training_Data/subtaskC_data_all.csv", train), ("Dev_Data/subtaskC_dev_data.csv", dev)):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            false = {row["id"]: row["FalseSent"] for row in csv.DictReader(file)}
        assert false == {example.uid: example.inputs[example.label] for example in examples}


QUESTION = Example("q", ("Where  IS it?",), ("The Box", "a Hat"), 1, "a Hat", ("It SITS there.",), "train")
PAIR = Example("p", ("He ate Rice.", "He ate a Car."), ("choice1", "choice2"), 1, "choice2", ("Cars ARE big.",), "dev")
NLI = Example(
    "n", ("A Man.", "A Dog."), ("entailment", "neutral", "contradiction"), 0, "entailment", ("A b", "C d"), "dev"
)


def test_prompts_and_targets_are_febs() -> None:
    assert source_text("cos_e", QUESTION) == "explain where is it? \\n (A) the box (B) a hat"
    assert source_text("ecqa", QUESTION, end="</s>") == "explain where is it? \\n (A) the box (B) a hat</s>"
    assert source_text("ecqa", QUESTION, newline="|") == "explain where is it? | (A) the box (B) a hat"
    assert target_text("ecqa", QUESTION) == "a hat because it sits there."
    assert (
        source_text("comve", PAIR)
        == "explain what is more nonsensical? \\n choice1: he ate rice. choice2: he ate a car."
    )
    assert target_text("comve", PAIR) == "choice2 because cars are big."
    assert source_text("esnli", NLI, end="</s>") == "explain nli hypothesis: A Dog. premise: A Man."
    assert target_text("esnli", NLI, explanation=1) == "entailment because c d"
    with pytest.raises(ValueError, match="dataset must be one of"):
        source_text("sbic", NLI)
    with pytest.raises(ValueError, match="dataset must be one of"):
        target_text("sbic", NLI)


def test_answers_are_taken_apart_both_ways() -> None:
    twice = "choice1 because a because b"
    assert parse_answer(twice) == ("choice1", "a", False)
    assert parse_answer(twice, "robust") == ("choice1", "a because b", False)
    assert parse_answer("choice1 since a") == ("choice1 since a", "UNK", True)
    assert parse_answer("") == ("", "UNK", True)
    assert parse_answer("choice1\nbecause  a", "robust") == ("choice1", "a", False)
    with pytest.raises(ValueError, match="mode must be"):
        parse_answer(twice, "loose")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("choice1 because cars are big", True),
        ("  Choice2: because cars are big", True),
        ("choice3 because cars are big", False),
        ("choice1 because", False),
        ("choice1", False),
        ("because cars are big", False),
        ("", False),
    ],
)
def test_parsable_needs_label_and_reason(text: str, expected: bool) -> None:
    assert is_parsable(text, PAIR.choices) is expected


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_target_is_parsable(dataset: str) -> None:
    example = {"comve": PAIR, "esnli": NLI}.get(dataset, QUESTION)
    assert is_parsable(target_text(dataset, example), example.choices)
