"""``make demo``, examples/finetune_smollm2.py, from end to end on a tiny random model, and its parts."""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
for module in ("accelerate", "gguf", "rich"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune_smollm2 as demo  # noqa: E402 - the folder of the recipes is no package
import kernel_check  # noqa: E402
from tiny_llama import save, tiny_tokenizer  # noqa: E402

from caref_kernels.harness import Encoder, check_tokens, embedded_examples  # noqa: E402
from caref_kernels.harness.models import Source, load_pretrained  # noqa: E402
from caref_kernels.testing import check_identity, check_term  # noqa: E402

# Without a compiled backend the demo runs on the reference, which says so.
pytestmark = pytest.mark.filterwarnings("ignore:caref_kernels runs its plain-PyTorch reference:RuntimeWarning")
SECTIONS = ("1. Backends", "2. Kernel check", "3. Held-out examples", "4. Time", "5. Accuracy")


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """The demo silences two of them for its process."""
    verbosity, deepspeed = transformers.logging.get_verbosity(), logging.getLogger("DeepSpeed").disabled
    yield
    transformers.logging.set_verbosity(verbosity)
    logging.getLogger("DeepSpeed").disabled = deepspeed


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and its tokenizer."""
    return save(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, four held-out examples and as little of everything else."""
    monkeypatch.setattr(demo, "SIZES", demo.Sizes(train=8, dev=4))
    for name, value in (("ANSWERED", 2), ("NEW_TOKENS", 4), ("CHECKED_ROWS", 16)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(kernel_check, "_milliseconds", lambda function, logits, labels: 1.0)


def report(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    code = demo.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def figures(text: str) -> dict[str, list[float]]:
    """The numbers of the three held-out rows: label NLL, explanation NLL, label entropy, ce, sced, kl."""
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if len(line) == 8 and "/" in line[1]]
    return {name: [float(cell) for cell in cells] for name, _, *cells in rows}


# --- examples and rows -------------------------------------------------------------------------------------------


def test_only_the_target_has_labels() -> None:
    item = Encoder("comve", tiny_tokenizer(), causal=True)(embedded_examples("train")[0])
    tokens = demo.tokens_of(item)
    assert tokens["input_ids"] == [*item.prompt, *item.target]
    assert tokens["labels"] == [-100] * len(item.prompt) + list(item.target)
    assert tokens["attention_mask"] == [1] * len(tokens["input_ids"])


def test_foreign_tokenizer_and_long_examples_are_refused() -> None:
    items = [Encoder("comve", tiny_tokenizer(), causal=True)(embedded_examples("train")[0])]
    with pytest.raises(ValueError, match=r"token \d+ is not below the model's 10 embeddings"):
        check_tokens(items, 10, 512)
    with pytest.raises(ValueError, match="at most 20 tokens fit into the model"):
        check_tokens(items, 512, 20)


def test_target_rows_predict_the_labels_and_padding_changes_none(tiny_model: Path) -> None:
    model = load_pretrained(Source(str(tiny_model), "tiny"))
    encoder = Encoder("comve", tiny_tokenizer(), causal=True)
    items = [encoder(example) for example in embedded_examples("train")[:3]]
    collate = transformers.DataCollatorForSeq2Seq(encoder.tokenizer)
    features = [demo.tokens_of(item) for item in items]
    together, labels = kernel_check.target_rows(model, [collate(features)], 1000)
    alone, _ = kernel_check.target_rows(model, (collate([feature]) for feature in features), 1000)
    assert labels.tolist() == [token for item in items for token in item.target]
    check_identity(together, alone, "float32", "rows")
    few, _ = kernel_check.target_rows(model, (collate([feature]) for feature in features), 5)
    check_identity(few, alone[:5], "float32", "rows")


def test_only_query_projections_are_trained(tiny_model: Path) -> None:
    model = load_pretrained(Source(str(tiny_model), "tiny"))
    trained = demo.freeze(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    assert len(trained) == 2


def test_unsuitable_models_are_refused() -> None:
    special = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **special)
    sizes = {
        f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    bart = transformers.BartConfig(d_model=16, pad_token_id=2, decoder_start_token_id=2, **sizes, **special)
    for model in (transformers.GPT2LMHeadModel(gpt2), transformers.BartForConditionalGeneration(bart)):
        with pytest.raises(ValueError, match=rf"--model must be a causal model .*; got {type(model).__name__}"):
            demo.freeze(model)


# --- the kernel check --------------------------------------------------------------------------------------------


def random_rows(columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, columns, generator=generator, dtype=dtype)
    return logits, torch.randint(0, columns, (16,), generator=generator)


def test_plain_definition_agrees_with_the_package() -> None:
    rows = random_rows(301, torch.float64)
    check_term("loss", kernel_check.fused(*rows), kernel_check.written_out(*rows))


def test_kernel_check_measures_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(4096, torch.float32)
    names = [line.split("  ")[1] for line in kernel_check.check(*rows)[1:4]]
    assert names == ["written out", "caref_loss", "cross-entropy"]

    def errors() -> list[float]:
        return [float(cell) for cell in kernel_check.check(*rows)[2].split()[1:3]]

    # float32 cannot be exact, and an error of a tenth would mean that something else was computed.
    assert all(0 < error < 0.1 for error in errors())
    wrong = lambda logits, labels: kernel_check.fused(logits, labels) * 1.5  # noqa: E731
    monkeypatch.setitem(kernel_check.LOSSES, "caref_loss", wrong)
    assert all(0.4 < error < 0.6 for error in errors())


def test_the_share_of_the_loss_is_of_the_step(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def milliseconds(function, logits, labels) -> float:
        calls.append((function, logits.shape, labels.tolist()))
        return 50.0

    monkeypatch.setattr(kernel_check, "_milliseconds", milliseconds)
    model = load_pretrained(Source(str(tiny_model), "tiny"))
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "labels": torch.tensor([[-100, 1, 2, 3], [-100, -100, 6, 7]])}
    lines = kernel_check.time_steps(model, batch, {"CAREF": 0.5})
    assert "0.50 s per step, of which the loss takes 50.0 ms, 10.0 %" in lines[0]
    assert "on the 8 rows of a batch, 5 with a label" in lines[1]
    assert [function for function, *_ in calls] == list(kernel_check.LOSSES.values())
    assert all(call[1:] == ((8, 261), [1, 2, 3, -100, -100, 6, 7, -100]) for call in calls)


# --- the run -----------------------------------------------------------------------------------------------------


def test_report_has_its_sections_and_rows(small, tiny_model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "report.txt"
    text = report(["--model", str(tiny_model), "--seed", "1", "--out", str(out)], capsys)
    assert text == out.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]
    positions = [text.index(f"\n{section}") for section in SECTIONS]
    assert positions == sorted(positions)
    assert "tiny-llama, query projections trained (2,048 of 23,872 parameters)" in text
    assert "8 for training, 4 held out, seed 1" in text
    assert "2 steps of 4" in text
    assert "caref_kernels backends for float32 logits on cpu" in text
    assert "2. Kernel check on 16 rows of 261 logits" in text
    assert text.endswith("Accuracy on 4 examples means nothing and is not shown: " + demo.NOTE.split(": ")[1] + "\n")
    assert all(len(line) <= 120 for line in text.splitlines() if "not available" not in line)
    rows = figures(text)
    assert list(rows) == ["untrained", "cross-entropy", "CAREF"]
    # A random model is nearly uniform over its 261 tokens.
    assert all(abs(value - 5.56) < 0.2 for row in rows.values() for value in row[:4])
    assert figures(report(["--model", str(tiny_model), "--seed", "1"], capsys)) == rows


def test_training_lowers_each_loss(small, tiny_model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the figures of the report; both runs begin with the same model, and differ."""
    monkeypatch.setattr(demo, "SIZES", demo.Sizes(train=48, dev=24))
    rows = figures(report(["--model", str(tiny_model), "--lr", "0.3"], capsys))
    ce, sced, kl = (dict(zip(rows, column, strict=True)) for column in list(zip(*rows.values(), strict=True))[3:])
    assert ce["cross-entropy"] < ce["untrained"]
    loss = {name: ce[name] + 0.1 * sced[name] + 0.1 * kl[name] for name in rows}
    assert loss["CAREF"] < loss["untrained"]


def test_both_runs_start_from_the_same_values_and_batches(small, tiny_model: Path, monkeypatch) -> None:
    seen = []

    class Recorder(demo.Steps):
        def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs) -> None:
            queries = [p.detach().clone() for p in model.parameters() if p.requires_grad]
            seen.append((queries, args.seed, train_dataloader.dataset))

    monkeypatch.setattr(demo, "Steps", Recorder)
    demo.run(demo.parse(["--model", str(tiny_model), "--lr", "0.3"]), lambda what: None)
    (first, seed, examples), (second, *others) = seen
    assert [seed, examples] == others
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_diverging_training_stops(small, tiny_model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SIZES", demo.Sizes(train=24, dev=4))
    assert demo.main(["--model", str(tiny_model), "--lr", "1e38"]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(r"finetune_smollm2: error: cross-entropy, step \d: the loss is (nan|inf)", line)


def test_generated_control_characters_stay_out_of_the_report() -> None:
    evil = "\x1b[2Jchoice1 because\r\n\u202ea"
    lines = demo.row_lines({"CAREF": ("1/1", [0.0] * 6, evil), "other": ("0/1", [0.0] * 6, "x" * 500)})
    assert lines[-2] == "    CAREF         [2Jchoice1 because a"
    assert all(character.isprintable() for line in lines for character in line)
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], r"--seed must be in \[0, 4294967295\]; got -1"),
        (["--seed", "x"], r"argument --seed: invalid int value: 'x'"),
        (["--threads", "0"], r"--threads must be in \[1, 1024\]; got 0"),
        (["--dataset", "snli", "--data", "."], r"argument --dataset: invalid choice: 'snli' \(choose from .*esnli"),
        (["--data", "."], "--data and --dataset belong together"),
        (["--dataset", "comve"], "--data and --dataset belong together"),
        (["--data", "no/such", "--dataset", "comve"], "--data: no such folder: no/such"),
        (["--model", "no/such"], "--model: no such folder: no/such"),
        (["--cos-e-version", "v2"], r"argument --cos-e-version: invalid choice: 'v2' \(choose from .*v1\.11"),
        (["--out", "no/such/report.txt"], "--out: no such folder: .*no/such"),
    ],
)
def test_bad_arguments_are_named(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{empty}", "--dataset", "esnli"], r"esnli: no such file: .*esnli_train_1\.csv"),
        (["--model", "{empty}"], r"Unrecognized model in .*config\.json"),
    ],
)
def test_missing_files_are_one_line(tmp_path: Path, capsys, arguments: list[str], message: str, monkeypatch) -> None:
    monkeypatch.setattr(demo, "smollm2", lambda: None)
    assert demo.main([argument.replace("{empty}", str(tmp_path)) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_an_interrupted_demo_keeps_the_older_report(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.txt").write_text("older", encoding="utf-8")

    def interrupted(options, advance) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert demo.main(["--out", str(tmp_path / "report.txt")]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "finetune_smollm2: interrupted"
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["older"]


def test_the_bar_counts_every_piece(small, tiny_model: Path) -> None:
    pieces: list[str] = []
    demo.run(demo.parse(["--model", str(tiny_model)]), pieces.append)
    assert len(pieces) == len(demo.RUNS) * (demo.SIZES.train // demo.BATCH + 1) + 3
    assert pieces[0] == "untrained: evaluation"
    assert "CAREF: step 2 of 2" in pieces


def test_recipes_import_the_public_interface() -> None:
    """The package is reached through its public modules, and it imports no recipe."""
    for name in ("finetune_smollm2", "kernel_check"):
        tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {name for name in modules if name.startswith("caref_kernels")}
        assert "caref_kernels" in ours
        assert all(re.fullmatch(r"caref_kernels(\.(harness|integrations)(\.\w+)?)?", name) for name in ours)
    package = Path(importlib.util.find_spec("caref_kernels").submodule_search_locations[0])
    outside = {path.stem for path in EXAMPLES.glob("*.py")} | {"examples", "tests", "benchmarks", "tools"}
    for path in package.rglob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
        assert not imported & outside, path
