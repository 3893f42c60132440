"""The demo from end to end on a tiny random model, and its parts: rows, kernel check, report, command line."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
for module in ("gguf", "rich", "safetensors"):
    pytest.importorskip(module)

from tiny_llama import CONTROL, save, tiny_tokenizer  # noqa: E402 - after the guards above

from caref_kernels import backends  # noqa: E402
from caref_kernels.demo import kernel_check, tour  # noqa: E402
from caref_kernels.demo.__main__ import main  # noqa: E402
from caref_kernels.demo.batches import BECAUSE, EXPLANATION, LABEL, check_tokens, collate, encode  # noqa: E402
from caref_kernels.demo.report import Report, write  # noqa: E402
from caref_kernels.demo.student import Student  # noqa: E402
from caref_kernels.demo.training import schedule  # noqa: E402
from caref_kernels.harness import embedded_examples  # noqa: E402
from caref_kernels.testing import check_identity, check_term  # noqa: E402

# Without a compiled backend the demo runs on the reference, which says so.
pytestmark = pytest.mark.filterwarnings("ignore:caref_kernels runs its plain-PyTorch reference:RuntimeWarning")
COMPILED = backends.get("cpu").unsupported(torch.empty(1, 2)) is None


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and its tokenizer."""
    return save(tmp_path_factory.mktemp("model") / "tiny-llama")


def small_settings(model: Path) -> tour.Settings:
    return tour.Settings(model=model, shots=4, held_out=4, batch_size=2, generated=2, check_rows=16)


@pytest.fixture(scope="module")
def small_report(tiny_model: Path) -> Report:
    """A run of two steps."""
    return tour.run(small_settings(tiny_model))


# --- tokens and rows ---------------------------------------------------------------------------------------------


def test_rows_predict_the_target_and_know_its_parts() -> None:
    tokenizer = tiny_tokenizer()
    items = [encode("comve", example, tokenizer) for example in embedded_examples("train")[:3]]
    batch = collate(items)
    assert set(batch.parts.tolist()) == {LABEL, BECAUSE, EXPLANATION}
    for number, item in enumerate(items):
        mine = batch.sequence == number
        # A row at position t holds what the token at t + 1 is.
        assert torch.equal(batch.input_ids[number, batch.position[mine] + 1], batch.labels[mine])
        texts = [tokenizer.decode(batch.labels[mine & (batch.parts == part)]) for part in (LABEL, BECAUSE, EXPLANATION)]
        explanation = item.example.explanations[0].lower()
        assert texts == [f" {item.example.label_text}", " because", f" {explanation}{CONTROL[2]}"]
        assert batch.attention_mask[number].sum() == len(item.prompt) + len(item.target)
        assert tokenizer.decode(item.prompt).endswith("\nanswer:")


def test_foreign_tokenizer_and_long_examples_are_refused() -> None:
    items = [encode("comve", embedded_examples("train")[0], tiny_tokenizer())]
    with pytest.raises(ValueError, match=r"token \d+ is not below the model's 10 embeddings"):
        check_tokens(items, 10, 512)
    with pytest.raises(ValueError, match="at most 20 tokens fit into the model"):
        check_tokens(items, 512, 20)


def test_padding_and_head_selection_change_no_row(tiny_model: Path) -> None:
    student = Student.load(tiny_model, "tiny")
    items = [encode("comve", example, student.tokenizer) for example in embedded_examples("train")[:3]]
    batch = collate(items)
    student.check_head(batch)
    with torch.no_grad():
        together = student.rows(batch)
        alone = torch.cat([student.rows(collate([item])) for item in items])
    check_identity(together, alone, "float32", "rows")


def test_step_behind_the_head_is_noticed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student.load(tiny_model, "tiny")
    forward = type(student.model).forward

    def capped(self, **inputs):
        output = forward(self, **inputs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(type(student.model), "forward", capped)
    with pytest.raises(ValueError, match="model_type 'llama' changes its logits behind the head"):
        student.check_head(collate([encode("comve", embedded_examples("train")[0], student.tokenizer)]))


def test_only_query_projections_are_trained(tiny_model: Path) -> None:
    student = Student.load(tiny_model, "tiny")
    trained = [name for name, parameter in student.model.named_parameters() if parameter.requires_grad]
    assert trained == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]


