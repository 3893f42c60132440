"""What is trained, and with which objective: the rows of the paper's tables, as data.

A row names parameters by anchored patterns on the names of the model, never by a bare substring: ``"q|k|v"`` would
match 554 of the 558 tensors of Flan-T5.  The paper's percentages of AQ, LAQ and AQKV fit two readings alike, the
decoder's self- and cross-attention (``scope="decoder"``, what the official code says) or the self-attention of both
stacks (``scope="self_both"``, rows ``...-SELF``); both are here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Trained = Literal["all", "decoder", "qkv", "q+norm", "q", "lora", "adalora", "nothing"]
Objective = Literal["caref", "ce", "sced", "kl"]
Scope = Literal["decoder", "self_both"]


@dataclass(frozen=True)
class Variant:
    """One row: which parameters are trained, with which terms of the loss.

    ``paper`` is the row of the paper's table that it reproduces, or ``None``.
    """

    name: str
    trained: Trained
    objective: Objective = "caref"
    scope: Scope = "decoder"
    rank: int = 0
    paper: str | None = None

    def weights(self, lambda_sced: float, lambda_kl: float) -> dict[str, float]:
        """The weights of the loss's terms."""
        return {
            "lambda_sced": lambda_sced if self.objective in ("caref", "sced") else 0.0,
            "lambda_kl": lambda_kl if self.objective in ("caref", "kl") else 0.0,
        }

    @property
    def is_adapter(self) -> bool:
        """Whether PEFT's adapters are trained, and not the model's own parameters."""
        return self.trained in ("lora", "adalora")


def _rows() -> Iterator[Variant]:
    selections: dict[str, Trained] = {"BASE": "all", "DEC": "decoder", "AQKV": "qkv", "LAQ": "q+norm", "AQ": "q"}
    for name, trained in selections.items():
        yield Variant(f"CAREF-{name}", trained, paper=f"CAREF-{name}")
        yield Variant(f"CE-{name}", trained, "ce")
        if trained not in ("all", "decoder"):
            yield Variant(f"CAREF-{name}-SELF", trained, scope="self_both")
            yield Variant(f"CE-{name}-SELF", trained, "ce", scope="self_both")
    yield Variant("SCED-AQ", "q", "sced")
    yield Variant("KL-AQ", "q", "kl")
    yield Variant("ADALORA-32", "adalora", "ce", rank=32, paper="AdaLoRA")
    yield Variant("LORA-128", "lora", "ce", rank=128, paper="LoRA r=128")
    yield Variant("LORA-4", "lora", "ce", rank=4, paper="LoRA r=4")
    yield Variant("CAREF-LORA-4", "lora", rank=4)
    yield Variant("ZERO-STEP", "nothing", "ce")


VARIANTS = MappingProxyType({variant.name: variant for variant in _rows()})


@dataclass(frozen=True)
class Family:
    """How a family of models names its parameters; every field is a pattern for the full name."""

    decoder: str
    decoder_attention: str  # with {} for the projections
    self_attention: str
    norm: str


_T5 = Family(
    decoder=r"^decoder\.",
    decoder_attention=r"^decoder\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention)\.{}\.weight$",
    self_attention=r"^(encoder|decoder)\.block\.\d+\.layer\.\d+\.SelfAttention\.{}\.weight$",
    norm=r"layer_norm\.weight$",
)
_BART = Family(
    decoder=r"^model\.decoder\.(?!embed_tokens\.)",
    decoder_attention=r"^model\.decoder\.layers\.\d+\.(self_attn|encoder_attn)\.{}_proj\.weight$",
    self_attention=r"^model\.(encoder|decoder)\.layers\.\d+\.self_attn\.{}_proj\.weight$",
    norm=r"(layer_norm|layernorm_embedding)\.(weight|bias)$",
)
# Blocks and final norm, without the embedding, as DEC leaves out T5's; one attention per layer, so both scopes agree.
_CAUSAL = Family(
    decoder=r"^model\.(layers\.|norm\.)",
    decoder_attention=r"^model\.layers\.\d+\.self_attn\.{}_proj\.weight$",
    self_attention=r"^model\.layers\.\d+\.self_attn\.{}_proj\.weight$",
    norm=r"norm\.weight$",
)
_FAMILIES = MappingProxyType({"t5": _T5, "mt5": _T5, "bart": _BART, "mbart": _BART})


