"""Accuracy, nBERT and calibration on answers made by hand, and the summaries over splits."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_data import DATA, require_data

from caref_kernels.harness import Example, paper
from caref_kernels.harness.metrics import calibration, score_answers
from caref_kernels.harness.report import Study, read_report
from caref_kernels.harness.results import Reading
from caref_kernels.harness.summary import FEWEST_SPLITS, cell, difference, pairs, sign_flip

PAIR = Example("p", ("A", "B"), ("choice1", "choice2"), 1, "choice2", ("cars are big", "cars have wheels"), "dev")


class Overlap:
    """A scorer whose figures can be worked out: 50 for a known explanation, 80 for the second reference, else 20."""

    name = "overlap"

    def __call__(self, candidates, references):
        table = {"cars are big": 50.0, "cars have wheels": 80.0}
        assert all(references)
        return [table.get(candidate.lower(), 0.0 if not candidate else 20.0) for candidate in candidates]


def test_febs_figures_by_hand() -> None:
    answers = [
        "choice2 because cars are big",  # right, 50
        "Choice2 because Cars Have Wheels because they do",  # right, cut at the second separator, 80
        "choice1 because cars have wheels",  # wrong: 80 counts 0
        "choice2",  # no separator: the whole line is the label, which is right; the explanation is "UNK", 20
        "choice2 since cars are big",  # no separator, wrong
        "",  # nothing
    ]
    metrics = score_answers(answers, [PAIR] * 6, Overlap())
    assert metrics == {
        "accuracy": 50.0,
        "accuracy_robust": 50.0,
        "broken": 3,
        "unparsable": 3,
        "nbert": (50 + 80 + 20) / 6,
        "bertscore": (50 + 80 + 80 + 20 + 20 + 20) / 6,
        "bertscore_correct": 50.0,
    }


def test_robust_parsing_forgives_white_space_only() -> None:
    metrics = score_answers(["choice2\nbecause cars", "choice2. because cars"], [PAIR] * 2, None)
    assert (metrics["accuracy"], metrics["accuracy_robust"], metrics["broken"]) == (0.0, 50.0, 1)


def test_no_scorer_is_null_and_no_correct_answer_is_zero() -> None:
    assert score_answers(["choice2 because x"], [PAIR], None)["nbert"] is None
    metrics = score_answers(["", "nonsense"], [PAIR] * 2, Overlap())
    assert (metrics["nbert"], metrics["bertscore_correct"], metrics["unparsable"]) == (0.0, None, 2)
    with pytest.raises(ValueError, match="answers must be one for each of at least 1 example; got 1 for 2"):
        score_answers([""], [PAIR] * 2, None)
    with pytest.raises(ValueError, match="got 0 for 0"):
        score_answers([], [], None)


def test_calibration_by_hand() -> None:
    pytest.importorskip("torchmetrics")
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    figures = calibration(probabilities.log() - 3.0, torch.tensor([0, 1, 1, 0]))
    assert figures["choice_accuracy"] == pytest.approx(75)
    assert figures["confidence"] == pytest.approx(70)
    # Every example has a bin of its own: |right - confidence| on average.
    assert figures["ece"] == pytest.approx(100 * (0.1 + 0.6 + 0.2 + 0.5) / 4)
    assert figures["brier"] == pytest.approx((2 * 0.01 + 2 * 0.36 + 2 * 0.04 + 2 * 0.25) / 4)
    assert figures["nll"] == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.8, 0.5))) / 4)


def test_an_absent_option_has_no_probability() -> None:
    pytest.importorskip("torchmetrics")
    figures = calibration(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0]))
    assert (figures["brier"], figures["nll"]) == pytest.approx((0.5, math.log(2)))


def test_bert_scorer_is_raw_lower_cased_and_survives_empty_text(tmp_path: Path) -> None:
    pytest.importorskip("bert_score")
    import transformers

    from caref_kernels.harness.scorers import load_scorer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cars", "are", "big", "small", "have", "wheels"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path))
    assert scorer.name.endswith(f"{tmp_path.name} L2, raw")
    references = [["Cars are BIG", "wheels"], ["cars"], ["cars are small"], ["wheels", "cars are small"]]
    same, empty, one, best = scorer(["cars ARE big", "  ", "big cars", "big cars"], references)
    assert round(same, 2) == 100
    assert empty == 0.0
    assert 0 < one < 99.9
    assert round(best, 2) >= round(one, 2)
    with pytest.raises(ValueError, match="references must hold at least one"):
        scorer(["cars"], [[]])


def test_scorers_that_are_not_there_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bert_score")
    from caref_kernels.harness.scorers import load_scorer

    assert load_scorer("none") is None
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run: hf download FacebookAI/roberta-large, or set scorer: none"):
        load_scorer("roberta-large")
    with pytest.raises(FileNotFoundError, match=r"scorer: no such file: .*config\.json; known names"):
        load_scorer(str(tmp_path / "none"))


# ---------------------------------------------------------------------------------------------------- summaries


def test_cell_is_febs_std_and_the_usual_error() -> None:
    one = cell([1.0, 2.0, 4.0])
    assert (one.mean, one.splits) == (pytest.approx(7 / 3), 3)
    assert one.std == pytest.approx(math.sqrt(14 / 9))
    assert one.error == pytest.approx(math.sqrt(14 / 6) / math.sqrt(3))
    assert cell([5.0]) == (5.0, 0.0, None, 1)
    assert cell([]) is None


def test_sign_flips_are_exact_for_few_splits() -> None:
    assert sign_flip([1.0]) == 1.0
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([1.0, -1.0]) == 1.0
    # 6 and 4 (the 1 flipped, or not counted): {+++, ++- with 1} and their mirror images.
    assert sign_flip([3.0, 2.0, -1.0]) == 4 / 8
    assert sign_flip([1.0] * 20) == pytest.approx(1 / 10_001)
    assert 0.2 < sign_flip([1.0, -1.0] * 10 + [1.0]) <= 1.0


def rows(variant: str, values: dict[int, float], dataset: str = "esnli", **changes) -> list[dict]:
    base = {
        "dataset": dataset,
        "variant": variant,
        "alpha": 2.0,
        "beta": 1.0,
        "percent": 7.4,
        "trained": 100,
        "curve": [{"step": 2, "loss": 1.0, "k_t": 3.0}],
        "model": "tiny",
        "scorer": "minilm",
        "device": "CPU",
        "protocol": "FEB",
    }
    return [
        base | {"run": f"{dataset}{variant}{seed}", "seed": seed, "metrics": {"accuracy": v, "nbert": None}} | changes
        for seed, v in values.items()
    ]


def test_differences_are_paired_over_common_seeds() -> None:
    both = rows("CAREF-AQ", {1: 50.0, 2: 60.0, 3: 70.0}) + rows("CE-AQ", {1: 49.0, 2: 58.0, 9: 0.0})
    found = difference(both, "esnli", ("CAREF-AQ", "CE-AQ"), "accuracy")
    assert (found.splits, found.mean, found.p) == (2, 1.5, 0.5)
    assert found.error == pytest.approx(0.5)
    assert found.detectable == pytest.approx(math.sqrt(7.85 / 2) * math.sqrt(0.5))
    assert math.ceil(7.85 * 0.5 / 2.25) == 2
    assert found.needed == FEWEST_SPLITS  # two splits have no sign flips below 0.5
    noisy = rows("CAREF-AQ", {1: 50.0, 2: 62.0}) + rows("CE-AQ", {1: 52.0, 2: 58.0})
    assert difference(noisy, "esnli", ("CAREF-AQ", "CE-AQ"), "accuracy").needed == math.ceil(7.85 * 18)
    assert difference(both, "esnli", ("CAREF-AQ", "CE-AQ"), "nbert") is None
    assert difference(both, "comve", ("CAREF-AQ", "CE-AQ"), "accuracy") is None


def test_pairs_ask_the_papers_questions() -> None:
    assert pairs(["CE-AQ", "KL-AQ", "CAREF-AQ", "LORA-4", "ZERO-STEP"]) == [
        ("CAREF-AQ", "CE-AQ"),
        ("KL-AQ", "CE-AQ"),
        ("CAREF-AQ", "LORA-4"),
    ]


def study(*parts: list[dict], **options) -> Study:
    return Study(Reading(tuple(row for part in parts for row in part)), **options)


def test_the_report_says_not_run_and_never_fills_in() -> None:
    ours = study(rows("CAREF-AQ", {1: 50.0, 2: 60.0}), rows("CE-AQ", {1: 40.0}), expected=2)
    assert ours.incomplete() == ["esnli CE-AQ: 1/2 splits"]
    text = ours.markdown()
    line = next(line for line in text.splitlines() if line.startswith("| CAREF-AQ | 7.40 |"))
    cells = [part.strip() for part in line.strip("|").split("|")]
    assert cells[2] == "not run [paper 84.59]"
    assert cells[5] == "55.00 ± 5.00 (SE 5.00, 2) [paper 88.48]"
    assert cells[6:] == ["not run", "89.04"]
    assert "esnli CE-AQ: 1/2 splits" in text
    assert "The paper's figures are of google/flan-t5-large: they do not compare with these." in text
    assert "does not compare with this nBERT" in text
    assert "| LORA-4 | not run | not run |" in text
    # No cell of the paper without its label.
    assert text.count("88.93") == text.count("[paper 88.93]")


def test_other_exponents_are_another_table() -> None:
    mixed = study(rows("CAREF-AQ", {1: 50.0}), rows("CAREF-AQ", {1: 99.0}, alpha=1.5), expected=1)
    assert len(mixed.rows) == 1
    assert replace(mixed, alpha=1.5).rows[0]["metrics"]["accuracy"] == 99.0


def test_the_csv_makes_the_same_report(tmp_path: Path) -> None:
    """One line for each run is all that the tables need; no cell is a formula."""
    ours = study(
        *(rows(name, {1: 50.0, 2: 61 / 3}, model="=cmd()", scorer=None) for name in ("CAREF-AQ", "CE-AQ")), expected=2
    )
    (tmp_path / "report.csv").write_text(ours.csv(), encoding="utf-8")
    (header, *lines) = csv.reader(io.StringIO(ours.csv()))
    assert header[:4] == ["dataset", "variant", "seed", "alpha"]
    assert len(lines) == 4
    assert lines[0][header.index("model")] == "'=cmd()"
    again = Study(read_report(tmp_path / "report.csv"), expected=2)
    assert again.markdown() == ours.markdown()
    assert again.csv() == ours.csv()
    (tmp_path / "report.csv").write_text(ours.csv().replace("CE-AQ,1,", "CE-AQ,x,"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"report\.csv:4: not a line of a report .*invalid literal"):
        read_report(tmp_path / "report.csv")


def test_html_in_a_name_is_text() -> None:
    text = study(rows("CAREF-AQ", {1: 50.0}, dataset="esnli", percent=1.0)).difference_table().markdown()
    assert "<" not in text
    from caref_kernels.harness.report import Table

    assert "&lt;script>" in Table("t", ("a",), (("<script>|",),)).markdown()


def test_several_exponents_are_a_table() -> None:
    mine = rows("CAREF-AQ", {1: 50.0, 2: 60.0}) + rows("ZERO-STEP", {1: 30.0})
    ours = study(mine, rows("CAREF-AQ", {1: 51.0}, alpha=1.5, beta=0.5))
    accuracy, nbert = ours.grid_tables()
    assert accuracy.title == "CAREF-AQ on e-SNLI, accuracy by exponents"
    assert accuracy.header == ("", "β = 0.5", "β = 1")
    assert accuracy.rows == (("α = 1.5", "51.00 (1)", "not run"), ("α = 2", "not run", "55.00 ± 5.00 (SE 5.00, 2)"))
    assert {cell for row in nbert.rows for cell in row[1:]} == {"not run"}
    assert accuracy.markdown() in ours.markdown()
    assert study(mine).grid_tables() == []


def test_the_papers_figures_are_the_published_ones() -> None:
    aq = paper.TABLE["CAREF-AQ"]
    assert (aq.value("accuracy", "cos_e"), aq.value("nbert", "esnli"), aq.value("nbert", None)) == (84.59, 81.97, 81.0)
    assert paper.TABLE["LoRA r=4"].value("accuracy", "cos_e") is None
    assert aq.value("ece", None) is None


def test_every_figure_of_the_paper() -> None:
    file = require_data(DATA / "paper_table.json")
    published = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {row["model"] for row in published} == set(paper.TABLE)
    for row in published:
        ours = paper.TABLE[row["model"]]
        assert ours.percent == row["param_pct"]
        for metric in ("accuracy", "nbert"):
            assert list(getattr(ours, metric)) == (row[metric] or [])
            assert ours.value(metric, None) == row[f"{metric}_avg"]
