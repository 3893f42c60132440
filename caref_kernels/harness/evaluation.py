"""A model on the examples of a split: greedy answers, likelihoods of the options, entropies of the target tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caref_kernels import caref_loss

from .data import Example
from .encoding import EXPLANATION, LABEL, Encoded, Encoder
from .metrics import calibration

IGNORED = -100
# Rows of logits for which the loss's terms are computed at a time: 64 rows of a vocabulary of 128k are 31 MiB.
_ROWS = 64


@dataclass(frozen=True)
class Evaluator:
    """A model with what is needed to question it.

    Args:
        model: in evaluation mode, on its device.
        encoder: of the dataset, for this model.
        batch_size: sequences at a time.
        after_batch: called after every batch.
    """

    model: Any
    encoder: Encoder
    batch_size: int
    after_batch: Callable[[], None] = lambda: None

    @torch.no_grad()
    def answers(self, examples: Sequence[Example], new_tokens: int) -> list[str]:
        """Greedy answers of at most ``new_tokens`` tokens."""
        from transformers import GenerationConfig

        tokenizer = self.encoder.tokenizer
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=_padding(tokenizer),
            decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
        )
        prompts = [self.encoder.prompt(example) for example in examples]
        texts: list[str] = [""] * len(prompts)
        for indices in self._batches([len(prompt) for prompt in prompts]):
            input_ids, mask = self._pad([prompts[i] for i in indices], left=self.encoder.causal)
            output = self.model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
            new = output[:, input_ids.size(1) :] if self.encoder.causal else output
            for i, text in zip(indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[i] = text.strip()
            self.after_batch()
        return texts

    @torch.no_grad()
    def calibration(self, examples: Sequence[Example]) -> dict[str, float]:
        """Calibration over the options, from the likelihood of ``label because`` behind the prompt."""
        items = [
            Encoded(example, prompt, candidate, ())
            for example in examples
            for prompt in [self.encoder.prompt(example)]
            for candidate in self.encoder.candidates(example)
        ]
        scores: list[float] = [0.0] * len(items)
        for indices in self._batches([len(item.prompt) + len(item.target) for item in items]):
            logits, labels = self._rows([items[i] for i in indices])
            counts = [len(items[i].target) for i in indices]
            for i, part in zip(indices, _terms(logits, labels)[:, 0].split(counts), strict=True):
                scores[i] = -part.sum().item()
            self.after_batch()
        options = max(len(example.choices) for example in examples)
        table = torch.full((len(examples), options), -torch.inf, dtype=torch.float64)
        values = iter(scores)
        for row, example in enumerate(examples):
            for column in range(len(example.choices)):
                table[row, column] = next(values)
        return calibration(table, torch.tensor([example.label for example in examples]))

    @torch.no_grad()
    def targets(self, examples: Sequence[Example]) -> dict[str, float]:
        """Means over the tokens of the gold targets: NLL and entropy in nats, and k_t = ceil(exp(entropy))."""
        items = [self.encoder(example) for example in examples]
        terms, parts = [], []
        for indices in self._batches([len(item.prompt) + len(item.target) for item in items]):
            terms.append(_terms(*self._rows([items[i] for i in indices])))
            parts += [part for i in indices for part in items[i].parts]
            self.after_batch()
        (nll, entropy), part = torch.cat(terms).unbind(1), torch.tensor(parts)
        return {
            "label_nll": nll[part == LABEL].mean().item(),
            "label_entropy": entropy[part == LABEL].mean().item(),
            "explanation_nll": nll[part == EXPLANATION].mean().item(),
            "explanation_entropy": entropy[part == EXPLANATION].mean().item(),
            "k_t": num_kept(entropy).mean().item(),
        }

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Positions in batches of similar length, longest first, so that memory runs out at once or not at all."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _rows(self, items: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits (R, V) that predict the target tokens, and these tokens (R,), in the order of ``items``."""
        device = self.model.device
        labels = torch.tensor([token for item in items for token in item.target], device=device)
        if self.encoder.causal:
            input_ids, mask = self._pad([item.prompt + item.target for item in items])
            logits = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
            starts = [len(item.prompt) - 1 for item in items]
        else:
            input_ids, mask = self._pad([item.prompt for item in items])
            first = self.model.config.decoder_start_token_id
            decoder, _ = self._pad([(first, *item.target[:-1]) for item in items])
            logits = self.model(
                input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder, use_cache=False
            ).logits
            starts = [0] * len(items)
        places = [(row, start + i) for row, start in enumerate(starts) for i in range(len(items[row].target))]
        row, column = torch.tensor(places, device=device).unbind(1)
        return logits[row, column], labels

    def _pad(self, sequences: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """The sequences (B, T), padded on one side, and their mask."""
        width = max(map(len, sequences))
        padding = _padding(self.encoder.tokenizer)
        rows, masks = [], []
        for sequence in sequences:
            fill = [padding] * (width - len(sequence))
            mask = [1] * len(sequence)
            rows.append([*fill, *sequence] if left else [*sequence, *fill])
            masks.append([*[0] * len(fill), *mask] if left else [*mask, *[0] * len(fill)])
        device = self.model.device
        return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


def num_kept(entropy: Tensor) -> Tensor:
    """k_t, the number of tokens that an entropy-adaptive mask of scale 1 would keep: ceil(exp(entropy))."""
    return entropy.double().exp().ceil()


def _terms(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, 2) float64 on the CPU: cross-entropy and entropy of every row."""
    parts = []
    for rows, targets in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        out = caref_loss(rows, targets, lambda_sced=0.0, lambda_kl=0.0, reduction="none", return_terms=True)
        parts.append(torch.stack([out.ce, out.entropy], 1).double().cpu())
    return torch.cat(parts)


def _padding(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
