"""A tiny random model of every class whose head can be fused, without dropout."""

from __future__ import annotations

import torch
import transformers

VOCABULARY, WIDTH = 61, 16
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
_T5 = {
    **_COMMON,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BART = {
    **_COMMON,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_GPT2 = {
    **_COMMON,
    "n_embd": WIDTH,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
# Name of the case: class of the model, class of its configuration, options.
KINDS = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "flan-t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART),
    "marian": ("MarianMTModel", "MarianConfig", {**_BART, "decoder_vocab_size": VOCABULARY}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "smollm2": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
}


def make(kind: str, **options) -> torch.nn.Module:
    """A model in training mode whose logits are not all alike."""
    torch.manual_seed(0)
    model_class, config_class, defaults = KINDS[kind]
    config = getattr(transformers, config_class)(**defaults | options)
    model = getattr(transformers, model_class)(config)
    if kind == "flan-t5":  # its checkpoints hold a head of its own and do not scale; a configuration alone ties it
        model.config.scale_decoder_outputs = False
        model.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model.train()


def batch(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(inputs, labels): two examples, with labels to ignore."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    inputs = {"input_ids": tokens}
    labels = tokens.clone()
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
        inputs["decoder_input_ids"] = torch.nn.functional.pad(labels[:, :-1], (1, 0))
    labels[0, 3:] = labels[1, 0] = -100
    return inputs, labels
