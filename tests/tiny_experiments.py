"""Tiny models, data and settings with which the harness's tests run whole experiments in seconds."""

from __future__ import annotations

from pathlib import Path

import tiny_llama
import torch
import transformers

from caref_kernels import harness
from caref_kernels.harness.results import Results
from caref_kernels.harness.runs import Callbacks, run_jobs
from caref_kernels.harness.settings import Settings

# The examples in the package are in ComVE's official files: a real reader's input.
EXAMPLES = Path(harness.__file__).with_name("examples")
KINDS = ("llama", "t5", "bart")


class Listener(Callbacks):
    """Keeps what it is told; ``stop_after`` steps it asks for a stop."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.steps = 0
        self.stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self) -> None:
        self.steps += 1

    def stop(self) -> bool:
        return self.stop_after is not None and self.steps >= self.stop_after


def save_model(folder: Path, kind: str = "llama") -> Path:
    """A random model with the byte tokenizer of tests/tiny_llama.py, as a transformers folder."""
    if kind == "llama":
        return tiny_llama.save(folder)
    torch.manual_seed(0)
    tokenizer = tiny_llama.tiny_tokenizer()
    special = {"pad_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **special
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BartConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=600,
            bos_token_id=1,
            forced_eos_token_id=None,
            **special,
        )
        model = transformers.BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_settings(model: Path, **options) -> Settings:
    """Ten steps on eight examples of the package, evaluated on six."""
    chosen = {
        "model": str(model),
        "data": str(EXAMPLES),
        "datasets": ("comve",),
        "variants": ("CAREF-AQ",),
        "splits": (0, 1),
        "train_size": 8,
        "dev_size": 6,
        "max_steps": 10,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "max_new_tokens": 4,
        "scorer": "none",
        "device": "cpu",
    }
    return Settings(**(chosen | options))


def run(settings: Settings, folder: Path, callbacks: Callbacks | None = None, **options):
    """All jobs of the settings in ``folder``; the summary and the rows by run."""
    results = Results(folder)
    summary = run_jobs(settings, settings.jobs(), results, callbacks or Listener(), **options)
    return summary, {row["run"]: row for row in results.read().rows}


def lasting(row: dict) -> dict:
    """A row without what depends on the clock."""
    return {key: value for key, value in row.items() if key not in ("finished", "seconds")}
