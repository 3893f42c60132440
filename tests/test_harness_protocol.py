"""FEB's splits, replayed with the draws of the libraries that FEB used; settings; hub copies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from caref_kernels.harness import DATASETS, Example, embedded_examples, load
from caref_kernels.harness.hub import load_hub
from caref_kernels.harness.protocol import SEEDS, Sizes, feb_split
from caref_kernels.harness.settings import Settings, read_settings


def examples(dataset: str, count: int, split: str = "train") -> list[Example]:
    labels = DATASETS[dataset].labels or ("a", "b", "c")
    reasons = ("r1", "r2", "r3") if dataset == "comve" else ("r1",)
    return [
        Example(f"{split}{i}", ("x", "y"), labels, i % len(labels), labels[i % len(labels)], reasons, split)
        for i in range(count)
    ]


def test_the_seeds_are_febs() -> None:
    assert len(SEEDS) == len(set(SEEDS)) == 60
    assert (SEEDS[:3], SEEDS[-1], sum(SEEDS)) == ((7004, 3639, 6290), 4791, 278_038)


@pytest.mark.parametrize(("dataset", "dev"), [("cos_e", 350), ("ecqa", 350), ("comve", 350), ("esnli", 348)])
def test_sizes_and_balance(dataset: str, dev: int) -> None:
    split = feb_split(dataset, examples(dataset, 1200), examples(dataset, 1200, "dev"), SEEDS[0])
    assert (len(split.train), len(split.dev)) == (48, dev)
    assert {example.split for example in split.dev} == {"dev"}
    assert len(set(split.train)) == 48
    if DATASETS[dataset].labels:
        for labels in ([shot.example.label for shot in split.train], [example.label for example in split.dev]):
            assert len(set(Counter(labels).values())) == 1


def test_comve_draws_as_pandas_does() -> None:
    """FEB samples rows, three for each pair, with ``DataFrame.sample`` on numpy's global state."""
    pandas = pytest.importorskip("pandas")
    train, dev = examples("comve", 400), examples("comve", 800, "dev")
    rows = pandas.DataFrame([(e.uid, e.label, r) for e in train for r in range(3)], columns=["uid", "label", "reason"])
    pool = pandas.DataFrame([(e.uid, e.label) for e in dev], columns=["uid", "label"])
    state = np.random.get_state()
    np.random.seed(SEEDS[5])
    shots = [rows.loc[rows["label"] == label].sample(frac=24 / (rows["label"] == label).sum()) for label in (0, 1)]
    chosen = [pool.loc[pool["label"] == label].sample(frac=175 / (pool["label"] == label).sum()) for label in (0, 1)]
    np.random.set_state(state)
    split = feb_split("comve", train, dev, SEEDS[5])
    expected = pandas.concat(shots)
    assert [(s.example.uid, s.explanation) for s in split.train] == list(
        zip(expected["uid"], expected["reason"], strict=True)
    )
    assert [example.uid for example in split.dev] == list(pandas.concat(chosen)["uid"])


def test_ecqa_draws_as_random_sample_does() -> None:
    train, dev = examples("ecqa", 100), examples("ecqa", 400, "dev")
    generator = random.Random(SEEDS[1])
    expected = generator.sample(train, 48), generator.sample(dev, 350)
    split = feb_split("ecqa", train, dev, SEEDS[1])
    assert ([shot.example for shot in split.train], list(split.dev)) == expected


def test_esnli_and_cos_e_draw_as_datasets_shuffle_does() -> None:
    """``Dataset.shuffle()``: a generator seeded from numpy's state, which then takes one step."""
    train = examples("esnli", 300)
    state = np.random.RandomState(SEEDS[2])
    expected = []
    for label in range(3):
        part = [example for example in train if example.label == label]
        _, words, position, *_ = state.get_state()
        seed = words[position] if position < 624 else words[0]
        state.random_sample()
        expected += [part[i].uid for i in np.random.default_rng(seed).permutation(len(part))[:16]]
    split = feb_split("esnli", train, examples("esnli", 600, "dev"), SEEDS[2])
    assert [shot.example.uid for shot in split.train] == expected
    assert expected != [shot.example.uid for shot in feb_split("esnli", train, train, SEEDS[3], Sizes(48, 30)).train]


