"""What the recipes share: options, a tiny random model and tiny data.  Put your own model and data in their place."""

from __future__ import annotations

import argparse
import os

import torch
import transformers

VOCABULARY = 64
STEP_SIZE = 8  # examples per optimizer step, over all ranks and micro-batches


def options(description: str, argv: list[str] | None = None, *flags: str) -> argparse.Namespace:
    """The options of every recipe, and ``flags`` of this one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="PATH", help="folder or name of a transformers model; default: a tiny random one")
    add("--accumulation", type=int, default=1, help="micro-batches per optimizer step")
    add("--fuse-head", action="store_true", help="compute the training loss without materialising the logits")
    add("--lr", type=float, default=0.5, help="learning rate of SGD")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--output", default="out", help="folder of a trainer's checkpoints")
    for flag in flags:
        add(flag, action="store_true")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return args


def causal_model(path: str | None = None) -> transformers.PreTrainedModel:
    """A pretrained causal model, or a random one with an output distribution that is far from uniform."""
    if path:
        return transformers.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config)


def seq2seq_model(path: str | None = None) -> transformers.PreTrainedModel:
    """The same for encoder-decoder models."""
    if path:
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def examples(vocabulary: int = VOCABULARY, steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """Sequences of 8 tokens with 0 to 7 labels.

    In the first step two of the eight examples have labels, so that micro-batches and ranks without any occur.
    """
    generator = torch.Generator().manual_seed(1)
    data = []
    for index in range(steps * STEP_SIZE):
        tokens = torch.randint(3, vocabulary, (8,), generator=generator)
        first = 8 if index < STEP_SIZE and index not in (0, 2) else 1 + index % 7
        labels = tokens.clone()
        labels[:first] = -100
        data.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return data


def tokenizer(path: str | None = None) -> transformers.PreTrainedTokenizerBase:
    """That of the model, or one whose words are numbers."""
    if path:
        return transformers.AutoTokenizer.from_pretrained(path)
    from tokenizers import Tokenizer, models

    words = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", *map(str, range(3, VOCABULARY))))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