def test_unsuitable_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*config\.json"):
        Student.load(tmp_path, "none")
    transformers.T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="must hold a causal language model; got model_type 't5'"):
        Student.load(tmp_path / "t5", "t5")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"model_type 'gpt2' has no parameter \*\.self_attn\.q_proj\.weight"):
        Student.load(tmp_path / "gpt2", "gpt2")


def test_learning_rate_rises_and_falls() -> None:
    factors = [schedule(step, 12, 3) for step in range(1, 13)]
    assert factors[:3] == [1 / 3, 2 / 3, 1.0]
    assert all(a > b > 0 for a, b in zip(factors[2:], factors[3:], strict=False))


# --- the kernel check --------------------------------------------------------------------------------------------


def test_plain_definition_agrees_with_the_package() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 301, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 301, (16,), generator=generator)
    check_term("loss", kernel_check.fused_loss(logits, labels), kernel_check.eager_loss(logits, labels))


def test_kernel_check_measures_errors_and_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 4096, generator=generator)
    labels = torch.randint(0, 4096, (16,), generator=generator)
    calls = []
    result = kernel_check.check(logits, labels, lambda: calls.append(None))
    assert (result.rows, result.columns, result.logits_bytes, len(calls)) == (16, 4096, 262144, 3)
    eager, fused, plain = result.measured
    assert [eager.name, fused.name, plain.name] == ["eager", "fused", "cross-entropy alone"]
    # float32 cannot be exact, and an error of a tenth would mean that something else was computed.
    assert 0 < fused.gradient_error < 0.1
    assert 0 < eager.gradient_error < 0.1
    assert plain.loss_error is None
    # The gradient at least; eager keeps several tensors of that size.
    assert result.logits_bytes <= min(fused.extra_bytes, eager.extra_bytes)
    if COMPILED:
        assert 2 * fused.extra_bytes < eager.extra_bytes


def test_extra_bytes_is_a_peak() -> None:
    size = 1 << 20

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(size, dtype=torch.uint8)

    def together() -> None:
        held = [torch.empty(size, dtype=torch.uint8) for _ in range(3)]
        held.clear()

    assert size <= kernel_check.extra_bytes(one_after_the_other) < 2 * size
    assert 3 * size <= kernel_check.extra_bytes(together) < 4 * size


# --- the run -----------------------------------------------------------------------------------------------------


def lines_fit(text: str) -> bool:
    """Whether all lines but those of the backend table, which are not the demo's, have at most 120 characters."""
    return all(len(line) <= 120 for line in text[text.index("\n2. ") :].splitlines())


def test_report_has_its_sections_in_order(small_report: Report) -> None:
    text = small_report.text()
    marks = [
        "1. Backends",
        "caref_kernels backends for float32 logits on cpu",
        "2. Kernel check on 16 rows of 261 logits",
        "loss error",
        "extra bytes",
        "3. Held-out examples (4)",
        "zero-step",
        "CE ",
        "CAREF ",
        "4. Time",
        "s per step, of which the fused loss",
        "5. Accuracy",
        "Accuracy on 4 examples means nothing",
    ]
    places = []
    for mark in marks:
        places.append(text.index(mark, places[-1] if places else 0))
    assert lines_fit(text)
    assert text.count("answers to held-out example") == 2


def test_arms_start_alike_and_the_terms_add_up(small_report: Report, tiny_model: Path) -> None:
    zero, plain, caref = (arm.evaluation for arm in small_report.arms)
    assert [arm.name for arm in small_report.arms] == ["zero-step", "CE", "CAREF"]
    assert len({zero.ce, plain.ce, caref.ce}) == 3
    for row in (zero, plain, caref):
        assert row.generated == len(row.answers) == 2
        assert row.kl < np.log(261)
        assert 0 < row.answer_entropy < np.log(261)
    # A random model is nearly uniform over its 261 tokens.
    assert abs(zero.ce - np.log(261)) < 0.2
    assert [arm.timing and arm.timing.steps for arm in small_report.arms] == [None, 2, 2]


