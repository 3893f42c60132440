"""``apply_caref`` survives what happens to a model: copies, files, removal, wrappers, nesting, errors, threads."""

from __future__ import annotations

import copy
import functools
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from caref_kernels import backends
from caref_kernels.testing import check_identity

transformers = pytest.importorskip("transformers", minversion="5.17")
peft = pytest.importorskip("peft")

import tiny_heads  # noqa: E402 - after the guards above
from tiny_heads import check_same, gradients_of  # noqa: E402

from caref_kernels.integrations.transformers import apply_caref, record_terms, remove_caref  # noqa: E402

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


# ------------------------------------------------------------------------------------------------ life of a model


@FORMS
@KINDS
def test_copies_files_and_averages_keep_the_loss(kind, fuse_head, tmp_path):
    model, inputs, labels = applied(kind, fuse_head, lambda_sced=0.3)
    names = set(tiny_heads.make(kind).state_dict())
    assert set(model.state_dict()) == names
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False), averaged]
    expected = model(**inputs, labels=labels).loss
    remove_caref(model)
    for one in copies:
        outputs = one.train()(**inputs, labels=labels)
        assert torch.equal(outputs.loss, expected)
        assert (outputs.logits is None) is fuse_head
    copies[0].save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    check_identity(
        loaded(**inputs, labels=labels).loss.detach(), model(**inputs, labels=labels).loss.detach(), "float32_terms"
    )
    assert "_caref" not in vars(loaded)


@FORMS
@KINDS
def test_a_second_apply_replaces_the_options_and_removal_undoes_it(kind, fuse_head):
    plain = tiny_heads.make(kind)
    before = set(vars(plain))
    inputs, labels = tiny_heads.batch(plain)
    own = plain(**inputs, labels=labels).loss
    for weight in (0.7, 0.0):
        assert apply_caref(plain, fuse_head=fuse_head, lambda_sced=weight, backend=BACKEND) is plain
        check_same(
            gradients_of(plain, plain(**inputs, labels=labels).loss),
            tiny_heads.exact(plain, inputs, labels, lambda_sced=weight),
        )
    apply_caref(plain, fuse_head=not fuse_head)
    assert (plain(**inputs, labels=labels).logits is None) is not fuse_head
    remove_caref(remove_caref(plain))
    assert torch.equal(plain(**inputs, labels=labels).loss, own)
    assert set(vars(plain)) == before


def test_what_a_user_has_set_comes_back():
    model = tiny_heads.make("llama")
    model.loss_function = mine = functools.partial(transformers.loss.loss_utils.ForCausalLMLoss)  # not the default
    model.accepts_loss_kwargs = False
    apply_caref(model)
    apply_caref(model)
    assert model.accepts_loss_kwargs
    remove_caref(model)
    assert model.loss_function is mine
    assert model.accepts_loss_kwargs is False


@FORMS
def test_accelerate_may_wrap_and_unwrap_the_forward(fuse_head):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, inputs, labels = applied("llama", fuse_head)
    expected = model(**inputs, labels=labels).loss
    prepared = accelerator.prepare(model)
    loss = prepared(**inputs, labels=labels).loss
    check_identity(loss.detach(), expected.detach(), "bfloat16_head")
    assert not torch.equal(loss, expected)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    outputs = unwrapped(**inputs, labels=labels)
    assert torch.equal(outputs.loss, expected)
    assert (outputs.logits is None) is fuse_head
    copied = copy.deepcopy(unwrapped)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    assert not torch.equal(copied(**inputs, labels=labels).loss, expected)
    for wrapped in (unwrapped, accelerator.prepare(unwrapped)):  # a removal cannot reach below what accelerate wraps
        own = remove_caref(wrapped)(**inputs, labels=labels)
        assert own.logits is not None
        assert not torch.equal(own.loss, expected)
        outputs = apply_caref(wrapped, fuse_head=fuse_head, backend=BACKEND)(**inputs, labels=labels)
        assert (outputs.logits is None) is fuse_head
        check_identity(outputs.loss.detach(), expected.detach(), "bfloat16_head")
    accelerate.state.AcceleratorState._reset_state(True)


