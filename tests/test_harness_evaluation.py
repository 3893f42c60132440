"""Encoding for both kinds of models, and answers, likelihoods and entropies against one example at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")

import tiny_llama  # noqa: E402
from tiny_experiments import KINDS, save_model  # noqa: E402

from caref_kernels.harness import Encoder, Example, embedded_examples  # noqa: E402
from caref_kernels.harness.encoding import BECAUSE, EXPLANATION, LABEL  # noqa: E402
from caref_kernels.harness.evaluation import Evaluator, num_kept  # noqa: E402
from caref_kernels.harness.metrics import calibration  # noqa: E402
from caref_kernels.testing import check_identity  # noqa: E402

QUESTION = Example("q", ("Where?",), ("The Box", "a Hat", "x"), 1, "a Hat", ("It SITS there.",), "train")


def by_part(encoder: Encoder, example: Example) -> list[str]:
    item = encoder(example)
    texts = ["", "", ""]
    for token, part in zip(item.target[:-1], item.parts[:-1], strict=True):
        texts[part] += encoder.tokenizer.decode([token])
    assert (item.target[-1], item.parts[-1]) == (encoder.tokenizer.eos_token_id, EXPLANATION)
    return texts


@pytest.mark.parametrize("tokenizer", [tiny_llama.tiny_tokenizer(), transformers.ByT5Tokenizer()], ids=["fast", "slow"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_parts_of_a_target(tokenizer, causal: bool) -> None:
    blank = " " if causal else ""
    texts = by_part(Encoder("ecqa", tokenizer, causal), QUESTION)
    assert texts == [f"{blank}a hat", " because", " it sits there."]
    assert (LABEL, BECAUSE, EXPLANATION) == (0, 1, 2)


def test_prompts_end_as_the_model_needs_them() -> None:
    fast, slow = tiny_llama.tiny_tokenizer(), transformers.ByT5Tokenizer()
    causal = Encoder("ecqa", fast, True)
    assert fast.decode(causal(QUESTION).prompt) == "explain where? \\n (A) the box (B) a hat (C) x\nanswer:"
    prompt = Encoder("ecqa", slow, False)(QUESTION).prompt
    assert (slow.decode(prompt[:-1])[-5:], prompt[-1]) == ("(C) x", slow.eos_token_id)
    assert [fast.decode(tokens) for tokens in causal.candidates(QUESTION)] == [
        " the box because",
        " a hat because",
        " x because",
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_long_texts_are_cut_and_counted(causal: bool) -> None:
    tokenizer = tiny_llama.tiny_tokenizer() if causal else transformers.ByT5Tokenizer()
    whole = Encoder("ecqa", tokenizer, causal)(QUESTION)
    encoder = Encoder("ecqa", tokenizer, causal, max_source=20, max_target=9)
    item = encoder(QUESTION)
    assert (len(item.prompt), len(item.target), len(item.parts)) == (20, 9, 9)
    assert item.target == (*whole.target[:8], tokenizer.eos_token_id)
    tail = len(tokenizer("\nanswer:")["input_ids"]) if causal else 1
    assert item.prompt == (*whole.prompt[: 20 - tail], *whole.prompt[-tail:])
    assert encoder.is_cut(QUESTION)
    assert not Encoder("ecqa", tokenizer, causal, max_source=999, max_target=999).is_cut(QUESTION)


@pytest.fixture(scope="module", params=KINDS)
def evaluator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    folder = save_model(tmp_path_factory.mktemp("model"), request.param)
    causal = request.param == "llama"
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSeq2SeqLM
    # In float32 the model's own rounding, in batches or not, reaches 1e-5 on some processors.
    model = kind.from_pretrained(folder).eval().double()
    with torch.no_grad():
        # Random models are nearly uniform, where a mistake would not show.
        for parameter in model.parameters():
            parameter.mul_(3.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Evaluator(model, Encoder("comve", tokenizer, causal), 4, lambda: None)


def log_probs(evaluator: Evaluator, prompt: tuple[int, ...], target: tuple[int, ...]) -> torch.Tensor:
    """(T, V) float64, one sequence without padding."""
    model = evaluator.model
    with torch.no_grad():
        if evaluator.encoder.causal:
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        else:
            decoder = torch.tensor([(model.config.decoder_start_token_id, *target[:-1])])
            logits = model(torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
    return logits.double().log_softmax(-1)


def test_likelihoods_of_the_options_are_sums_over_their_tokens(evaluator: Evaluator) -> None:
    examples = embedded_examples("dev")[:5]
    table = []
    for example in examples:
        prompt = evaluator.encoder.prompt(example)
        row = []
        for candidate in evaluator.encoder.candidates(example):
            rows = log_probs(evaluator, prompt, candidate)
            row.append(rows[range(len(candidate)), list(candidate)].sum())
        table.append(torch.stack(row))
    expected = calibration(torch.stack(table), torch.tensor([example.label for example in examples]))
    actual = evaluator.calibration(examples)
    assert actual.keys() == expected.keys()
    for name in ("nll", "brier", "confidence", "choice_accuracy"):
        check_identity(torch.tensor(actual[name]), torch.tensor(expected[name]), "float32_terms", name)


def test_entropies_and_likelihoods_of_the_targets(evaluator: Evaluator) -> None:
    examples = embedded_examples("dev")[:5]
    nll, entropy, parts = [], [], []
    for example in examples:
        item = evaluator.encoder(example)
        rows = log_probs(evaluator, item.prompt, item.target)
        nll.append(-rows[range(len(item.target)), list(item.target)])
        entropy.append(-(rows.exp() * rows).sum(-1))
        parts += item.parts
    nll, entropy, part = torch.cat(nll), torch.cat(entropy), torch.tensor(parts)
    expected = {
        "label_nll": nll[part == LABEL].mean(),
        "label_entropy": entropy[part == LABEL].mean(),
        "explanation_nll": nll[part == EXPLANATION].mean(),
        "explanation_entropy": entropy[part == EXPLANATION].mean(),
    }
    actual = evaluator.targets(examples)
    for name, value in expected.items():
        check_identity(torch.tensor(actual[name]), value, "float32_terms", name)
    assert abs(actual["k_t"] - num_kept(entropy).mean()) <= 0.1


def test_answers_do_not_depend_on_the_batch(evaluator: Evaluator) -> None:
    examples = embedded_examples("dev")[:5]
    together = evaluator.answers(examples, 6)
    alone = [evaluator.answers([example], 6)[0] for example in examples]
    assert together == alone
    assert any(together)


def test_num_kept_is_the_ceiling_of_the_perplexity() -> None:
    assert num_kept(torch.tensor([0.0, 0.5, 5.0], dtype=torch.float64)).tolist() == [1.0, 2.0, 149.0]


@pytest.mark.parametrize("causal", [True, False])
def test_the_logged_num_kept_is_of_the_target_rows(causal: bool) -> None:
    """Two target rows, of one token and of four equal ones; the rows of the prompt and of the padding are not asked."""
    pytest.importorskip("peft")
    from caref_kernels.harness.training import NumKeptCallback

    trainer = SimpleNamespace(
        compute_loss=lambda model, inputs, return_outputs, items: (torch.tensor(7.0), model(inputs)),
        state=SimpleNamespace(global_step=3, log_history=[{"loss": 1.0}]),
        args=SimpleNamespace(logging_steps=2),
    )
    callback = NumKeptCallback(trainer, causal)
    peak, even, flat = torch.tensor([50.0, 0, 0, 0, 0]), torch.tensor([0.0, 0, 0, 0, -50]), torch.zeros(5)
    rows, labels = [flat, peak, even, flat], [-100, -100, 1, 2] if causal else [-100, 1, 2, -100]
    inputs = {"labels": torch.tensor([labels])}
    assert trainer.compute_loss(lambda _: {"logits": torch.stack(rows)[None]}, inputs, num_items_in_batch=2) == 7.0
    logs = {"loss": 1.0}
    callback.on_log(trainer.args, trainer.state, None, logs)
    assert logs["k_t"] == trainer.state.log_history[-1]["k_t"]
    # ceil(exp(0)) and ceil(exp(log 4)), which rounding may put just above 4.
    assert logs["k_t"] in (2.5, 3.0, 3.5)
    trainer.state.global_step = 4
    loss, outputs = trainer.compute_loss(lambda _: {"logits": torch.zeros(1, 4, 5)}, inputs, True, 2)
    assert (loss, outputs["logits"].shape) == (7.0, (1, 4, 5))
    callback.on_log(trainer.args, trainer.state, None, logs := {"loss": 1.0})
    assert logs["k_t"] in (2.5, 3.0, 3.5)


def test_importing_the_harness_needs_no_extra() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import caref_kernels.harness; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "sys.exit(str(sorted(new - set(sys.stdlib_module_names) - {'caref_kernels', 'torch'})) "
        "if new - set(sys.stdlib_module_names) - {'caref_kernels', 'torch'} else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert done.returncode == 0, done.stderr
