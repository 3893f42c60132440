"""The trial on one batch finds out how a model makes its loss and its logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from caref_kernels import caref_loss
from caref_kernels.testing import check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")

import tiny_heads  # noqa: E402 - after the guard above

from caref_kernels.integrations import probe  # noqa: E402
from caref_kernels.integrations.transformers import apply_caref  # noqa: E402

BACKEND = "reference"


@pytest.mark.parametrize("asks", [True, False], ids=["asks for its loss", "makes its loss"])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "aligned"])
def test_the_way_to_a_loss_and_the_shift_are_found_apart(asks, shift):
    class Model(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **options):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            loss = None
            if labels is not None:
                targets = functional.pad(labels, (0, 1), value=-100)[..., 1:] if shift else labels
                loss = (
                    self.loss_function(logits, labels, self.vocab_size, shift_labels=targets)
                    if asks
                    else functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
                )
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model = tiny_heads.make("llama")
    model.__class__ = Model
    apply_caref(model, backend=BACKEND)
    assert vars(model)["_caref"].form[:2] == (asks, shift)
    tokens = torch.arange(3, 12)[None]
    scored = (slice(None, -1), slice(1, None)) if shift else (slice(None), slice(None))
    expected = caref_loss(model(input_ids=tokens).logits[0, scored[0]], tokens[0, scored[1]], backend=BACKEND)
    loss = model(input_ids=tokens, labels=tokens).loss
    check_identity(loss.detach(), expected.detach(), "float32_terms")


def test_a_model_that_asks_for_two_losses_is_refused():
    class Twice(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            losses = [self.loss_function(logits, labels, self.vocab_size) for _ in range(2 * (labels is not None))]
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=sum(losses) / 2, logits=logits)

    model = tiny_heads.make("llama")
    model.__class__ = Twice
    with pytest.raises(ValueError, match="Twice asks for 2 losses in one forward pass; which is CAREF's is not known"):
        apply_caref(model)


@pytest.mark.parametrize("name", ["logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"])
def test_every_name_of_a_factor_of_the_logits_is_tried(name):
    model = tiny_heads.make("llama")
    setattr(model.config, name, 2.5)
    assert probe._attributes(model, probe._FACTORS) == [2.5]


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "softcap", "logit_softcap"])
def test_every_name_of_a_softcap_is_tried(name):
    model = tiny_heads.make("llama")
    setattr(model.config, name, 2.5)
    assert probe._attributes(model, probe._SOFTCAPS) == [2.5]
