"""The heads of real architectures, fused: the loss and every gradient of the model's own logits; what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from caref_kernels import CarefConfig, caref_loss
from caref_kernels.testing import IDENTITIES, check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

import tiny_heads  # noqa: E402 - after the guards above
from tiny_trainers import make_trainer  # noqa: E402

from caref_kernels.integrations.transformers import TERMS, attach_caref, fused_head  # noqa: E402
from caref_kernels.integrations.transformers_heads import HEADS, check_head  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.*`tie_word_embeddings` set to True:UserWarning",
    "ignore:.*tied.*:UserWarning",
)
BACKEND = {"backend": "auto"}


def loss_of_logits(model, inputs, labels, **options):
    logits = model(**inputs).logits
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shifted = labels if base.config.is_encoder_decoder else functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return caref_loss(logits, shifted, **options)


def expected_of(model, inputs, labels, **options):
    """Loss and gradients from the model's logits."""
    return gradients_of(model, loss_of_logits(model, inputs, labels, **options))


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(actual, expected) -> None:
    check_identity(actual[0], expected[0], "float32_terms")
    assert actual[1].keys() == expected[1].keys()
    scale = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() <= IDENTITIES["float32_gradient"] * scale, name


@pytest.mark.parametrize("kind", tiny_heads.KINDS)
def test_every_known_head(kind):
    model = tiny_heads.make(kind)
    inputs, labels = tiny_heads.batch(model)
    expected = expected_of(model, inputs, labels, lambda_sced=0.5)
    assert tiny_heads.KINDS[kind][0] in HEADS
    with fused_head(model) as head:
        outputs = model(**inputs)
        assert outputs.logits.shape == (*labels.shape, tiny_heads.WIDTH)
        check_same(gradients_of(model, head.loss(outputs, labels, lambda_sced=0.5)), expected)
    check_same(expected_of(model, inputs, labels, lambda_sced=0.5), expected)


def test_every_class_of_the_list_is_tested():
    assert {model_class for model_class, *_ in tiny_heads.KINDS.values()} == set(HEADS)


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_evaluation_and_generation_are_untouched(kind):
    model = tiny_heads.make(kind)
    inputs, labels = tiny_heads.batch(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    with fused_head(model) as head:
        assert model.training
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), plain)
        model(**inputs)
        model.eval()
        outputs = model(**inputs, labels=labels)
        check_identity(outputs.logits.detach(), logits, "float32")
        assert outputs.loss.isfinite()
        evaluated = head.loss(model(**inputs), labels)
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), plain)
        with torch.no_grad():
            check_identity(head.loss(model.train()(**inputs), labels), evaluated.detach(), "float32_terms")
        assert "forward" not in vars(model.get_output_embeddings())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_caref_fused_head")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("first", ["peft", "head"])
@pytest.mark.parametrize("saved", [False, True], ids=["frozen", "modules_to_save"])
def test_under_peft_in_either_order(kind, first, saved):
    """LoRA below a frozen head, or with a trained copy of it."""

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

    plain = adapted(tiny_heads.make(kind))
    inputs, labels = tiny_heads.batch(plain.get_base_model())
    expected = expected_of(plain, inputs, labels)
    base = tiny_heads.make(kind)
    if first == "head":
        head = fused_head(base)
        model = adapted(base)
    else:
        model = adapted(base)
        head = fused_head(model)
    if saved:  # train the copy away from the original, so that the wrong one would show
        for one in (plain, model):
            wrapper = one.get_base_model().get_output_embeddings()
            with torch.no_grad():
                wrapper.modules_to_save["default"].weight.mul_(1.5)
        expected = expected_of(plain, inputs, labels)
    actual = gradients_of(model, head.loss(model(**inputs), labels))
    check_same(actual, expected)
    assert any("lm_head" in name for name in actual[1]) is saved
    with model.disable_adapter(), plain.disable_adapter():
        loss, other = head.loss(model(**inputs), labels), loss_of_logits(plain, inputs, labels)
        check_identity(loss.detach(), other.detach(), "float32_terms")
    head.remove()
    assert model(**inputs).logits.size(-1) == tiny_heads.VOCABULARY


@pytest.mark.parametrize("first", ["peft", "head"])
def test_an_adapter_on_the_head_is_refused_F06_H16(first):
    base = tiny_heads.make("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    inputs, _ = tiny_heads.batch(base)
    head = fused_head(base) if first == "head" else None
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"must be a torch.nn.Linear to be fused; got Linear \(an adapter on the head"):
        fused_head(model) if head is None else model(**inputs)


def test_autocast_is_that_of_the_model_D05():
    """The products of the head run in the dtype that the model's own head had."""
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16
    shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:]
    expected = caref_loss(logits, shifted)
    with fused_head(model) as head:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**inputs)
        loss = head.loss(outputs.logits.float(), labels)  # outside, on the float32 copy that accelerate makes
    check_identity(loss.detach(), expected.detach(), "float32_terms")
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- refusals


