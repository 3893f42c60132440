"""The language model that the demo trains: loading, its target rows, its query projections, its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Encoded, left_padded_prompts

QUERY_PROJECTION = re.compile(r"\.self_attn\.q_proj\.weight$")
# Taking rows before the head instead of after it changes the order of no sum by more than this share of the logits.
_HEAD_TOLERANCE = 1e-4


@dataclass
class Student:
    """A causal language model whose query projections alone are trained."""

    name: str
    model: Any
    tokenizer: Any
    queries: list[nn.Parameter]
    _start: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        for query in self.queries:
            query.requires_grad_(True)
        self._start = [query.detach().clone() for query in self.queries]

    @classmethod
    def load(cls, folder: Path, name: str) -> Student:
        """The model and tokenizer in ``folder``: safetensors only, no code from the folder, no network.

        Raises:
            FileNotFoundError: no such folder, or no model in it.
            ValueError: not a causal language model, or one whose query projections have no name of their own.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"--model: no such file: {folder / 'config.json'}")
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **local)
        if config.is_encoder_decoder:
            raise ValueError(f"{folder}: must hold a causal language model; got model_type {config.model_type!r}")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
        )
        if info["missing_keys"]:
            raise ValueError(
                f"{folder}: the weights lack {len(info['missing_keys'])} tensors, {min(info['missing_keys'])} first"
            )
        queries = [parameter for name_, parameter in model.named_parameters() if QUERY_PROJECTION.search(name_)]
        if not queries:
            raise ValueError(
                f"{folder}: model_type {config.model_type!r} has no parameter *.self_attn.q_proj.weight, "
                "and the demo trains query projections only"
            )
        return cls(name, model, AutoTokenizer.from_pretrained(folder, **local), queries)

    @property
    def vocabulary(self) -> int:
        """The number of columns of the logits."""
        return self.model.get_output_embeddings().weight.size(0)

    @property
    def max_length(self) -> int:
        """The number of positions of the model."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2**31

    @property
    def trained_share(self) -> tuple[int, int]:
        """Trained and all parameters."""
        return sum(q.numel() for q in self.queries), sum(p.numel() for p in self.model.parameters())

    def reset(self) -> None:
        """Give the query projections the values they were loaded with."""
        with torch.no_grad():
            for query, start in zip(self.queries, self._start, strict=True):
                query.copy_(start)

    def rows(self, batch: Batch) -> Tensor:
        """Logits (R, V) of the target rows alone: the head is not applied to the others."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        return self.model.get_output_embeddings()(hidden[batch.sequence, batch.position])

    @torch.no_grad()
    def check_head(self, batch: Batch) -> None:
        """Return if :meth:`rows` gives what the model itself gives.

        Raises:
            ValueError: the model does something behind its head (a soft cap, a scale), which the rows would miss.
        """
        own = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        own = own[batch.sequence, batch.position]
        error = (self.rows(batch) - own).abs().max() / own.abs().max()
        if not error <= _HEAD_TOLERANCE:
            raise ValueError(
                f"model_type {self.model.config.model_type!r} changes its logits behind the head (by {error:.1e}); "
                "the demo takes models without such a step"
            )

    @torch.no_grad()
    def answers(self, items: Sequence[Encoded], new_tokens: int) -> list[str]:
        """Greedy continuations of the prompts."""
        from transformers import GenerationConfig

        input_ids, attention_mask = left_padded_prompts(items)
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        output = self.model.generate(input_ids, attention_mask=attention_mask, generation_config=config)
        texts = self.tokenizer.batch_decode(output[:, input_ids.size(1) :], skip_special_tokens=True)
        return [text.strip() for text in texts]
