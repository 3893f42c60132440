"""Tiny random models of many classes, without dropout, and the exact loss and gradients of one batch."""

from __future__ import annotations

import copy

import torch
import transformers
from torch.nn import functional

from caref_kernels import caref_loss
from caref_kernels.integrations.transformers import remove_caref
from caref_kernels.testing import IDENTITIES, check_identity

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
_NO_DROPOUT = {"attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
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
    "m2m100": ("M2M100ForConditionalGeneration", "M2M100Config", {**_BART, **_NO_DROPOUT}),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", _BART),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "smollm2": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "final_logit_softcapping": 2.0}),
    "gemma2-uncapped": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "final_logit_softcapping": None}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_DECODER, "logit_scale": 0.3}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_DECODER, "logits_scaling": 3.0}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
}


# Further families, whose configurations take what they know of the sizes above.
FAMILIES = (
    "bloom", "falcon_h1", "glm4", "gpt_neox", "gpt_oss", "gptj", "granitemoe", "mamba", "nanochat", "olmo2", "opt",
    "phi", "phi3", "qwen3_moe", "stablelm", "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip


def make_family(family: str) -> torch.nn.Module:
    """A model of transformers' family of this name."""
    torch.manual_seed(0)
    config_class = transformers.AutoConfig.for_model(family).__class__
    known = config_class()
    sizes = _DECODER | _GPT2 | _NO_DROPOUT | {"ffn_dim": 24, "word_embed_proj_dim": WIDTH, "rotary_dim": 4}
    sizes |= {"num_layers": 1, "attention_heads": 2, "d_model": WIDTH, "num_experts": 2, "num_local_experts": 2}
    sizes |= {"moe_intermediate_size": 16, "num_experts_per_tok": 1, "mamba_d_ssm": 16, "mamba_n_heads": 2}
    sizes |= {
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "dropout": 0.0,
        "hidden_dropout": 0.0,
        "partial_rotary_factor": 1.0,
    }
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**{name: value for name, value in sizes.items() if hasattr(known, name)})
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model.train()


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


def exact(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor, **options):
    """(loss, gradients by name) in float64, from the logits of a copy of the model without the loss."""
    model = remove_caref(copy.deepcopy(model)).double().train()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # the others know no float64
    outputs = model(**inputs)
    shift = not base.config.is_encoder_decoder
    shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:] if shift else labels
    loss = caref_loss(outputs.logits, shifted, backend="reference", **options)
    if getattr(outputs, "aux_loss", None) is not None:
        loss = loss + base.router_aux_loss_coef * outputs.aux_loss
    return gradients_of(model, loss)


def gradients_of(model: torch.nn.Module, loss: torch.Tensor):
    """(loss, gradients by name); the model keeps none."""
    model.zero_grad()
    if loss.requires_grad:  # not where adapters are disabled
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def check_same(actual, expected) -> None:
    """Compare two results of :func:`gradients_of`; errors are relative to the largest gradient of the model."""
    check_identity(actual[0], expected[0], "float32_terms")
    assert actual[1].keys() == expected[1].keys()
    scale = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() <= IDENTITIES["float32_gradient"] * scale, name


def rows_of(model, inputs, labels, shifted=None):
    """Logits and aligned labels of the valid rows."""
    logits = remove_caref(copy.deepcopy(model))(**inputs).logits
    if shifted is None:
        shifted = labels if model.config.is_encoder_decoder else functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return logits[shifted != -100], shifted[shifted != -100]