def family(config: Any) -> Family:
    """The names of the parameters of a model with this transformers configuration.

    Raises:
        ValueError: an encoder-decoder model of a kind whose names are not known.
    """
    if config.model_type in _FAMILIES:
        return _FAMILIES[config.model_type]
    if config.is_encoder_decoder:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"model_type must be one of {known} or decoder-only; got {config.model_type!r}")
    return _CAUSAL


def selected_names(model: nn.Module, variant: Variant) -> list[str]:
    """The names of the model's own parameters that ``variant`` trains; empty for adapters and for no training.

    Raises:
        ValueError: a pattern matches nothing, as in models with fused query, key and value projections.
    """
    names = [name for name, _ in model.named_parameters()]
    if variant.trained == "all":
        return names
    if variant.is_adapter or variant.trained == "nothing":
        return []
    known = family(model.config)
    attention = known.decoder_attention if variant.scope == "decoder" else known.self_attention
    patterns = {
        "decoder": [known.decoder],
        "qkv": [attention.format("[qkv]")],
        "q": [attention.format("q")],
        "q+norm": [attention.format("q"), known.norm],
    }[variant.trained]
    chosen = []
    for pattern in patterns:
        matches = [name for name in names if re.search(pattern, name)]
        if not matches:
            raise ValueError(
                f"variant {variant.name}: no parameter of this {model.config.model_type} model matches {pattern!r}; "
                f"it has {len(names)}, such as {', '.join(names[:3])} (a fused projection cannot be trained in part)"
            )
        chosen += [name for name in matches if name not in chosen]
    return chosen


def prepare(model: nn.Module, variant: Variant, total_steps: int, adapter: dict[str, Any] | None = None) -> nn.Module:
    """Freeze everything but what ``variant`` trains; with adapters, the model that PEFT makes.

    Args:
        model: a transformers model with its own parameters only; changed in place.
        total_steps: of the training, which AdaLoRA's allocator plans with.
        adapter: further options of PEFT's ``LoraConfig`` or ``AdaLoraConfig``.
    Raises:
        ValueError: nothing, or a head over the vocabulary, would be trained by an adapter.
    """
    model.requires_grad_(False)
    if variant.is_adapter:
        return _with_adapter(model, variant, total_steps, adapter or {})
    chosen = set(selected_names(model, variant))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model


def _with_adapter(model: nn.Module, variant: Variant, total_steps: int, options: dict[str, Any]) -> nn.Module:
    import peft

    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    settings = {"task_type": task, "target_modules": "all-linear", **options}
    if variant.trained == "lora":
        config = peft.LoraConfig(r=variant.rank, **settings)
    else:
        # PEFT states no default that suits 600 steps, nor does the paper state any: the budget falls to target_r
        # between the first tenth and the last third of the training.
        plan = {"tinit": total_steps // 10, "tfinal": total_steps // 3, "deltaT": max(total_steps // 60, 1)}
        config = peft.AdaLoraConfig(init_r=variant.rank, total_step=total_steps, **(plan | settings))
    head = model.get_output_embeddings()
    adapted = peft.get_peft_model(model, config)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ValueError(f"variant {variant.name}: no module of the {model.config.model_type} model got an adapter")
    if adapted.get_base_model().get_output_embeddings() is not head:
        raise ValueError(f"variant {variant.name}: the adapter must leave the head over the vocabulary alone")
    return adapted


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained and all parameters; all of an adapted model are the base's and the adapter's, as PEFT counts."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters())
