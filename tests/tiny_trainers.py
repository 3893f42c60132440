"""Tiny random models, data and trainers for the tests of the transformers integration."""

from __future__ import annotations

import peft
import torch
import transformers
from torch.nn import functional

VOCABULARY = 61
EXAMPLES = 16
MODELS = ("t5", "llama")


def make_model(kind: str, lora: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
        adapter = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
        model = transformers.LlamaForCausalLM(config)
        adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, adapter) if lora else model


def make_data(kind: str) -> list[dict[str, torch.Tensor]]:
    """Examples with 1 to 7 labels, so that the mean over micro-batches is not the mean over the batch."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for index in range(EXAMPLES):
        tokens = torch.randint(1, VOCABULARY, (8,), generator=generator)
        labels = tokens.clone() if kind == "llama" else torch.randint(1, VOCABULARY, (8,), generator=generator)
        labels[1 + index % 7 :] = -100
        example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        if kind == "t5":
            example["decoder_input_ids"] = functional.pad(labels.clamp_min(0), (1, 0))[:-1]
        data.append(example)
    return data


def make_trainer(kind, folder, *, lora=False, seq2seq=False, model_init=False, trainer_class=None, **options):
    settings = {
        "per_device_train_batch_size": EXAMPLES,
        "per_device_eval_batch_size": 5,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # Adam would turn the rounding of a zero gradient into a step
        "max_grad_norm": 0.0,
        "save_strategy": "no",
    }
    arguments = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    args = arguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings | options,
    )
    trainer_class = trainer_class or (transformers.Seq2SeqTrainer if seq2seq else transformers.Trainer)
    data = make_data(kind)
    model = {"model_init": lambda: make_model(kind, lora)} if model_init else {"model": make_model(kind, lora)}
    return trainer_class(**model, args=args, train_dataset=data, eval_dataset=data)


def records_with(trainer, key: str) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if key in record]
