"""The loss in a transformers Trainer: scaling, terms, evaluation and refused trainers; tiny random models."""

from __future__ import annotations

import math

import pytest
import torch

from caref_kernels import CarefConfig, backends
from caref_kernels.testing import IDENTITIES, check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

from tiny_trainers import MODELS, VOCABULARY, make_trainer, records_with  # noqa: E402 - after the guards above

from caref_kernels.integrations.transformers import TERMS, apply_caref, attach_caref  # noqa: E402

# PEFT reads an attribute that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

BACKEND = next(name for name in backends.ORDER if backends.get(name).unsupported(torch.empty(1, 2)) is None)


def trained_parameters(trainer) -> torch.Tensor:
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def count_forwards(trainer) -> list[int]:
    calls: list[int] = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def check_record(record: dict[str, float], prefix: str = "") -> None:
    """The logged terms, weighted by the defaults of the configuration, add up to the logged loss."""
    loss, ce, sced, kl, entropy = (record[prefix + name] for name in ("loss", *TERMS))
    total = ce + CarefConfig.lambda_sced * sced + CarefConfig.lambda_kl * kl
    check_identity(torch.tensor(total), torch.tensor(loss), "float32_terms", "sum of terms")
    check_identity(torch.tensor(entropy + kl), torch.tensor(math.log(VOCABULARY)), "float32_terms", "entropy + kl")
    assert min(ce, sced, kl, entropy) > 0


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_accumulation_equals_one_batch(kind, lora, tmp_path):
    one = make_trainer(kind, tmp_path, lora=lora, max_steps=2)
    many = make_trainer(
        kind, tmp_path, lora=lora, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    start = torch.cat([parameter.detach().flatten() for parameter in one.model.parameters()])
    for trainer in (one, many):
        attach_caref(trainer, backend=BACKEND)
    forwards = count_forwards(many)
    expected, actual = trained_parameters(one), trained_parameters(many)
    assert (expected - start).abs().max() > 1e3 * IDENTITIES["float32"]
    assert (actual - expected).abs().max() <= IDENTITIES["float32"]
    assert len(forwards) == 8  # 2 steps of 4 micro-batches, each seen once by the model
    for a, b in zip(records_with(many, "loss"), records_with(one, "loss"), strict=True):
        check_record(a)
        check_identity(torch.tensor(a["loss"]), torch.tensor(b["loss"]), "float32_terms", "logged loss")


def test_accumulation_with_a_mean_per_micro_batch_differs(tmp_path):
    """The comparison above would notice a loss that ignores num_items_in_batch."""
    one = make_trainer("t5", tmp_path)
    many = make_trainer("t5", tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    for trainer in (one, many):
        attach_caref(trainer, backend=BACKEND)
    many.model_accepts_loss_kwargs = False
    assert (trained_parameters(one) - trained_parameters(many)).abs().max() > 1e3 * IDENTITIES["float32"]


@pytest.mark.parametrize("kind", MODELS)
def test_without_regularisers_it_is_the_models_own_loss(kind, tmp_path):
    plain = make_trainer(kind, tmp_path)
    ours = make_trainer(kind, tmp_path)
    attach_caref(ours, lambda_sced=0, lambda_kl=0, backend=BACKEND)
    expected, actual = trained_parameters(plain), trained_parameters(ours)
    assert (actual - expected).abs().max() <= IDENTITIES["float32"]
    (own,), (record,) = records_with(plain, "loss"), records_with(ours, "loss")
    check_identity(torch.tensor(record["ce"]), torch.tensor(own["loss"]), "float32_terms", "ce")
    assert record["loss"] == record["ce"]


def test_a_record_covers_the_steps_since_the_last_one(tmp_path):
    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    seen: list[dict[str, float]] = []
    options = {"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    every = make_trainer("t5", tmp_path, seq2seq=True, **options)
    some = make_trainer("t5", tmp_path, seq2seq=True, **options | {"logging_steps": 2})
    some.add_callback(Reporter())
    for trainer in (every, some):
        attach_caref(trainer, backend=BACKEND)
        trainer.train()
    singles, pairs = records_with(every, "loss"), records_with(some, "loss")
    assert (len(singles), len(pairs)) == (5, 2)
    for index, record in enumerate(pairs):
        check_record(record)
        for name in ("loss", *TERMS):
            mean = (singles[2 * index][name] + singles[2 * index + 1][name]) / 2
            check_identity(torch.tensor(record[name]), torch.tensor(mean), "float32_terms", name)
    assert [record["ce"] for record in seen if "loss" in record] == [record["ce"] for record in pairs]
    assert "ce" not in records_with(some, "train_loss")[0]


# ----------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_uses_the_same_loss(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, seq2seq=kind == "t5")
    attach_caref(trainer, backend=BACKEND)
    forwards = count_forwards(trainer)
    metrics = trainer.evaluate()
    assert len(forwards) == 4  # batches of 5, 5, 5 and 1
    check_record(metrics, "eval_")
    (record,) = records_with(trainer, "eval_loss")
    assert all(record[f"eval_{name}"] == metrics[f"eval_{name}"] for name in TERMS)
    check_record(trainer.predict(trainer.eval_dataset).metrics, "test_")
    trainer.train()
    check_record(records_with(trainer, "loss")[0])


def test_generation_reports_the_same_loss(tmp_path):
    trainer = make_trainer("t5", tmp_path, seq2seq=True, predict_with_generate=True, generation_max_length=10)
    attach_caref(trainer, backend=BACKEND)
    expected = trainer.evaluate()
    check_record(expected, "eval_")
    trainer.compute_metrics = lambda prediction: {"length": float(prediction.predictions.shape[1])}
    metrics = trainer.evaluate()
    assert metrics["eval_length"] > 1
    check_record(metrics, "eval_")
    check_identity(torch.tensor(metrics["eval_loss"]), torch.tensor(expected["eval_loss"]), "float32_terms")


def test_a_batch_without_a_label_is_left_out_of_an_evaluation(tmp_path):
    trainer = make_trainer("llama", tmp_path, per_device_eval_batch_size=8)
    attach_caref(trainer, backend=BACKEND)
    data = [dict(example) for example in trainer.eval_dataset]
    expected = trainer.evaluate(data[:8])
    for example in data[8:]:
        example["labels"] = torch.full_like(example["labels"], -100)
    metrics = trainer.evaluate(data)
    for name in ("loss", *TERMS):
        check_identity(torch.tensor(metrics[f"eval_{name}"]), torch.tensor(expected[f"eval_{name}"]), "float32", name)


def test_an_evaluation_without_the_filter_keeps_such_a_batch(tmp_path):
    trainer = make_trainer("llama", tmp_path, per_device_eval_batch_size=8, logging_nan_inf_filter=False)
    attach_caref(trainer, backend=BACKEND)
    data = [dict(example) for example in trainer.eval_dataset]
    for example in data[8:]:
        example["labels"] = torch.full_like(example["labels"], -100)
    metrics = trainer.evaluate(data)
    assert all(math.isnan(metrics[f"eval_{name}"]) for name in TERMS)


def test_an_evaluation_that_fails_leaves_nothing_behind(tmp_path):
    trainer = make_trainer("llama", tmp_path)
    attach_caref(trainer, backend=BACKEND)
    expected = trainer.evaluate()
    step = trainer.prediction_step
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    trainer.prediction_step = failing
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.prediction_step = step
    again = trainer.evaluate()
    assert all(again[f"eval_{name}"] == expected[f"eval_{name}"] for name in ("loss", *TERMS))


def test_a_metric_of_the_user_is_kept(tmp_path):
    trainer = make_trainer("llama", tmp_path)
    attach_caref(trainer, backend=BACKEND)
    trainer.compute_metrics = lambda prediction: {"ce": -1.0}
    metrics = trainer.evaluate()
    assert metrics["eval_ce"] == -1.0
    assert metrics["eval_sced"] > 0


# ------------------------------------------------------------------------------------------------------- refusals


def test_another_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, or .*, 0\.2; got 0\.1"):
        attach_caref(make_trainer("t5", tmp_path, label_smoothing_factor=0.1), label_smoothing=0.2)
    trainer = make_trainer("t5", tmp_path)
    attach_caref(trainer)
    trainer.args.label_smoothing_factor = 0.2
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, or .*, 0\.0; got 0\.2"):
        trainer.train()


def test_a_trainer_it_cannot_serve_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer("t5", tmp_path)
    with pytest.raises(TypeError, match="trainer must be a transformers Trainer; got T5ForConditionalGeneration"):
        attach_caref(trainer.model)
    for size in ("get_cp_size", "get_sp_size"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, size, lambda: 2)
            with pytest.raises(ValueError, match="parallelism must have size 1, got 2"):
                attach_caref(trainer)
    for owner, name, value, message in (
        (trainer.args, "_n_gpu", 2, r"args\.n_gpu must be at most 1, got 2"),
        (trainer.args, "use_liger_kernel", True, "use_liger_kernel must be False"),
        (trainer, "compute_loss_func", max, "compute_loss_func must be None: it replaces the model's loss; got <built"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(ValueError, match=message):
                attach_caref(trainer)
    assert not hasattr(trainer.model, "_caref")


@pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
def test_a_compute_loss_that_never_asks_for_the_loss_is_an_error(fuse_head, tmp_path):
    class OwnLoss(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    trainer = make_trainer("llama", tmp_path, trainer_class=OwnLoss)
    attach_caref(trainer, fuse_head=fuse_head)
    with pytest.raises(RuntimeError, match=r"OwnLoss\.compute_loss never asked the model for its loss"):
        trainer.train()


def test_a_compute_loss_that_asks_for_it_is_served(tmp_path):
    class Doubled(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    trainer = make_trainer("llama", tmp_path, trainer_class=Doubled)
    attach_caref(trainer, backend=BACKEND)
    trainer.train()
    (record,) = records_with(trainer, "loss")
    check_record(record | {"loss": record["loss"] / 2})


# ------------------------------------------------------------------------------------------------ records and models


def test_a_record_of_one_process_needs_no_other(tmp_path, monkeypatch):
    """A record that one rank logs alone must not start a collective."""
    trainer = make_trainer("llama", tmp_path)
    attach_caref(trainer, backend=BACKEND)
    trainer.train()
    monkeypatch.setattr(trainer.accelerator, "gather", lambda _values: pytest.fail("a collective"))
    trainer.log({"loss": 1.0})
    trainer.log({"eval_loss": 1.0})
    trainer.log({"x_loss": 1.0})
    assert not any("ce" in record for record in trainer.state.log_history[-3:])


def test_a_callback_that_asks_for_a_record_is_served(tmp_path):
    """The terms are collected after all callbacks, so that one of them may ask for a record."""

    class Asking(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = state.global_step == 3
            return control

    trainer = make_trainer("llama", tmp_path, max_steps=4, logging_strategy="no")
    attach_caref(trainer, backend=BACKEND)
    trainer.add_callback(Asking())
    trainer.train()
    (record,) = records_with(trainer, "loss")
    check_record(record)


@pytest.mark.parametrize("average", [True, False], ids=["tokens", "processes"])
def test_terms_are_averaged_over_processes(average, tmp_path, monkeypatch):
    """Terms are averaged as the Trainer averages its loss: scaled by the number of processes that share a divisor."""
    trainer = make_trainer("llama", tmp_path, average_tokens_across_devices=average)
    attach_caref(trainer, backend=BACKEND)
    other = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0]])
    seen = []
    monkeypatch.setattr(trainer.accelerator, "gather", lambda mine: seen.append(mine) or torch.cat((mine, other)))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    trainer.train()
    (record,) = records_with(trainer, "loss")
    for name, here, there in zip(TERMS, seen[0][0].tolist(), other[0].tolist(), strict=False):
        expected = (here + there) * (1.0 if average else 0.5)
        check_identity(torch.tensor(record[name]), torch.tensor(expected), "float32_terms", name)


@pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
def test_models_of_model_init_have_the_loss(fuse_head, tmp_path):
    expected = make_trainer("llama", tmp_path)
    attach_caref(expected, fuse_head=fuse_head, backend=BACKEND)
    trainer = make_trainer("llama", tmp_path, model_init=True)
    attach_caref(trainer, fuse_head=fuse_head, backend=BACKEND)
    first = trainer.model
    assert torch.equal(trained_parameters(trainer), trained_parameters(expected))
    assert trainer.model is not first
    check_record(records_with(trainer, "loss")[0])


@pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
def test_a_resumed_training_equals_an_undisturbed_one(fuse_head, tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer("llama", tmp_path / "whole", **options)
    attach_caref(whole, fuse_head=fuse_head, backend=BACKEND)
    expected = trained_parameters(whole)
    resumed = make_trainer("llama", tmp_path / "resumed", **options)
    attach_caref(resumed, fuse_head=fuse_head, backend=BACKEND)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    actual = torch.cat([parameter.detach().flatten() for parameter in resumed.model.parameters()])
    assert torch.equal(actual, expected)
    for a, b in zip(records_with(whole, "loss"), records_with(resumed, "loss"), strict=True):
        assert {name: a[name] for name in ("loss", *TERMS)} == {name: b[name] for name in ("loss", *TERMS)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_a_compiled_model_in_a_trainer(tmp_path):
    plain, compiled = (
        make_trainer(
            "llama", tmp_path, max_steps=2, torch_compile=flag, torch_compile_backend="aot_eager" if flag else None
        )
        for flag in (False, True)
    )
    for trainer in (plain, compiled):
        attach_caref(trainer, backend=BACKEND)
    assert (trained_parameters(plain) - trained_parameters(compiled)).abs().max() <= 2 * IDENTITIES["float32"]
    for a, b in zip(records_with(plain, "loss"), records_with(compiled, "loss"), strict=True):
        for name in ("loss", *TERMS):
            check_identity(torch.tensor(b[name]), torch.tensor(a[name]), "float32_terms", name)


def test_attaching_again_replaces_the_options(tmp_path):
    trainer = make_trainer("llama", tmp_path)
    attach_caref(trainer, lambda_sced=9.0, backend=BACKEND)
    attach_caref(trainer, backend=BACKEND)
    once = make_trainer("llama", tmp_path)
    attach_caref(once, backend=BACKEND)
    assert torch.equal(trained_parameters(trainer), trained_parameters(once))
    check_record(records_with(trainer, "loss")[0])


def test_a_model_that_was_applied_before_trains_in_any_trainer(tmp_path):
    """Such a model trains without records; for T5 the Trainer takes the mean over micro-batches."""
    plain, ours = make_trainer("llama", tmp_path), make_trainer("llama", tmp_path)
    attach_caref(ours, backend=BACKEND)
    apply_caref(plain.model, backend=BACKEND)
    assert torch.equal(trained_parameters(plain), trained_parameters(ours))
    assert records_with(plain, "loss")[0]["loss"] == records_with(ours, "loss")[0]["loss"]


def test_adalora_keeps_its_regulariser(tmp_path):
    """PEFT's regulariser stays part of the loss, with and without a fused head."""
    losses = []
    for fuse_head, weights in ((False, (0.5, 0.0)), (False, (0.5, 1e-3)), (True, (0.5, 0.0))):
        trainer = make_trainer("llama", tmp_path)
        torch.manual_seed(4)
        config = peft.AdaLoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj"],
            total_step=10,
            tinit=1,
            tfinal=1,
            orth_reg_weight=weights[0],
        )
        trainer.model = trainer.model_wrapped = peft.get_peft_model(trainer.model, config)
        attach_caref(trainer, fuse_head=fuse_head, lambda_kl=weights[1], backend=BACKEND)
        trainer.train()
        (record,) = records_with(trainer, "loss")
        regulariser = record["loss"] - sum(
            w * record[name] for w, name in zip((1.0, CarefConfig.lambda_sced, weights[1]), TERMS, strict=False)
        )
        losses.append(regulariser)
    check_identity(torch.tensor(losses), torch.tensor(losses[:1] * 3), "float32_terms")
    assert losses[0] > 1e3 * IDENTITIES["float32"]
