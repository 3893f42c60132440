"""Token weights, the z-loss and label smoothing of a model with the CAREF loss, and in a Trainer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from caref_kernels import backends, caref_loss
from caref_kernels.testing import check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

import tiny_heads  # noqa: E402 - after the guards above
from tiny_heads import rows_of  # noqa: E402
from tiny_trainers import make_trainer, records_with  # noqa: E402

from caref_kernels.integrations.transformers import apply_caref, attach_caref  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:.*tied.*:UserWarning"
)
BACKEND = next(name for name in backends.ORDER if backends.get(name).unsupported(torch.empty(1, 2)) is None)
FORMS = pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
KINDS = pytest.mark.parametrize("kind", ["llama", "t5"])


def applied(kind: str, fuse_head: bool):
    model = apply_caref(tiny_heads.make(kind), fuse_head=fuse_head, backend=BACKEND)
    return model, *tiny_heads.batch(model)


@FORMS
@KINDS
@pytest.mark.parametrize("number", [None, 7])
def test_token_weights_of_a_batch(kind, fuse_head, number):
    """They belong to the labels, and are shifted with them."""
    model, inputs, labels = applied(kind, fuse_head)
    weights = torch.linspace(0.1, 2, labels.numel()).reshape(labels.shape)
    aligned = weights if kind == "t5" else pad(weights, (0, 1))[..., 1:]
    logits, targets = rows_of(model, inputs, labels)
    valid = labels if kind == "t5" else pad(labels, (0, 1), value=-100)[..., 1:]
    expected = caref_loss(
        logits, targets, token_weights=aligned[valid != -100], num_items=number, backend=BACKEND
    ).detach()
    batch = {**inputs, "labels": labels, "num_items_in_batch": number}
    check_identity(model(**batch, token_weights=weights).loss.detach(), expected, "float32_terms")
    assert torch.equal(model(**batch, token_weights=torch.ones(labels.shape)).loss, model(**batch).loss)
    with pytest.raises(ValueError, match="token_weights: expected shape"):
        model(**batch, token_weights=torch.ones(labels.size(0), labels.size(1) + 1))


@FORMS
def test_token_weights_of_shift_labels_are_used_as_they_are(fuse_head):
    model, inputs, labels = applied("llama", fuse_head)
    shifted, weights = labels.roll(2, -1), torch.linspace(0.1, 2, labels.numel()).reshape(labels.shape)
    logits, targets = rows_of(model, inputs, labels, shifted)
    expected = caref_loss(logits, targets, token_weights=weights[shifted != -100], backend=BACKEND).detach()
    loss = model(**inputs, labels=labels, shift_labels=shifted, token_weights=weights).loss
    check_identity(loss.detach(), expected, "float32_terms")


@FORMS
def test_virtual_tokens_have_no_weight(fuse_head):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = apply_caref(peft.get_peft_model(tiny_heads.make("llama"), config), fuse_head=fuse_head, backend=BACKEND)
    inputs, labels = tiny_heads.batch(model.get_base_model())
    ones, twos = (torch.full(labels.shape, value) for value in (1.0, 2.0))
    losses = [model(**inputs, labels=labels, token_weights=weights).loss for weights in (None, ones, twos)]
    assert torch.equal(losses[0], losses[1])
    check_identity(losses[2].detach(), 2 * losses[0].detach(), "float32_terms")


@FORMS
@KINDS
def test_token_weights_of_the_examples(kind, fuse_head, tmp_path):
    """A weight of 2 for every label doubles loss and terms, in training and evaluation."""
    records = []
    for weight in (1.0, 2.0):
        trainer = make_trainer(kind, tmp_path, learning_rate=0.0, remove_unused_columns=False)
        for data in (trainer.train_dataset, trainer.eval_dataset):
            data[:] = [{**row, "token_weights": torch.full(row["labels"].shape, weight)} for row in data]
        attach_caref(trainer, fuse_head=fuse_head, backend=BACKEND)
        trainer.train()
        records.append({**records_with(trainer, "loss")[0], **trainer.evaluate()})
    for name in ("loss", "ce", "sced", "kl", "eval_loss", "eval_ce", "eval_sced", "eval_kl"):
        check_identity(torch.tensor(records[1][name]), torch.tensor(2 * records[0][name]), "float32_terms", name)


# ------------------------------------------------------------------------------------------- z-loss and label smoothing


@FORMS
@KINDS
def test_extra_terms_of_a_model(kind, fuse_head):
    options = {"lambda_z": 1e-3, "label_smoothing": 0.1}
    model = apply_caref(tiny_heads.make(kind), fuse_head=fuse_head, backend=BACKEND, **options)
    inputs, labels = tiny_heads.batch(model)
    expected = caref_loss(*rows_of(model, inputs, labels), backend=BACKEND, **options)
    check_identity(model(**inputs, labels=labels).loss.detach(), expected.detach(), "float32_terms")


@FORMS
@KINDS
def test_the_smoothing_of_a_trainer_is_that_of_the_loss(kind, fuse_head, tmp_path):
    """Without regularisers it is the Trainer's own smoothed loss."""
    losses = []
    for attach in (True, False):
        trainer = make_trainer(kind, tmp_path, learning_rate=0.0, label_smoothing_factor=0.2)
        if attach:
            attach_caref(trainer, fuse_head=fuse_head, lambda_sced=0, lambda_kl=0, backend=BACKEND)
            assert trainer.label_smoother is None
        trainer.train()
        losses.append((records_with(trainer, "loss")[0]["loss"], trainer.evaluate()["eval_loss"]))
    for ours, own in zip(*losses, strict=True):
        check_identity(torch.tensor(ours), torch.tensor(own), "float32_terms")
