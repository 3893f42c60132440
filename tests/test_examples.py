"""Every recipe of examples/: two steps of SGD against float64, however its labels are spread over ranks and batches.

One process imports the frameworks and forks those that run the recipes (example_runs.py), so that all of them take less
than a minute; this file compares what they wrote.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from caref_kernels.testing import IDENTITIES, check_identity

# Found, not imported: their warnings about one another are not for this process.
_FRAMEWORKS = ("transformers", "accelerate", "datasets", "deepspeed", "lightning", "trl")
_MISSING = [name for name in _FRAMEWORKS if importlib.util.find_spec(name) is None]
if _MISSING:
    pytest.skip(f"the recipes need {', '.join(_MISSING)}", allow_module_level=True)

import example_runs  # noqa: E402 - after the guards above

sys.path.insert(0, str(example_runs.EXAMPLES))
import tiny  # noqa: E402 - the folder of the recipes is no package

LR = 0.5
LAMBDA_SCED, LAMBDA_KL = 0.1, 0.1


def exact_rows(logits: torch.Tensor, labels: torch.Tensor, weights=(LAMBDA_SCED, LAMBDA_KL)) -> torch.Tensor:
    """The loss of every row that has a label, in float64, as the paper writes it."""
    valid = labels != -100
    logits, labels = logits[valid].double(), labels[valid]
    log_p = logits.log_softmax(-1)
    p, log_ratio = log_p.exp(), log_p + torch.log(torch.tensor(float(logits.size(-1)), dtype=torch.float64))
    sced = ((p * log_ratio).abs().pow(2) * (1 - p)).sum(-1)
    kl = (p * log_ratio).sum(-1)
    return -log_p.gather(-1, labels[:, None])[:, 0] + weights[0] * sced + weights[1] * kl


def exact_loss(model, batch: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """The mean over all labels of the batch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        previous = functional.pad(labels.clamp_min(model.config.pad_token_id), (1, 0), value=0)[:, :-1]
        return exact_rows(model(**inputs, decoder_input_ids=previous).logits, labels, **options).mean()
    return exact_rows(model(**inputs).logits[:, :-1], labels[:, 1:], **options).mean()


def exact_steps(build, step_loss=exact_loss) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The parameters after the two steps that a recipe makes, and the loss of each, in float64."""
    model, data, losses = build().double().train(), tiny.examples(), []
    for first in range(0, len(data), tiny.STEP_SIZE):
        step = data[first : first + tiny.STEP_SIZE]
        loss = step_loss(model, {name: torch.stack([example[name] for example in step]) for name in step[0]})
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= LR * gradient
        losses.append(loss.item())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def test_recipes_make_the_exact_steps(subtests, tmp_path):
    """On one process and on two, with accumulation 1, 2 or 4, with and without the logits."""
    root = example_runs.EXAMPLES.parent
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(Path(example_runs.__file__)), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert run.returncode == 0, run.stderr
    expected = {build: exact_steps(build) for build in (tiny.causal_model, tiny.seq2seq_model)}
    for recipe, world in example_runs.RUNS:
        parameters, losses = expected[tiny.seq2seq_model if recipe == "seq2seq_t5" else tiny.causal_model]
        if recipe == "lightning_module":  # it logs the mean of the steps of an epoch
            losses = [sum(losses) / len(losses)]
        for rank in range(world):
            with subtests.test(recipe=recipe, world=world, rank=rank):
                file = tmp_path / example_runs.result_name(recipe, world, rank)
                assert file.exists(), f"no result within {example_runs.TIMEOUT} s: {run.stdout}{run.stderr}"
                results = torch.load(file)
                assert not isinstance(results, str), results
                assert list(results) == example_runs.options_of(recipe)
                for options, result in results.items():
                    check_steps(result["parameters"], parameters, str(options))
                    check_identity(torch.tensor(result["losses"]), torch.tensor(losses), "float32_terms", str(options))


def check_steps(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], label: str) -> None:
    assert list(actual) == list(expected)
    for name, parameter in expected.items():
        check_identity(actual[name], parameter, "float32_gradient", f"{label} {name}")


# ------------------------------------------------------------------------------------ what the comparison would notice


def _per_rank(model, batch):
    """The mean of the two ranks' own means: a divisor that does not count the labels of all ranks."""
    halves = [{name: value[rank::2] for name, value in batch.items()} for rank in range(2)]
    return sum(exact_loss(model, half) for half in halves if (half["labels"][:, 1:] != -100).any()) / 2


WRONG = {
    "cross-entropy alone": lambda model, batch: exact_loss(model, batch, weights=(0, 0)),
    "without SCED": lambda model, batch: exact_loss(model, batch, weights=(0, LAMBDA_KL)),
    "without KL": lambda model, batch: exact_loss(model, batch, weights=(LAMBDA_SCED, 0)),
    "divided by the ranks": lambda model, batch: exact_loss(model, batch) / 2,
    "a mean per rank": _per_rank,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("build", [tiny.causal_model, tiny.seq2seq_model])
def test_a_wrong_loss_makes_other_steps(build, wrong):
    expected, actual = exact_steps(build)[0], exact_steps(build, WRONG[wrong])[0]
    different = [
        name
        for name, parameter in expected.items()
        if (actual[name] - parameter).norm() > 10 * IDENTITIES["float32_gradient"] * parameter.norm()
    ]
    assert len(different) > len(expected) / 2


def test_a_rank_without_labels_occurs():
    """In the first step one of two ranks has none, whether batches or examples are dealt out."""
    first = torch.stack([example["labels"] for example in tiny.examples()[: tiny.STEP_SIZE]])
    counts = (first != -100).sum(-1).tolist()
    assert counts[1::2] == counts[4:] == [0] * 4
    assert sum(counts) > 0
    assert len({int((example["labels"] != -100).sum()) for example in tiny.examples()[tiny.STEP_SIZE :]}) > 5


def test_every_recipe_is_run():
    """Here, or in test_demo.py, which runs the last two of those that are left out."""
    scripts = {path.stem for path in example_runs.EXAMPLES.glob("*.py")} - {"tiny", "finetune_smollm2", "kernel_check"}
    assert scripts == {recipe.split()[0] for recipe in example_runs.WORLDS}
