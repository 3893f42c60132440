"""``apply_caref`` makes the loss a model's own: arguments, torch.compile, PEFT, and refused models."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from caref_kernels import CarefConfig, backends, caref_loss
from caref_kernels.testing import IDENTITIES, check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

import tiny_heads  # noqa: E402 - after the guards above
from tiny_heads import check_same, gradients_of, rows_of  # noqa: E402

from caref_kernels.integrations.transformers import TERMS, apply_caref, record_terms, remove_caref  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.*`gradient_checkpointing.* is deprecated:FutureWarning",
    "ignore:.*tied.*:UserWarning",
)
BACKEND = next(name for name in backends.ORDER if backends.get(name).unsupported(torch.empty(1, 2)) is None)
FORMS = pytest.mark.parametrize("fuse_head", [False, True], ids=["logits", "fused"])
KINDS = pytest.mark.parametrize("kind", ["llama", "t5"])


def applied(kind: str, fuse_head: bool, **options):
    model = apply_caref(tiny_heads.make(kind), fuse_head=fuse_head, backend=BACKEND, **options)
    return model, *tiny_heads.batch(model)


# ------------------------------------------------------------------------------------------------------- arguments


@FORMS
@KINDS
@pytest.mark.parametrize("number", [7, 7.0, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)], ids=repr)
def test_num_items_in_batch_divides(kind, fuse_head, number):
    model, inputs, labels = applied(kind, fuse_head)
    total = caref_loss(*rows_of(model, inputs, labels), reduction="sum", backend=BACKEND)
    loss = model(**inputs, labels=labels, num_items_in_batch=number).loss
    check_identity(loss.detach(), total.detach() / 7, "float32_terms")


@FORMS
@KINDS
def test_a_batch_without_a_label_has_the_loss_0_or_nan(kind, fuse_head):
    """The loss is 0 with a zero gradient in training, and NaN in evaluation, as torch's cross-entropy is."""
    model, inputs, labels = applied(kind, fuse_head)
    nothing = torch.full_like(labels, -100)
    for zero in (0, torch.tensor(0)):
        loss, gradients = gradients_of(model, model(**inputs, labels=nothing, num_items_in_batch=zero).loss)
        assert loss == 0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())
        with torch.no_grad():
            assert model(**inputs, labels=nothing, num_items_in_batch=zero).loss.isnan()
    loss = model(**inputs, labels=nothing, num_items_in_batch=5).loss
    assert loss == 0
    loss, gradients = gradients_of(model, model(**inputs, labels=nothing).loss)
    assert loss.isnan()
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


@FORMS
def test_shift_labels_are_used_as_they_are(fuse_head):
    model, inputs, labels = applied("llama", fuse_head)
    shifted = labels.roll(2, -1)
    expected = caref_loss(*rows_of(model, inputs, labels, shifted), backend=BACKEND)
    check_identity(
        model(**inputs, labels=labels, shift_labels=shifted).loss.detach(), expected.detach(), "float32_terms"
    )


@FORMS
def test_packed_sequences_are_not_scored_across_their_boundaries(fuse_head):
    model, inputs, _ = applied("llama", fuse_head)
    examples = [{"input_ids": row.tolist()} for row in inputs["input_ids"]]
    packed = transformers.DataCollatorWithFlattening(return_tensors="pt")(examples)
    packed = {name: value for name, value in packed.items() if isinstance(value, torch.Tensor)}
    separate = model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss
    check_identity(model(**packed, use_cache=False).loss.detach(), separate.detach(), "float32_terms")


@FORMS
@KINDS
def test_outputs_as_a_tuple_and_positional_inputs_are_supported(kind, fuse_head):
    model, inputs, labels = applied(kind, fuse_head)
    outputs = model(**inputs, labels=labels)
    as_tuple = model(**inputs, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.loss)
    assert len(as_tuple) == len(outputs)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(model(inputs["input_ids"], **rest, labels=labels).loss, outputs.loss)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_gets_the_loss(wrap):
    model = tiny_heads.make("llama")
    wrapped = wrap(model)
    assert apply_caref(wrapped, backend=BACKEND) is wrapped
    inputs, labels = tiny_heads.batch(model)
    check_identity(
        model(**inputs, labels=labels).loss.detach(),
        caref_loss(*rows_of(model, inputs, labels), backend=BACKEND).detach(),
        "float32_terms",
    )
    assert remove_caref(wrapped) is wrapped
    assert not hasattr(model, "_caref")


@FORMS
@KINDS
def test_forward_may_be_called_directly(kind, fuse_head):
    """AdaLoRA calls ``forward`` directly, as every method of peft before 0.21 does, and hooks do not run then."""
    model, inputs, labels = applied(kind, fuse_head)
    outputs = model.forward(**inputs, labels=labels)
    assert torch.equal(outputs.loss, model(**inputs, labels=labels).loss)
    assert (outputs.logits is None) is fuse_head