@FORMS
@pytest.mark.parametrize("first", ["dispatch", "caref"])
def test_a_device_map_of_accelerate_keeps_the_loss(fuse_head, first):
    """The hooks of a device map, which replace the forward of every module, keep the loss."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_heads.make("llama")
    inputs, labels = tiny_heads.batch(model)
    expected = tiny_heads.exact(model, inputs, labels)

    def dispatch():
        accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(io_same_device=True))
        accelerate.hooks.attach_align_device_hook(model, execution_device="cpu")

    if first == "dispatch":
        dispatch()
    apply_caref(model, fuse_head=fuse_head, backend=BACKEND)
    if first == "caref":
        dispatch()
    outputs = model(**inputs, labels=labels)
    assert (outputs.logits is None) is fuse_head
    check_same(gradients_of(model, outputs.loss), expected)


class Distilled(nn.Module):
    """A model whose forward runs a second model first."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        student.register_forward_pre_hook(lambda *_: self.run_teacher())

    def run_teacher(self) -> None:
        self.seen = self.teacher(**self.inputs, labels=self.labels)

    def forward(self, inputs, labels):
        self.inputs, self.labels = inputs, labels
        return self.student(**inputs, labels=labels)


@FORMS
def test_models_inside_of_one_another_have_their_own_losses(fuse_head):
    student, inputs, labels = applied("llama", fuse_head)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2)
    alone = [model(**inputs, labels=labels).loss for model in (teacher, student)]
    # A teacher that runs in the middle of the student's forward pass, under a pass of its own.
    layer = student.model.layers[0]
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(teacher(**inputs, labels=labels).loss))
    outputs = student(**inputs, labels=labels)
    assert torch.equal(outputs.loss, alone[1])
    assert torch.equal(seen[0], alone[0])
    both = Distilled(teacher, student)
    assert torch.equal(both(inputs, labels).loss, alone[1])
    assert torch.equal(both.seen.loss, alone[0])


@FORMS
@KINDS
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["before the head", "in the head", "after the head"])
def test_nothing_outlives_a_pass_that_fails(kind, fuse_head, error, place):
    model, inputs, labels = applied(kind, fuse_head)
    expected = model(**inputs, labels=labels).loss
    head = model.get_output_embeddings()
    logits = head(torch.ones(1, tiny_heads.WIDTH))

    def fail(*_arguments):
        raise error("stop")

    if place == "before the head":
        handle = model.get_decoder().register_forward_hook(fail)
    elif place == "in the head":
        handle = head.register_forward_pre_hook(fail)
    else:
        handle = model.register_forward_hook(fail)
    with record_terms() as passes, pytest.raises(error):
        model(**inputs, labels=labels)
    handle.remove()
    assert torch.equal(head(torch.ones(1, tiny_heads.WIDTH)), logits)
    assert model(**inputs).logits.size(-1) == tiny_heads.VOCABULARY
    assert len(passes) == (place == "after the head")
    assert torch.equal(model(**inputs, labels=labels).loss, expected)


@FORMS
def test_threads_have_passes_of_their_own(fuse_head):
    model, inputs, labels = applied("llama", fuse_head)
    batches = [(inputs["input_ids"].roll(step, -1), labels.roll(step, -1)) for step in range(6)]
    expected = [model(input_ids=tokens, labels=targets).loss.detach() for tokens, targets in batches]
    found: dict[int, list[torch.Tensor]] = {}
    barrier = threading.Barrier(len(batches))

    def work(index: int) -> None:
        barrier.wait()
        with record_terms() as passes:
            losses = [model(input_ids=batches[index][0], labels=batches[index][1]).loss.detach() for _ in range(20)]
        found[index] = losses if len(passes) == 20 else []

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, losses in found.items():
        assert len(losses) == 20
        assert all(torch.equal(loss, expected[index]) for loss in losses)
    assert len(found) == len(batches)


@FORMS
@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_checkpointing_gives_the_same_gradients(kind, fuse_head, use_reentrant):
    model, inputs, labels = applied(kind, fuse_head)
    expected = gradients_of(model, model(**inputs, labels=labels).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # a reentrant checkpoint wants an input with a gradient
    check_same(gradients_of(model, model(**inputs, labels=labels, use_cache=False).loss), expected)
    model.gradient_checkpointing_disable()
    with record_terms() as passes:
        whole = checkpoint(
            lambda anchor: model(**inputs, labels=labels).loss + 0 * anchor,
            torch.zeros((), requires_grad=True),
            use_reentrant=use_reentrant,
        )
        assert len(passes) == 1
        check_same(gradients_of(model, whole), expected)
        # The pass is computed again; a non-reentrant checkpoint stops as soon as it has what it had saved.
        assert len(passes) == 1 + use_reentrant


@FORMS
@KINDS
def test_a_retained_graph_and_two_losses_give_the_same_gradients(kind, fuse_head):
    model, inputs, labels = applied(kind, fuse_head)
    expected = gradients_of(model, model(**inputs, labels=labels).loss)
    loss = model(**inputs, labels=labels).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    check_same(gradients_of(model, loss), expected)
    losses = [model(**inputs, labels=labels).loss for _ in range(2)]
    check_same(gradients_of(model, (losses[0] + 3 * losses[1]) / 4), expected)