def test_a_split_depends_on_seed_and_content_alone() -> None:
    train, dev = examples("comve", 100), examples("comve", 400, "dev")
    before = random.getstate(), np.random.get_state()[1].tolist()
    one = feb_split("comve", train, dev, 51)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert one == feb_split("comve", train, dev, 51)
    assert one.hash != feb_split("comve", train, dev, 52).hash
    reworded = [dataclasses.replace(example, explanations=("r1", "r2", "other")) for example in train]
    assert one.hash != feb_split("comve", reworded, dev, 51).hash


def test_never_fewer_examples() -> None:
    with pytest.raises(ValueError, match="comve with label 0: 24 examples are needed; got 2"):
        feb_split("comve", examples("comve", 4), examples("comve", 400), 1)
    with pytest.raises(ValueError, match="esnli with label 0: 116 examples are needed; got 100"):
        feb_split("esnli", examples("esnli", 300), examples("esnli", 300), 1)
    with pytest.raises(ValueError, match="cos_e: 350 examples are needed; got 349"):
        feb_split("cos_e", examples("cos_e", 48), examples("cos_e", 349), 1)
    with pytest.raises(ValueError, match="dev must be at least 3 for esnli; got 2"):
        feb_split("esnli", examples("esnli", 60), examples("esnli", 60), 1, Sizes(48, 2))
    with pytest.raises(ValueError, match="dataset must be one of"):
        feb_split("snli", [], [], 1)


# How many examples of each label the official files have (for e-SNLI two subsets), and sha256 of the positions
# that were drawn from them, within their label where a dataset is drawn by label.
OFFICIAL = {
    "cos_e": ([7610], [950], "70d3daa4b29080ad199fc586f2e45410e3d81146fdcba597d21fe69d3d8149f5"),
    "ecqa": ([7112], [479], "4cacf2c46093df00fd79ae25c114934b45a16d7c804fae6ce6fc1a3821ef9d61"),
    "comve": ([4979, 5021], [518, 479], "8e0775f77582e0e9b177406d03ffbdd8ad25bab40311b5aae48f790110da8c7d"),
    "esnli": ([336, 336, 316], [345, 340, 315], "dd6c11cba898a64e774d3c03b50ec9ca5c4b1046e2fb3a5ea36718b348c2b5c6"),
}


@pytest.mark.parametrize("dataset", OFFICIAL)
def test_all_sixty_splits_of_the_official_sizes(dataset: str) -> None:
    """The draws depend on the sizes and labels of the files alone, so examples of these sizes stand for them."""
    *sizes, expected = OFFICIAL[dataset]
    pools, positions = [], {}
    for split, counts in zip(("train", "dev"), sizes, strict=True):
        pools.append([])
        for label, position in ((label, n) for label, count in enumerate(counts) for n in range(count)):
            uid = f"{split}-{label}-{position}"
            positions[uid] = [label, position]
            names, reasons = DATASETS[dataset].labels or ("a",), ("r1", "r2", "r3") if dataset == "comve" else ("r1",)
            pools[-1].append(Example(uid, ("x", "y"), names, label, names[label], reasons, split))
    digest, hashes = hashlib.sha256(), set()
    for seed in SEEDS:
        split = feb_split(dataset, *pools, seed)
        assert (len(split.train), len(split.dev)) == (48, 348 if dataset == "esnli" else 350)
        hashes.add(split.hash)
        shots = [[*positions[shot.example.uid], shot.explanation] for shot in split.train]
        digest.update(json.dumps([shots, [positions[example.uid] for example in split.dev]]).encode())
    assert len(hashes) == 60
    assert digest.hexdigest() == expected


# -------------------------------------------------------------------------------------------------- hub copies

HUB_ROWS = {
    "cos_e": {"id": "q", "question": "Q?", "choices": ["a", "b"], "answer": "b", "abstractive_explanation": "so"},
    "ecqa": {"q_no": "q", "q_text": "Q?", "q_ans": "b", "taskA_pos": "One.\n\nTwo."}
    | {f"q_op{i}": text for i, text in enumerate("abcde", 1)},
    "esnli": {
        "premise": "P",
        "hypothesis": "H",
        "label": 1,
        "explanation_1": "E",
        "explanation_2": "",
        "explanation_3": "",
    },
}