@FORMS
def test_decoder_inputs_come_from_the_labels(fuse_head):
    model, inputs, labels = applied("t5", fuse_head)
    decoder = model.prepare_decoder_input_ids_from_labels(labels)
    expected = model(input_ids=inputs["input_ids"], decoder_input_ids=decoder, labels=labels).loss
    assert torch.equal(model(input_ids=inputs["input_ids"], labels=labels).loss, expected)


@FORMS
def test_a_label_that_is_no_column_is_an_error(fuse_head):
    model, inputs, labels = applied("llama", fuse_head)
    labels[0, 1] = tiny_heads.VOCABULARY
    with pytest.raises(IndexError, match="target 61 at row 0"):
        model(**inputs, labels=labels)


@FORMS
@KINDS
def test_terms_of_a_pass_are_those_of_its_logits(kind, fuse_head):
    model, inputs, labels = applied(kind, fuse_head)
    with record_terms() as outer:
        with record_terms() as passes:
            loss = model(**inputs, labels=labels).loss
            model(**inputs)
        model(**inputs, labels=labels)
    assert (len(passes), len(outer)) == (1, 2)
    expected = caref_loss(*rows_of(model, inputs, labels), return_terms=True, backend=BACKEND)
    for name, value in zip(TERMS, passes[0].values, strict=True):
        check_identity(value, getattr(expected, name).detach(), "float32_terms", name)
    assert torch.equal(passes[0].loss, loss)
    assert (passes[0].examples, passes[0].divided) == (2, False)
    assert not passes[0].values.requires_grad


# --------------------------------------------------------------------------------------------------- compilation


@FORMS
@KINDS
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_a_compiled_model_is_one_graph(kind, fuse_head):
    torch._dynamo.reset()
    model, inputs, labels = applied(kind, fuse_head)
    expected = gradients_of(model, model(**inputs, labels=labels).loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs, labels=labels)
    assert (outputs.logits is None) is fuse_head
    check_same(gradients_of(model, outputs.loss), expected)
    model.eval()
    with torch.no_grad():
        check_identity(compiled(**inputs, labels=labels).loss, expected[0], "float32_terms")


@FORMS
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_schedule_compiles_once_and_terms_are_recorded(fuse_head):
    """A second ``apply_caref`` changes numbers only, which costs the one compilation that makes them dynamic."""
    torch._dynamo.reset()
    model, inputs, labels = applied("llama", fuse_head)
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=compilations)
    for step in range(12):
        weight = 0.1 + 0.05 * step
        apply_caref(model, fuse_head=fuse_head, lambda_sced=weight, backend=BACKEND)
        with record_terms() as passes:
            loss = compiled(**inputs, labels=labels, num_items_in_batch=7.0 + step).loss
        (terms,) = passes
        ce, sced, kl, _ = terms.values
        check_identity(loss.detach(), ce + weight * sced + CarefConfig.lambda_kl * kl, "float32_terms")
        expected = model(**inputs, labels=labels, num_items_in_batch=7.0 + step).loss
        check_identity(loss.detach(), expected.detach(), "float32_terms")
    assert compilations.frame_count <= 3


# ---------------------------------------------------------------------------------------------------------- PEFT

_PREFIX = {"num_virtual_tokens": 3}
ADAPTERS = {
    "LoraConfig": {"r": 2},
    "AdaLoraConfig": {"total_step": 10, "tinit": 1, "tfinal": 1, "orth_reg_weight": 0.0},
    "IA3Config": {},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "VeraConfig": {"r": 2},
    "OFTConfig": {"oft_block_size": 4},
    "LNTuningConfig": {},
    "PromptTuningConfig": _PREFIX,
    "PromptEncoderConfig": {**_PREFIX, "encoder_hidden_size": 8},
    "PrefixTuningConfig": _PREFIX,
}


@FORMS
@KINDS
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_every_method_of_peft_trains(kind, fuse_head, adapter):
    """Without regularisers the loss is the model's own, virtual tokens included."""
    base = tiny_heads.make(kind)
    inputs, labels = tiny_heads.batch(base)
    options = dict(ADAPTERS[adapter])
    if adapter not in ("PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig", "LNTuningConfig"):
        options["target_modules"] = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    if adapter == "IA3Config":
        options["feedforward_modules"] = []
    if adapter == "LNTuningConfig":
        options["target_modules"] = ["final_layer_norm"] if kind == "t5" else ["input_layernorm"]
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    torch.manual_seed(5)
    model = peft.get_peft_model(base, getattr(peft, adapter)(task_type=task, **options)).train()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.manual_seed(6)
    expected = gradients_of(model, model(**inputs, labels=labels).loss)
    apply_caref(model, fuse_head=fuse_head, lambda_sced=0.0, lambda_kl=0.0, backend=BACKEND)
    torch.manual_seed(6)
    check_same(gradients_of(model, model(**inputs, labels=labels).loss), expected)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' for a model's loss, .* got 'sum'"),
        ({"ignore_index": 0}, ValueError, "ignore_index must be -100 for a model's loss, .* got 0"),
        ({"inplace_backward": True}, ValueError, "inplace_backward must be False for a model's loss"),
        ({"alpha": 0.5}, ValueError, "alpha must be in"),
        ({"lamda_sced": 0.5}, TypeError, "CarefConfig has no option 'lamda_sced'; did you mean 'lambda_sced'"),
        ({"config": CarefConfig(), "alpha": 2.0}, TypeError, "give either a CarefConfig or options, not both"),
        ({"config": 0.1}, TypeError, "config must be a CarefConfig; got 0.1"),
        ({"fuse_head": "yes"}, TypeError, "fuse_head must be True or False; got 'yes'"),
    ],
)
def test_options_are_checked(options, error, message):
    model = tiny_heads.make("llama")
    with pytest.raises(error, match=f"^{message}"):
        apply_caref(model, **options)
    assert "_caref" not in vars(model)


