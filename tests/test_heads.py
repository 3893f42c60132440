"""Fused heads of real architectures have the loss and every gradient of the model's own logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from caref_kernels import caref_loss
from caref_kernels.testing import IDENTITIES, check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

import tiny_heads  # noqa: E402 - after the guards above
from tiny_heads import check_same, gradients_of  # noqa: E402
from tiny_trainers import make_trainer  # noqa: E402

from caref_kernels.integrations.transformers import TERMS, apply_caref, attach_caref, remove_caref  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.*`tie_word_embeddings` set to True:UserWarning",
    "ignore:.*tied.*:UserWarning",
)


def loss_of(model, inputs, labels):
    return model(**inputs, labels=labels).loss


@pytest.mark.parametrize("kind", tiny_heads.KINDS)
def test_a_fused_head_has_the_loss_and_gradients_of_the_logits(kind):
    """The reference is the definition of the loss on the logits of a float64 copy of the model."""
    model = tiny_heads.make(kind)
    inputs, labels = tiny_heads.batch(model)
    expected = tiny_heads.exact(model, inputs, labels, lambda_sced=0.5)
    own = model(**inputs, labels=labels).loss.detach()
    for fuse_head in (False, True):
        apply_caref(model, fuse_head=fuse_head, lambda_sced=0.5)
        outputs = model(**inputs, labels=labels)
        assert (outputs.logits is None) is fuse_head
        check_same(gradients_of(model, outputs.loss), expected)
        without_terms = model(**inputs)
        assert without_terms.logits.shape == (*labels.shape, tiny_heads.VOCABULARY)
    remove_caref(model)
    assert torch.equal(model(**inputs, labels=labels).loss, own)


@pytest.mark.parametrize("family", tiny_heads.FAMILIES)
def test_heads_of_further_families_have_the_same_loss(family):
    """The model's own logits have the loss; the fused head has the loss and every gradient of these logits."""
    model = tiny_heads.make_family(family)
    inputs, labels = tiny_heads.batch(model)
    apply_caref(model)
    shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:]
    expected = caref_loss(remove_caref(copy.deepcopy(model))(**inputs).logits, shifted, backend="reference")
    found = []
    for fuse_head in (False, True):
        apply_caref(model, fuse_head=fuse_head)
        outputs = model(**inputs, labels=labels)
        assert (outputs.logits is None) is fuse_head
        check_identity(outputs.loss.detach(), expected.detach(), "float32_terms")
        found.append(gradients_of(model, outputs.loss))
    check_same(*found)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "t5", "bart", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_in_16_bits_are_accurate(kind, dtype):
    model = tiny_heads.make(kind)
    inputs, labels = tiny_heads.batch(model)
    model = model.to(dtype)
    expected, _ = tiny_heads.exact(model, inputs, labels)
    apply_caref(model, fuse_head=True)
    actual = model(**inputs, labels=labels).loss
    check_identity(actual.detach(), expected, "bfloat16_head" if dtype == torch.bfloat16 else "float16_head")
    actual.backward()


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_evaluation_and_generation_are_untouched(kind):
    model = tiny_heads.make(kind)
    inputs, labels = tiny_heads.batch(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    apply_caref(model, fuse_head=True)
    assert model.training
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), plain)
    trained = loss_of(model, inputs, labels).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs = model(**inputs, labels=labels)
            check_identity(outputs.logits.clone(), logits, "float32")
            check_identity(outputs.loss.clone(), trained, "float32_terms")
    model.eval()
    outputs = model(**inputs, labels=labels)
    check_identity(outputs.logits.detach(), logits, "float32")
    check_identity(outputs.loss.detach(), trained, "float32_terms")
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), plain)
    head = model.get_output_embeddings()
    check_identity(head(torch.ones(1, tiny_heads.WIDTH)).detach(), head.weight.sum(1)[None].detach(), "float32_terms")
    remove_caref(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert "forward" not in vars(model)
    assert "forward" not in vars(head)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("first", ["peft", "caref"])
@pytest.mark.parametrize("saved", [False, True], ids=["frozen", "modules_to_save"])
def test_heads_are_fused_under_peft_in_either_order(kind, first, saved):
    """LoRA below a frozen head, or with a trained copy of the head, applied before or after the loss."""

    def adapted(model):
        targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
        config = peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM",
            r=2,
            target_modules=targets,
            modules_to_save=["lm_head"] if saved else None,
            init_lora_weights=False,
        )
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    base = tiny_heads.make(kind)
    inputs, labels = tiny_heads.batch(base)
    model = (
        adapted(apply_caref(base, fuse_head=True)) if first == "caref" else apply_caref(adapted(base), fuse_head=True)
    )
    if saved:  # train the copy, so that its values differ from the original
        with torch.no_grad():
            base.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    expected = tiny_heads.exact(model, inputs, labels)
    check_same(gradients_of(model, loss_of(model, inputs, labels)), expected)
    assert any("lm_head" in name for name in expected[1]) is saved
    with model.disable_adapter():
        check_identity(
            loss_of(model, inputs, labels).detach(), tiny_heads.exact(model, inputs, labels)[0], "float32_terms"
        )
    remove_caref(model)
    assert model(**inputs).logits.size(-1) == tiny_heads.VOCABULARY


