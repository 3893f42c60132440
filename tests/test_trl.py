"""Without regularisers ``CarefSFTTrainer`` equals TRL's own trainer in every step and every record."""

from __future__ import annotations

import os

import pytest
import torch

from caref_kernels import CarefConfig
from caref_kernels.testing import IDENTITIES, check_identity

# TRL and the hub's library read these when they are imported, and would ask for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

import tiny_heads  # noqa: E402 - after the guards above

from caref_kernels.integrations.transformers import TERMS, apply_caref, attach_caref  # noqa: E402
from caref_kernels.integrations.trl import CarefSFTTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)
PLAIN = CarefConfig(lambda_sced=0.0, lambda_kl=0.0)
# "loss" is that of the whole step, the others are TRL's metrics.
METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()


def make_dataset():
    """Eight examples whose prompts, of 1 to 5 tokens, are not scored."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(8):
        tokens = torch.randint(3, tiny_heads.VOCABULARY, (8,), generator=generator).tolist()
        prompt = 1 + index % 5
        rows.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return datasets.Dataset.from_list(rows)


def make_trainer(trainer_class, folder, kind="llama", steps=1, lora=False, config=None, **options):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(tiny_heads.VOCABULARY)}, "3"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2", unk_token="3"
    )
    args = trl.SFTConfig(
        **{
            "output_dir": str(folder),
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
            "max_steps": 2,
            "per_device_train_batch_size": 8 // steps,
            "gradient_accumulation_steps": steps,
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        }
        | (config or {})
    )
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(7)
    trainer = trainer_class(
        model=tiny_heads.make(kind),
        args=args,
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(),
        processing_class=tokenizer,
        peft_config=adapter if lora else None,
        **options,
    )
    trainer.forwards = []
    trainer.model.register_forward_hook(lambda *_: trainer.forwards.append(1))
    return trainer


def trained(trainer) -> torch.Tensor:
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def check_records(actual, expected) -> None:
    assert len(actual.state.log_history) == len(expected.state.log_history)
    for mine, theirs in zip(actual.state.log_history, expected.state.log_history, strict=True):
        for prefix in ("", "eval_"):
            for name in METRICS:
                if prefix + name in theirs:
                    check_identity(
                        torch.tensor(mine[prefix + name]), torch.tensor(theirs[prefix + name]), "float32_terms", name
                    )


@pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma2"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_without_regularisers_it_is_trls_trainer(kind, fuse_head, steps, tmp_path):
    theirs = make_trainer(trl.SFTTrainer, tmp_path, kind, steps)
    ours = make_trainer(CarefSFTTrainer, tmp_path, kind, steps, caref=PLAIN, fuse_head=fuse_head)
    expected, actual = trained(theirs), trained(ours)
    assert (actual - expected).abs().max() <= 4 * IDENTITIES["float32"]
    assert len(ours.forwards) == 2 * steps  # one for each micro-batch
    theirs.evaluate()
    ours.evaluate()
    check_records(ours, theirs)


@pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize(
    ("lora", "config"),
    [
        (True, {}),
        (False, {"packing": True, "max_length": 24}),
        (False, {"padding_free": True, "max_length": None}),
        (False, {"router_aux_loss_coef": 0.25}),
        (False, {"activation_offloading": False, "gradient_checkpointing": True}),
    ],
    ids=["lora", "packed", "padding-free", "router", "checkpointing"],
)
def test_what_trl_offers_works_alike(fuse_head, lora, config, tmp_path):
    kind = "mixtral" if "router_aux_loss_coef" in config else "llama"
    theirs = make_trainer(trl.SFTTrainer, tmp_path, kind, 2, lora, config)
    ours = make_trainer(CarefSFTTrainer, tmp_path, kind, 2, lora, config, caref=PLAIN, fuse_head=fuse_head)
    expected, actual = trained(theirs), trained(ours)
    assert (actual - expected).abs().max() <= 4 * IDENTITIES["float32"]
    check_records(ours, theirs)


@pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
def test_the_loss_and_the_gradient_are_carefs(fuse_head, tmp_path):
    """Two steps of gradient descent in float64 from the definition of the loss."""
    trainer = make_trainer(CarefSFTTrainer, tmp_path, steps=4, caref=CarefConfig(lambda_sced=0.5), fuse_head=fuse_head)
    model = tiny_heads.make("llama").double()
    data = make_dataset()
    tokens, labels = torch.tensor(data["input_ids"]), torch.tensor(data["labels"])
    losses = []
    for _ in range(2):
        loss, gradients = tiny_heads.exact(model, {"input_ids": tokens}, labels, lambda_sced=0.5)
        losses.append(float(loss))
        with torch.no_grad():
            for name, value in model.named_parameters():
                value -= 0.5 * gradients[name]
    actual = trained(trainer)
    expected = torch.cat([value.detach().flatten() for value in model.parameters()])
    check_identity(actual, expected, "float32_gradient")
    records = [record for record in trainer.state.log_history if "loss" in record]
    for record, loss in zip(records, losses, strict=True):
        check_identity(torch.tensor(record["loss"]), torch.tensor(loss), "float32_terms")
        total = record["ce"] + 0.5 * record["sced"] + CarefConfig.lambda_kl * record["kl"]
        check_identity(torch.tensor(total), torch.tensor(loss), "float32_terms")
        assert set(TERMS) < set(record)


def test_the_router_loss_is_averaged_over_processes(tmp_path, monkeypatch):
    """Two processes that hold the same batch report what each of them would report alone."""
    losses = []
    for processes in (1, 2):
        trainer = make_trainer(CarefSFTTrainer, tmp_path, "mixtral", config={"router_aux_loss_coef": 0.25}, caref=PLAIN)
        monkeypatch.setattr(trainer.accelerator, "reduce", lambda value, _, count=processes: count * value)
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        losses += trainer._metrics["train"]["aux_loss"]
    assert losses[0] == losses[1] > 0


def test_a_plain_trainer_of_trl_is_refused(tmp_path):
    trainer = make_trainer(trl.SFTTrainer, tmp_path)
    with pytest.raises(ValueError, match=r"SFTTrainer does not ask the model for its loss: use .*CarefSFTTrainer"):
        attach_caref(trainer)
    apply_caref(trainer.model)
    with pytest.raises(ValueError, match=r"has the CAREF loss, but .*fused_lm_head=True.*CarefSFTTrainer"):
        trainer.train()


def test_other_losses_of_trl_are_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type must be 'nll' with the CAREF loss, .* got 'dft'"):
        make_trainer(CarefSFTTrainer, tmp_path, config={"loss_type": "dft"})
