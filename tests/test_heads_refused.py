"""Heads that cannot be fused are refused: hooks, changed logits, weights elsewhere; a replaced head is fused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

import tiny_heads  # noqa: E402 - after the guards above
from tiny_heads import check_same, gradients_of  # noqa: E402

from caref_kernels.integrations.heads import check_head  # noqa: E402
from caref_kernels.integrations.transformers import apply_caref  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.*`tie_word_embeddings` set to True:UserWarning",
    "ignore:.*tied.*:UserWarning",
)


def loss_of(model, inputs, labels):
    return model(**inputs, labels=labels).loss


# -------------------------------------------------------------------------------------------------------- refusals


class DTensor(nn.Parameter):
    """A tensor subclass with the name of the distributed one."""


def test_weights_that_are_elsewhere_are_refused():
    """A weight that is not here is refused, also if it went after the loss was applied."""
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    apply_caref(model, fuse_head=True)
    for weight in (nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(61, 16, device="meta"))):
        model.lm_head.weight = weight
        with pytest.raises(ValueError, match=r"is not here in its own forward pass: shape \(.*\) on (cpu|meta)"):
            loss_of(model, inputs, labels)


def test_heads_that_are_more_than_their_weight_are_refused():
    check_head(nn.Linear(4, 9))
    with pytest.raises(ValueError, match=r"got Embedding; leave fuse_head False"):
        check_head(nn.Embedding(9, 4))
    with pytest.raises(ValueError, match="has no output embeddings"):
        check_head(None)

    class Scaled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    with pytest.raises(ValueError, match=r"got .*Scaled; leave fuse_head False"):
        check_head(Scaled(4, 9))
    Scaled.__module__ = "bitsandbytes.nn.modules"
    with pytest.raises(ValueError, match="Scaled, a quantised layer, whose weight is not that of its product; leave"):
        check_head(Scaled(4, 9))


@pytest.mark.parametrize("kind", ["forward", "full_backward", "full_backward_pre"])
def test_an_unknown_hook_on_the_head_is_refused_at_every_pass(kind):
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    apply_caref(model, fuse_head=True)
    expected = loss_of(model, inputs, labels)

    def cap(_module, _args, output):
        return output.clamp(-1, 1)

    name = f"register_{kind}_hook"
    handle = getattr(model.lm_head, name)(cap if kind == "forward" else lambda *_arguments: None)
    with pytest.raises(ValueError, match=r"the output head has a hook, test_heads_refused\..* that would see the loss"):
        loss_of(model, inputs, labels)
    with pytest.raises(ValueError, match="the output head has a hook"):
        apply_caref(model, fuse_head=True)
    handle.remove()
    apply_caref(model, fuse_head=True)
    assert torch.equal(loss_of(model, inputs, labels), expected)


def test_a_hook_on_the_input_of_the_head_is_obeyed():
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    apply_caref(model, fuse_head=True)
    model.lm_head.register_forward_pre_hook(lambda _module, args: (1.5 * args[0],))
    expected = tiny_heads.exact(model, inputs, labels)
    check_same(gradients_of(model, loss_of(model, inputs, labels)), expected)


@pytest.mark.parametrize("change", ["masked", "clamped", "added"])
@pytest.mark.parametrize("batch", ["default", "own"])
def test_the_trial_notices_what_is_done_to_the_logits(change, batch):
    """The head is refused and the model left as it was; the loss from its logits can still be applied."""
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)

    class Changed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            if change == "masked":
                logits = logits.index_fill(-1, torch.tensor([7]), torch.finfo(logits.dtype).min)
            elif change == "clamped":
                logits = logits.clamp(-50, 50)
            else:
                logits = logits + 0.5 * logits.new_ones(logits.size(-1)).cumsum(0)
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model.__class__ = Changed
    probe_batch = {**inputs, "labels": labels} if batch == "own" else None
    with pytest.raises(ValueError, match="something is done to its logits that is neither a scale nor a softcap"):
        apply_caref(model, fuse_head=True, probe_batch=probe_batch)
    assert not model._forward_pre_hooks
    assert model.training
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    apply_caref(model, probe_batch=probe_batch)
    check_same(gradients_of(model, loss_of(model, inputs, labels)), tiny_heads.exact(model, inputs, labels))


def test_a_model_that_calls_its_head_twice_is_refused():
    class Twice(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = (self.lm_head(hidden) + self.lm_head(hidden)) / 2
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model = tiny_heads.make("llama")
    model.__class__ = Twice
    with pytest.raises(ValueError, match="Twice calls its output head 2 times in one forward pass; it must be once"):
        apply_caref(model, fuse_head=True)
    apply_caref(model)


def test_a_head_that_was_replaced_is_fused_all_the_same():
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    apply_caref(model, fuse_head=True)
    model.resize_token_embeddings(tiny_heads.VOCABULARY + 6)
    outputs = model(**inputs, labels=labels)
    assert outputs.logits is None
    check_same(gradients_of(model, outputs.loss), tiny_heads.exact(model, inputs, labels))