def test_two_adapters_may_have_heads_of_their_own():
    """A pass has the loss of the adapter's head that it used, also if another adapter ran since."""
    base = tiny_heads.make("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    apply_caref(model, fuse_head=True)
    inputs, labels = tiny_heads.batch(base)
    with torch.no_grad():
        base.get_output_embeddings().modules_to_save["two"].weight.mul_(3)
    losses, expected = [], []
    for name in ("one", "two"):
        model.set_adapter(name)
        expected.append(tiny_heads.exact(model, inputs, labels)[0])
        losses.append(loss_of(model, inputs, labels))
    heads = base.get_output_embeddings().modules_to_save
    heads.requires_grad_(True)  # PEFT freezes the adapter that is not active
    (losses[0] + losses[1]).backward()
    check_identity(torch.stack(losses).detach(), torch.stack(expected), "float32_terms")
    assert heads["one"].weight.grad.norm() > 0
    assert heads["two"].weight.grad.norm() > 0


@pytest.mark.parametrize("first", ["peft", "caref"])
def test_an_adapter_on_the_head_is_refused(first):
    base = tiny_heads.make("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    inputs, labels = tiny_heads.batch(base)
    message = r"must be a torch.nn.Linear to be fused; got Linear, an adapter on the head: its logits are"
    if first == "peft":
        with pytest.raises(ValueError, match=message):
            apply_caref(peft.get_peft_model(base, config), fuse_head=True)
        assert "_caref" not in vars(base)
    else:
        model = peft.get_peft_model(apply_caref(base, fuse_head=True), config)
        with pytest.raises(ValueError, match=message):
            loss_of(model, inputs, labels)
    apply_caref(base)  # on the logits
    check_identity(loss_of(base, inputs, labels).detach(), tiny_heads.exact(base, inputs, labels)[0], "float32_terms")


def test_trainable_tokens_on_a_tied_head_are_refused():
    base = tiny_heads.make("smollm2")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match="got TrainableTokensWrapper: trainable_token_indices replaces rows"):
        apply_caref(model, fuse_head=True)


def test_autocast_is_that_of_the_model():
    """A fused head multiplies in the dtype in which the model's own head would."""
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    losses = []
    for fuse_head in (False, True):
        apply_caref(model, fuse_head=fuse_head)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(model, inputs, labels))
    check_identity(losses[1].detach(), losses[0].detach(), "float32_terms")
    exact, _ = tiny_heads.exact(model, inputs, labels)
    assert (losses[1] - exact).abs() > IDENTITIES["float32_terms"] * exact  # rounded to bfloat16
    losses[1].backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_no_tensor_of_the_size_of_the_logits_is_made():
    """Neither the forward nor the backward makes one; a pass that makes logits fails the same measurement."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
            return result

    rows, columns = 2048, 4096
    model = tiny_heads.make("llama", vocab_size=columns, max_position_embeddings=rows)
    tokens = torch.arange(rows)[None] % columns
    for fuse_head in (True, False):
        apply_caref(model, fuse_head=fuse_head)
        with Largest() as largest:
            loss_of(model, {"input_ids": tokens}, tokens).backward()
        assert (largest.elements >= rows * columns) is not fuse_head


def test_an_infinite_loss_stays_infinite():
    """An infinite loss stays infinite, because a gradient scaler looks for overflows in it."""
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    apply_caref(model, fuse_head=True)
    loss = model(**inputs, labels=labels, num_items_in_batch=2e-38).loss
    assert loss.isinf()
    (2.0**16 * loss).backward()
    assert not model.lm_head.weight.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------------- trainers


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_trainer_with_a_fused_head_makes_the_same_step(kind, lora, tmp_path):
    trainers = []
    for fuse in (False, True):
        trainer = make_trainer(
            kind,
            tmp_path,
            lora=lora,
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            eval_strategy="steps",
            eval_steps=1,
        )
        attach_caref(trainer, fuse_head=fuse)
        trainer.train()
        trainers.append(trainer)
    plain, fused = (torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) for trainer in trainers)
    assert (plain - fused).abs().max() <= 2 * IDENTITIES["float32"]
    for a, b in zip(*(trainer.state.log_history for trainer in trainers), strict=True):
        for name in ("loss", *TERMS, "eval_loss", "eval_ce"):
            if name in a:
                check_identity(torch.tensor(b[name]), torch.tensor(a[name]), "float32_terms", name)


def test_copies_of_a_fused_model_are_independent():
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    apply_caref(model, fuse_head=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    for one in (model, copied):
        check_same(gradients_of(one, loss_of(one, inputs, labels)), tiny_heads.exact(one, inputs, labels))
        assert one(**inputs).logits.size(-1) == tiny_heads.VOCABULARY
    remove_caref(copied)
    assert copied(**inputs, labels=labels).logits is not None
    assert model(**inputs, labels=labels).logits is None