def test_models_that_cannot_have_the_loss_are_refused():
    with pytest.raises(TypeError, match="model must be a transformers model, or a wrapper of one; got Sequential"):
        apply_caref(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="got int"):
        apply_caref(3)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    classifier = transformers.BertForSequenceClassification(config)
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification could not be tried on one batch \(.*probe_batch="
    ):
        apply_caref(classifier)
    assert "_caref" not in vars(classifier)
    assert "forward" not in vars(classifier)


def test_a_masked_language_model_is_scored_without_a_shift():
    """Whether labels are shifted is observed on the model, not derived from its class."""
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForMaskedLM(config).eval()
    tokens = torch.arange(3, 12)[None]
    expected = caref_loss(model(input_ids=tokens).logits[0], tokens[0], backend=BACKEND)
    apply_caref(model, backend=BACKEND)
    check_identity(model(input_ids=tokens, labels=tokens).loss.detach(), expected.detach(), "float32_terms")


def test_losses_that_a_model_adds_itself_are_not_dropped():
    """Encoder-decoder models add router losses in their forward without calling a loss function: they are refused."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=2, dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=0, router_jitter_noise=0.0,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    tokens = torch.arange(3, 9)[None]
    apply_caref(model, backend=BACKEND)
    logits = model(input_ids=tokens, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(tokens)).logits
    expected = caref_loss(logits[0], tokens[0], backend=BACKEND)
    actual = model(input_ids=tokens, labels=tokens, output_router_logits=False).loss
    check_identity(actual.detach(), expected.detach(), "float32_terms")
    with pytest.raises(ValueError, match=r"adds losses of its own to its cross-entropy, .*aux_loss.* would be lost"):
        model(input_ids=tokens, labels=tokens, output_router_logits=True)


def test_a_forward_that_is_replaced_afterwards_is_noticed():
    """A Liger kernel replaces the forward by one that never calls the model's loss function."""
    model, inputs, labels = applied("llama", False)

    def replaced(input_ids, labels=None, **_options):
        logits = model.lm_head(model.model(input_ids=input_ids).last_hidden_state)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    vars(model)["forward"].inner = replaced
    with pytest.raises(RuntimeError, match="LlamaForCausalLM made a loss without asking its loss_function"):
        model(**inputs, labels=labels)


def test_a_model_that_makes_its_logits_without_its_head_is_not_fused():
    class Unheaded(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            logits = functional.linear(self.model(input_ids=input_ids).last_hidden_state, self.lm_head.weight)
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model = tiny_heads.make("llama")
    model.__class__ = Unheaded
    with pytest.raises(ValueError, match="Unheaded calls its output head 0 times in one forward pass; it must be once"):
        apply_caref(model, fuse_head=True)


def test_the_loss_function_by_itself_is_the_loss_of_its_logits():
    """Called on logits it is the loss; with a fused head it raises, because no forward pass is running."""
    model, inputs, labels = applied("llama", False)
    logits = model(**inputs).logits
    alone = model.loss_function(logits=logits, labels=labels, vocab_size=tiny_heads.VOCABULARY)
    assert torch.equal(alone, model(**inputs, labels=labels).loss)
    apply_caref(model, fuse_head=True)
    with pytest.raises(RuntimeError, match="loss_function was called outside of the model's forward pass"):
        model.loss_function(logits=logits, labels=labels, vocab_size=tiny_heads.VOCABULARY)


@FORMS
def test_a_plain_sft_trainer_is_refused_by_the_model(fuse_head):
    model, inputs, labels = applied("llama", fuse_head)
    with pytest.raises(ValueError, match=r"asked for the log-probabilities of its labels \(fused_lm_head=True\)"):
        model(**inputs, labels=labels, fused_lm_head=True)


def test_the_comparison_would_notice_a_wrong_shift():
    model, inputs, labels = applied("llama", False)
    right, wrong = model(**inputs, labels=labels).loss, model(**inputs, labels=labels, shift_labels=labels).loss
    assert abs(right - wrong) > 1e3 * IDENTITIES["float32"]


# ------------------------------------------------------------------------------------------------- the module itself


def test_transformers_is_imported_by_this_module_alone():
    code = "import sys, caref_kernels.integrations; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_an_old_version_is_refused(monkeypatch):
    name = "caref_kernels.integrations.transformers"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.2")
    with pytest.raises(ImportError, match=r"needs transformers >= 5\.17 .* got 5\.16\.2"):
        importlib.import_module(name)
