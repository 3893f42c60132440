"""The loss inside a transformers Trainer: scaling, terms, evaluation, refusals; tiny random models, float32, CPU."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from caref_kernels import CarefConfig, backends, caref_loss
from caref_kernels.testing import IDENTITIES, check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

from tiny_trainers import MODELS, VOCABULARY, make_trainer  # noqa: E402 - after the guards above

from caref_kernels.integrations.transformers import (  # noqa: E402
    TERMS,
    CarefTrainerCallback,
    CarefTrainerLoss,
    attach_caref,
)

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


def records_with(trainer, key: str) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if key in record]


def check_record(record: dict[str, float], prefix: str = "") -> None:
    """The logged terms add up to the logged loss, by the defaults of the configuration."""
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
    attach_caref(one, backend=BACKEND)
    many = make_trainer("t5", tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    loss = attach_caref(many, backend=BACKEND)
    many.compute_loss_func = lambda outputs, labels, num_items_in_batch: loss(outputs, labels) / 4
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


def test_generation_reports_the_models_own_loss(tmp_path):
    trainer = make_trainer("t5", tmp_path, seq2seq=True, predict_with_generate=True, generation_max_length=10)
    attach_caref(trainer, backend=BACKEND)
    check_record(trainer.evaluate(), "eval_")
    trainer.compute_metrics = lambda prediction: {"length": float(prediction.predictions.shape[1])}
    metrics = trainer.evaluate()
    assert metrics["eval_length"] > 1
    assert "eval_loss" in metrics
    assert "eval_ce" not in metrics


# ------------------------------------------------------------------------------------------------------- refusals


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0 .* got 0.1"):
        attach_caref(make_trainer("t5", tmp_path, label_smoothing_factor=0.1))
    trainer = make_trainer("t5", tmp_path)
    attach_caref(trainer)
    trainer.args.label_smoothing_factor = 0.2
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0 .* got 0.2"):
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
    with monkeypatch.context() as patch:
        patch.setattr(trainer.args, "_n_gpu", 2)
        with pytest.raises(ValueError, match=r"args\.n_gpu must be at most 1, got 2"):
            attach_caref(trainer)
    loss = attach_caref(trainer)
    assert trainer.compute_loss_func is loss
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        attach_caref(trainer)


def test_adalora_is_refused(tmp_path):
    trainer = make_trainer("llama", tmp_path)
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1)
    trainer.model = peft.get_peft_model(trainer.model, config)
    with pytest.raises(ValueError, match="'default' has peft_type ADALORA"):
        attach_caref(trainer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' .* got 'sum'"),
        ({"ignore_index": 0}, ValueError, "ignore_index must be -100 .* got 0"),
        ({"shift": "causal"}, ValueError, "shift must be True, False or 'auto'; got 'causal'"),
        ({"alpha": 0.5}, ValueError, "alpha must be in"),
        ({"config": CarefConfig(), "alpha": 2.0}, TypeError, "not both"),
        ({"config": 0.1}, TypeError, "config must be a CarefConfig; got 0.1"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        CarefTrainerLoss(**options)


# --------------------------------------------------------------------------------------------- the function itself


def make_loss(**options) -> CarefTrainerLoss:
    loss = CarefTrainerLoss(**{"backend": BACKEND} | options)
    loss.mark_attached()
    return loss


def make_outputs(causal: bool):
    torch.manual_seed(3)
    logits = torch.randn(2, 5, VOCABULARY, requires_grad=True)
    labels = torch.randint(VOCABULARY, (2, 5))
    labels[1, 3:] = -100
    if causal:
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits), labels
    states = torch.zeros(1)
    return transformers.modeling_outputs.Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=states), labels


@pytest.mark.parametrize("causal", [False, True], ids=["seq2seq", "causal"])
def test_shift_follows_the_kind_of_model(causal):
    outputs, labels = make_outputs(causal)
    expected = caref_loss(
        outputs.logits[:, :-1] if causal else outputs.logits, labels[:, 1:] if causal else labels, backend=BACKEND
    )
    for shift in ("auto", causal):
        check_identity(make_loss(shift=shift)(outputs, labels), expected, "float32")
    check_identity(make_loss(shift=causal)((outputs.logits,), labels), expected, "float32", "tuple")
    assert abs(make_loss(shift=not causal)(outputs, labels) - expected) > 1e3 * IDENTITIES["float32"]


def test_logits_are_passed_whole(monkeypatch):
    passed = []
    monkeypatch.setattr(
        "caref_kernels.modules.caref_from_config",
        lambda logits, *rest: passed.append(logits) or caref_loss(logits, rest[0], backend=BACKEND, return_terms=True),
    )
    outputs, labels = make_outputs(causal=True)
    make_loss()(outputs, labels)
    assert len(passed) == 1
    assert passed[0] is outputs.logits


def test_unknown_outputs_are_refused():
    outputs, labels = make_outputs(causal=True)
    for unknown in ({"logits": outputs.logits}, (outputs.logits,)):
        with pytest.raises(ValueError, match="shift='auto' cannot tell .* pass shift=True"):
            make_loss()(unknown, labels)
    for empty in ({"logits": None}, ("loss",), (), None):
        with pytest.raises(TypeError, match="outputs: expected a mapping with a 'logits' tensor"):
            make_loss(shift=True)(empty, labels)
    with pytest.raises(ValueError, match="labels: the batch must have a 'labels' tensor .* got None"):
        make_loss()(outputs, None)


@pytest.mark.parametrize("num_items", [4, 4.0, torch.tensor(4), torch.tensor(4.0, dtype=torch.float64)], ids=repr)
def test_num_items_divides(num_items):
    outputs, labels = make_outputs(causal=False)
    total = caref_loss(outputs.logits, labels, reduction="sum", backend=BACKEND)
    check_identity(make_loss()(outputs, labels, num_items_in_batch=num_items), total / 4, "float32")


def test_no_items_count_as_one():
    outputs, labels = make_outputs(causal=False)
    nothing = torch.full_like(labels, -100)
    for zero in (0, torch.tensor(0)):
        loss = make_loss()(outputs, nothing, num_items_in_batch=zero)
        assert loss == 0
        assert torch.autograd.grad(loss, outputs.logits)[0].count_nonzero() == 0
    assert make_loss()(outputs, nothing).isnan()
    with pytest.raises(ValueError, match="num_items must be finite and > 0; got -1"):
        make_loss()(outputs, labels, -1)


def test_nothing_is_read_back_between_records():
    """Tensors of the meta device have no values: any read of one is an error."""
    loss = make_loss(backend="reference")
    logits = torch.empty(2, 5, VOCABULARY, device="meta", requires_grad=True)
    labels = torch.empty(2, 5, dtype=torch.int64, device="meta")
    outputs = transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)
    for _ in range(2):
        loss(outputs, labels, torch.empty((), dtype=torch.int64, device="meta")).backward()
    with torch.no_grad():
        loss(outputs, labels, torch.empty((), device="meta"))
    assert loss.train_terms.weight == 2
    assert loss.eval_terms.weight == 2  # one batch of two examples
    assert loss.train_terms.total.shape == (len(TERMS),)
    assert not loss.train_terms.total.requires_grad


def test_use_without_attach_warns_once(tmp_path):
    loss = CarefTrainerLoss(backend=BACKEND)
    outputs, labels = make_outputs(causal=True)
    with pytest.warns(RuntimeWarning, match="label_smoothing_factor is not checked"):
        loss(outputs, labels)
    loss(outputs, labels)


@pytest.mark.parametrize("average", [True, False], ids=["tokens", "processes"])
def test_terms_are_averaged_over_processes(average):
    """As the trainer averages its loss: scaled by the processes that share a divisor, then the mean of all."""
    loss = make_loss()
    outputs, labels = make_outputs(causal=False)
    loss(outputs, labels, 7)
    other = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0]])
    accelerator = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), gather=lambda mine: torch.cat((mine, other))
    )
    args = SimpleNamespace(average_tokens_across_devices=average)
    trainer = SimpleNamespace(accelerator=accelerator, args=args, get_tp_size=lambda: 1)
    mine = loss.train_terms.total.tolist()
    logs = {"loss": 0.0}
    state = SimpleNamespace(global_step=1, log_history=[{}])
    CarefTrainerCallback(trainer, loss).on_log(args, state, None, logs=logs)
    for name, here, there in zip(TERMS, mine, other[0].tolist(), strict=False):
        expected = (here + there) * (1.0 if average else 0.5)
        check_identity(torch.tensor(logs[name]), torch.tensor(expected), "float32_terms", name)
    assert state.log_history[-1]["ce"] == logs["ce"]


# ------------------------------------------------------------------------------------------------- the module itself


def test_transformers_is_imported_by_this_module_alone():
    code = "import sys, caref_kernels.integrations; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_an_old_version_is_refused(monkeypatch):
    name = "caref_kernels.integrations.transformers"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.2")
    with pytest.raises(ImportError, match=r"needs transformers >= 5\.17 .* got 5\.16\.2"):
        importlib.import_module(name)