def test_labels_in_the_forward_pass_are_refused():
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    with fused_head(model):
        with pytest.raises(ValueError, match="labels must not be given to a model whose head is fused"):
            model(**inputs, labels=labels)
        assert model(**inputs).logits.size(-1) == tiny_heads.WIDTH
    assert model(**inputs, labels=labels).loss.isfinite()


def test_an_error_in_the_forward_pass_leaves_the_model_whole():
    model = tiny_heads.make("bart")
    inputs, _ = tiny_heads.batch(model)
    with fused_head(model):
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            model(input_ids=inputs["input_ids"], decoder_input_ids=torch.tensor([[1.5]]))
        assert "forward" not in vars(model.lm_head)
        assert model.final_logits_bias.shape == (1, tiny_heads.VOCABULARY)


def test_models_that_cannot_be_fused():
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its logits, final_logit_softcapping = 30"):
        fused_head(tiny_heads.make("gemma2", final_logit_softcapping=30.0))
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    unknown = transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=61, rotary_dim=4, **sizes))
    with pytest.raises(ValueError, match="the head of GPTJForCausalLM is not known to be safe to fuse; those of Bart"):
        fused_head(unknown)
    model = tiny_heads.make("llama")
    with pytest.raises(TypeError, match=r"before any other wrapper; got Sequential"):
        fused_head(nn.Sequential(model))
    with fused_head(model), pytest.raises(ValueError, match="the head of this LlamaForCausalLM is fused already"):
        fused_head(model)
    square = tiny_heads.make("llama", vocab_size=tiny_heads.WIDTH)
    with pytest.raises(ValueError, match="V = D = 16"):
        fused_head(square)


class DTensor(nn.Parameter):
    """Named like the distributed one."""


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (nn.Parameter(torch.empty(0)), r"not here: shape \(0,\) on cpu \(a ZeRO-3 or FSDP shard"),
        (nn.Parameter(torch.empty(61, 16, device="meta")), r"not here: shape \(61, 16\) on meta"),
        (DTensor(torch.zeros(61, 16)), r"is a DTensor \(FSDP2 or tensor parallelism\)"),
    ],
)
def test_weights_that_are_elsewhere_F07_O04(weight, message):
    """Also when it happens after the head was fused."""
    model = tiny_heads.make("llama")
    inputs, _ = tiny_heads.batch(model)
    with fused_head(model):
        model.lm_head.weight = weight
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match=message):
        fused_head(model)


def test_heads_that_are_more_than_their_weight():
    head = nn.Linear(4, 9)
    check_head(head)
    with pytest.raises(ValueError, match=r"got Embedding \(unknown\)"):
        check_head(nn.Embedding(9, 4))
    replaced = copy.deepcopy(head)
    replaced.forward = lambda hidden: hidden
    with pytest.raises(ValueError, match="its forward pass is replaced"):
        check_head(replaced)


@pytest.mark.parametrize("batch", ["default", "own"])
def test_the_check_notices_what_is_done_to_the_logits(batch):
    """A model of a known class whose logits are scaled behind the head: refused, and left as it was."""
    model = tiny_heads.make("llama")
    inputs, _ = tiny_heads.batch(model)

    class Scaled(type(model)):
        def forward(self, *arguments, **options):
            outputs = super().forward(*arguments, **options)
            outputs.logits = outputs.logits * 1.01 + 0.5
            return outputs

    Scaled.__name__ = type(model).__name__
    model.__class__ = Scaled
    with pytest.raises(ValueError, match="on one batch its logits differ from weight . hidden . bias by"):
        fused_head(model, batch=inputs if batch == "own" else None)
    assert not model._forward_hooks
    assert model.training
    assert model(**inputs).logits.size(-1) == tiny_heads.VOCABULARY


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
        loss = attach_caref(trainer, fuse_head=fuse)
        assert (loss.head is not None) is fuse
        trainer.train()
        trainers.append(trainer)
    plain, fused = (torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) for trainer in trainers)
    assert (plain - fused).abs().max() <= 2 * IDENTITIES["float32"]
    for a, b in zip(*(trainer.state.log_history for trainer in trainers), strict=True):
        for name in ("loss", *TERMS, "eval_loss", "eval_ce"):
            if name in a:
                check_identity(torch.tensor(b[name]), torch.tensor(a[name]), "float32_terms", name)


def test_the_options_are_a_configuration():
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    with fused_head(model) as head:
        outputs = model(**inputs)
        config = CarefConfig(lambda_kl=0.7, reduction="none", return_terms=True)
        out = head.loss(outputs, labels, config=config)
        assert out.loss.shape == labels.shape
        again = head.loss(outputs, labels, lambda_kl=0.7, reduction="none")
        check_identity(again.detach(), out.loss.detach(), "float32")
        unshifted = head.loss(outputs, labels, shift=False, lambda_kl=0.7)
        assert not torch.equal(unshifted, again.sum() / 9)
