"""The table of trainable parameters, from a model's configuration alone: nothing is downloaded, no weight allocated."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .variants import VARIANTS, Variant, prepare, trainable_parameters

FLAN_T5_LARGE = "google/flan-t5-large"
# The published config.json, as far as it decides shapes.
KNOWN_CONFIGS = MappingProxyType(
    {
        FLAN_T5_LARGE: {
            "model_type": "t5",
            "d_model": 1024,
            "d_ff": 2816,
            "d_kv": 64,
            "num_heads": 16,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
    }
)


class Count(NamedTuple):
    """The parameters of one variant; ``percent`` of all, which for adapters includes the adapter's own."""

    variant: Variant
    trained: int
    total: int

    @property
    def percent(self) -> float:
        """Trained parameters in percent of all."""
        return 100 * self.trained / self.total


def parameter_table(model: str) -> list[Count]:
    """The counts of every variant that the model can be trained with.

    Args:
        model: a folder with a ``config.json``, or a key of ``KNOWN_CONFIGS``.
    Raises:
        FileNotFoundError: neither of these.
        ValueError: the configuration is not one of a language model.
    """
    config = model_config(model)
    # Adapters change a model for good; the others only choose what is trained.
    shared = meta_model(config)
    counts = []
    for variant in VARIANTS.values():
        if variant.is_adapter:
            counts.append(count(config, variant))
        else:
            counts.append(Count(variant, *trainable_parameters(prepare(shared, variant, total_steps=1))))
    return counts


def count(config: dict[str, Any], variant: Variant) -> Count:
    """The counts of one variant of the model with this configuration."""
    # 600 steps stand for any number: they decide when adapters shrink, not what they hold.
    model = prepare(meta_model(config), variant, total_steps=600)
    return Count(variant, *trainable_parameters(model))


def model_config(model: str) -> dict[str, Any]:
    """The configuration of a model as its file says it.

    Raises:
        FileNotFoundError: no such folder, or no configuration in it.
    """
    file = Path(model) / "config.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if model in KNOWN_CONFIGS:
        return dict(KNOWN_CONFIGS[model])
    raise FileNotFoundError(f"{model}: must be a folder with a config.json or one of {', '.join(KNOWN_CONFIGS)}")


def meta_model(config: dict[str, Any]):
    """A model without weights, on torch's meta device.

    Raises:
        ValueError: transformers does not know the kind, or it is no language model.
    """
    import torch
    import transformers

    options = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    made = transformers.AutoConfig.for_model(config.get("model_type", ""), **options)
    kind = transformers.AutoModelForSeq2SeqLM if made.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(made)
    # transformers 5 ties the embeddings of every T5 that it makes from a configuration, whatever that says; a
    # checkpoint with a head of its own is loaded with it.
    if config.get("tie_word_embeddings") is False:
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight, device="meta"))
    return model
