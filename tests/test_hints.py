"""Errors name the likely mistake: another library's argument order, a misplaced vocabulary, a misspelling."""

from __future__ import annotations

import inspect

import pytest
import torch

from caref_kernels import (
    CarefConfig,
    CarefLoss,
    LinearCarefLoss,
    SCEDLoss,
    VocabShard,
    caref_loss,
    fused_sced,
    linear_caref_loss,
)

LOGITS, LABELS = torch.zeros(2, 7, 5), torch.zeros(2, 7, dtype=torch.long)
HIDDEN, WEIGHT = torch.zeros(2, 7, 4), torch.zeros(5, 4)
LINEAR = r"linear_caref_loss takes \(hidden, weight, labels\)"
SHARD = VocabShard(None, 0, 5, 5)
FIRST = r"labels of shape \(B, T\) fit {0} transposed to \(B, T, V\): pass {0}.transpose\(1, 2\)"

CALLS = {
    "Liger's order": (lambda: linear_caref_loss(WEIGHT, HIDDEN, LABELS), "hidden and weight look swapped: " + LINEAR),
    "Liger's order, flat": (
        lambda: linear_caref_loss(WEIGHT, HIDDEN.flatten(0, 1), LABELS.flatten()),
        "hidden and weight look swapped: " + LINEAR,
    ),
    "Liger's order, module": (
        lambda: LinearCarefLoss()(WEIGHT, HIDDEN, LABELS),
        "hidden and weight look swapped: " + LINEAR,
    ),
    "Liger's order, sharded": (
        lambda: linear_caref_loss(WEIGHT, HIDDEN, LABELS, shard=SHARD),
        "hidden and weight look swapped: " + LINEAR,
    ),
    "labels before the weight": (
        lambda: linear_caref_loss(HIDDEN, LABELS, WEIGHT),
        "labels and weight look swapped: " + LINEAR,
    ),
    "labels before the weight, sharded": (
        lambda: linear_caref_loss(HIDDEN, LABELS, WEIGHT, shard=SHARD),
        "labels and weight look swapped: " + LINEAR,
    ),
    "labels before the logits": (
        lambda: caref_loss(LABELS, LOGITS),
        r"logits and labels look swapped: caref_loss takes \(logits, labels\)",
    ),
    "labels before the logits, sharded": (
        lambda: caref_loss(LABELS, LOGITS, shard=SHARD),
        r"logits and labels look swapped: caref_loss takes \(logits, labels\)",
    ),
    "(B, V, T)": (lambda: caref_loss(LOGITS.transpose(1, 2), LABELS), FIRST.format("logits")),
    "(B, V, T), module": (lambda: CarefLoss()(LOGITS.transpose(1, 2), LABELS), FIRST.format("logits")),
    "(B, V, T), sharded": (
        lambda: caref_loss(LOGITS.transpose(1, 2), LABELS, shard=SHARD),
        FIRST.format("logits"),
    ),
    "(B, V, T), mask": (
        lambda: fused_sced(LOGITS.transpose(1, 2), valid=LABELS),
        FIRST.format("logits").replace("labels", "valid"),
    ),
    "(B, V, H, W)": (
        lambda: caref_loss(torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 4, dtype=torch.long)),
        r"labels fit logits with the vocabulary last: pass logits.movedim\(1, -1\)",
    ),
    "(B, D, T)": (
        lambda: linear_caref_loss(HIDDEN.transpose(1, 2), WEIGHT, LABELS),
        r"hidden of shape \(B, D, T\): pass hidden.transpose\(1, 2\)",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_mistake_is_named(name):
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


OTHER_MISTAKES = {
    "labels of another length": lambda: linear_caref_loss(HIDDEN, WEIGHT, LABELS[:, :6]),
    "labels of one row": lambda: linear_caref_loss(HIDDEN, WEIGHT, LABELS[0]),
    "another D": lambda: linear_caref_loss(WEIGHT, HIDDEN[..., :3], LABELS),
    "labels of another length for logits": lambda: caref_loss(LOGITS, LABELS[:, :6]),
    "soft labels of integers": lambda: caref_loss(LOGITS.long(), LOGITS[..., :3]),
    "a batch missing": lambda: caref_loss(LOGITS, LABELS[0]),
    "labels of the vocabulary": lambda: caref_loss(LOGITS[:, 0], torch.zeros(5, dtype=torch.long)),
    "soft labels": lambda: caref_loss(LOGITS, LOGITS),
    "logits that are no floats": lambda: caref_loss(LOGITS.long(), LABELS),
    "weights that are no floats": lambda: linear_caref_loss(HIDDEN, WEIGHT.long(), LABELS),
}


@pytest.mark.parametrize("name", OTHER_MISTAKES)
def test_only_what_is_certain_is_named(name):
    with pytest.raises((TypeError, ValueError)) as caught:
        OTHER_MISTAKES[name]()
    assert not any(word in str(caught.value) for word in ("swapped", "transpose", "movedim"))


OWNERS = {"CarefConfig": CarefConfig, "CarefLoss": CarefLoss, "SCEDLoss": SCEDLoss, "LinearCarefLoss": LinearCarefLoss}


@pytest.mark.parametrize(
    ("owner", "option", "meant"),
    [
        ("CarefConfig", "lamda_sced", "lambda_sced"),
        ("CarefConfig", "ignore_idx", "ignore_index"),
        ("CarefLoss", "lamda_sced", "lambda_sced"),
        ("CarefLoss", "lambda_k1", "lambda_kl"),
        ("LinearCarefLoss", "lamda_kl", "lambda_kl"),
        ("LinearCarefLoss", "soft_cap", "softcap"),
        ("LinearCarefLoss", "chunk_row", "chunk_rows"),
        ("SCEDLoss", "alpha_", "alpha"),
        ("SCEDLoss", "vocabsize", "vocab_size"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_closest(owner, option, meant):
    with pytest.raises(TypeError, match=f"^{owner} has no option '{option}'; did you mean '{meant}'\\?$"):
        OWNERS[owner](**{option: 1})


@pytest.mark.parametrize("owner", OWNERS)
def test_an_option_like_no_other_is_answered_with_all(owner):
    with pytest.raises(TypeError, match=f"^{owner} has no option 'temperature'; it has alpha, beta, "):
        OWNERS[owner](temperature=1.0)
    if owner != "CarefConfig":
        with pytest.raises(TypeError, match=f"{owner} has no option 'temperature'"):
            OWNERS[owner](CarefConfig(), temperature=1.0)


def test_the_constructor_keeps_its_signature():
    parameters = inspect.signature(CarefConfig).parameters
    assert list(parameters)[:3] == ["alpha", "beta", "lambda_sced"]
    assert parameters["alpha"].default == CarefConfig.alpha