def test_run_is_repeatable(small_report: Report, tiny_model: Path) -> None:
    again = tour.run(small_settings(tiny_model))
    assert [arm.evaluation for arm in again.arms] == [arm.evaluation for arm in small_report.arms]


def test_training_lowers_the_loss(tiny_model: Path) -> None:
    recipe = tour.Recipe(learning_rate=0.05)
    settings = dataclasses.replace(small_settings(tiny_model), shots=16, recipe=recipe)
    zero, plain, caref = (arm.evaluation for arm in tour.run(settings).arms)
    assert plain.ce < zero.ce
    assert caref.ce + 0.1 * caref.sced + 0.1 * caref.kl < zero.ce + 0.1 * zero.sced + 0.1 * zero.kl


def test_diverging_training_stops(tiny_model: Path) -> None:
    recipe = tour.Recipe(learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is (nan|inf)"):
        tour.run(dataclasses.replace(small_settings(tiny_model), shots=16, recipe=recipe))


def test_report_is_written_whole_as_text_or_json(small_report: Report, tmp_path: Path) -> None:
    write(small_report, tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == small_report.text()
    write(small_report, tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["arms"][2]["evaluation"]["ce"] == small_report.arms[2].evaluation.ce
    broken = dataclasses.replace(small_report, total_seconds=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(broken, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.txt"]


def test_generated_control_characters_stay_out_of_the_report(small_report: Report) -> None:
    arm = small_report.arms[0]
    evil = dataclasses.replace(arm.evaluation, answers=("\x1b[2Jchoice1 because\r\n\u202ea", "x" * 500))
    text = dataclasses.replace(small_report, arms=(dataclasses.replace(arm, evaluation=evil),)).text()
    assert "[2Jchoice1 because a" in text
    assert all(character.isprintable() or character == "\n" for character in text)
    assert lines_fit(text)


def test_command_runs_the_whole_demo(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    threads = str(torch.get_num_threads())
    out = tmp_path / "report.txt"
    assert main(["--model", str(tiny_model), "--seed", "1", "--threads", threads, "--out", str(out)]) == 0
    output = capsys.readouterr()
    assert output.out == out.read_text(encoding="utf-8")
    assert "12 steps of 4" in output.out
    assert "48 for training, 24 held out, seed 1" in output.out
    assert "expected to finish in about" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], r"argument --seed: must be an integer in \[0, 4294967295\]; got '-1'"),
        (["--seed", "x"], r"argument --seed: must be an integer in .*; got 'x'"),
        (["--threads", "0"], r"argument --threads: must be an integer in \[1, 1024\]; got '0'"),
        (["--dataset", "snli", "--data", "."], r"argument --dataset: invalid choice: 'snli' \(choose from .*esnli"),
        (["--data", "."], "--data and --dataset belong together"),
        (["--dataset", "comve"], "--data and --dataset belong together"),
        (["--data", "no/such", "--dataset", "comve"], "--data: no such folder: no/such"),
        (["--model", "no/such"], "--model: no such folder: no/such"),
        (["--cos-e-version", "v2"], r"argument --cos-e-version: invalid choice: 'v2' \(choose from .*v1\.11"),
    ],
)
def test_bad_arguments_are_named(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/report.txt"], "--out: no such folder: no/such"),
        (["--data", "{empty}", "--dataset", "esnli"], r"esnli: no such file: .*esnli_train_1\.csv"),
        (["--model", "{empty}"], r"--model: no such file: .*config\.json"),
    ],
)
def test_missing_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main([argument.replace("{empty}", str(tmp_path)) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_demo_imports_only_the_public_interface() -> None:
    """The rest of the package is reached through ``caref_kernels`` and ``caref_kernels.harness`` alone."""
    folder = Path(tour.__file__).parent
    imports = [
        match[1]
        for path in folder.glob("*.py")
        for match in re.finditer(r"^ *(?:from|import) (\.\.\S*|caref_kernels\S*)", path.read_text(), re.MULTILINE)
    ]
    assert imports
    assert set(imports) <= {"..", "..harness"}