@pytest.mark.parametrize("dataset", HUB_ROWS)
def test_hub_copies_give_the_same_record(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [HUB_ROWS[dataset]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (example,) = load_hub(dataset, "dev", "v1.0")
    assert (example.label, example.choices[1], example.label_text) == (
        (1, "neutral", "neutral") if dataset == "esnli" else (1, "b", "b")
    )
    assert asked[0][1]["split"] == "validation"
    assert "trust_remote_code" not in asked[0][1]
    if dataset == "ecqa":
        assert example.explanations == ("One. Two.",)


def test_hub_errors_name_the_record_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **o: [{"id": "q"}]))
    with pytest.raises(ValueError, match=r"Salesforce/cos_e:1: choices: missing"):
        load_hub("cos_e", "dev", "v1.0")
    with pytest.raises(ValueError, match="comve has no copy with explanations on the hub"):
        load_hub("comve", "dev", "v1.0")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        load_hub("cos_e", "dev", "v1.0")


# ---------------------------------------------------------------------------------------------------- settings


def test_settings_defaults_are_the_papers() -> None:
    settings = Settings()
    assert (settings.learning_rate, settings.warmup_steps, settings.max_steps, settings.batch_size) == (
        3e-5,
        500,
        600,
        4,
    )
    assert (settings.alpha, settings.beta, settings.lambda_sced, settings.lambda_kl) == (2, 1, 0.1, 0.1)
    assert (settings.weight_decay, settings.max_grad_norm, settings.max_source, settings.max_target) == (
        0.01,
        1,
        256,
        64,
    )
    assert len(settings.jobs()) == 60 * 4 * 9
    assert len(settings.jobs((1.0, 2.0), (0.0, 1.0))) == 4 * len(settings.jobs())
    assert len({job.name for job in settings.jobs()}) == len(settings.jobs())


@pytest.mark.parametrize("name", ["flan-t5-large", "smollm2"])
def test_shipped_settings_are_read(name: str) -> None:
    settings = read_settings(Path(load.__code__.co_filename).with_name("configs") / f"{name}.yaml")
    assert (settings.train_size, settings.dev_size) == Sizes()
    assert settings.splits == (0, 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"'learning_rte' is no option; there are model, "),
        ("learning_rate: 3e-5", "learning_rate must be a number .write 3.0e-5"),
        ("learning_rate: 2.0", r"learning_rate must be in \(0, 1\); got 2.0"),
        ("precision: fp16", r"precision must be fp32 or bf16 .*overflow.*; got 'fp16'"),
        ("max_steps: true", "max_steps must be a whole number; got True"),
        ("variants: [q|k|v]", r"variants must be different names out of .*; got .'q\|k\|v'"),
        ("variants: [CE-AQ, CE-AQ]", "variants must be different names"),
        ("datasets: []", r"datasets must be different names .*; got \[\]"),
        ("datasets: comve", "datasets must be a list of names; got 'comve'"),
        ("hub: [snli]", "hub must be different names"),
        ("splits: [5, 61]", r"splits must be \[first, last\) within \[0, 60\]; got \[5, 61\]"),
        ("splits: 5", "splits must be a list of two whole numbers; got 5"),
        ("micro_batch: 3", "micro_batch must divide batch_size 4; got 3"),
        ("alpha: 0.5", r"alpha must be in \[1, 16\]"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("a: [[[[[[[[[[1]]]]]]]]]]", "nested deeper than 8"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML|expected options"),
        ("- model", "expected options as"),
        ("model: [", "not valid YAML"),
        ("#" * 70_000, "at most 65536 bytes"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "a.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("", encoding="utf-8")
    assert read_settings(tmp_path / "a.yaml", {"max_steps": 7}) == Settings(max_steps=7)


def test_the_hash_covers_what_decides_results() -> None:
    base = Settings()
    assert base.hash() == Settings(data="elsewhere", device="cpu", splits=(0, 1), alpha=1.0).hash()
    changes = (
        {"learning_rate": 1e-4},
        {"max_new_tokens": 8},
        {"precision": "bf16"},
        {"dev_size": 6},
        {"scorer": "none"},
    )
    assert len({base.hash(), *(Settings(**change).hash() for change in changes)}) == 1 + len(changes)


def test_embedded_examples_make_a_split() -> None:
    split = feb_split("comve", embedded_examples("train"), embedded_examples("dev"), 1, Sizes(8, 6))
    assert (len(split.train), len(split.dev)) == (8, 6)
