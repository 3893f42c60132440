"""Every layout gives bitwise the result of its contiguous copy; contiguous rows are not copied, gaps not written."""

from __future__ import annotations

import math

import pytest
import torch

from caref_kernels import CarefConfig, caref_loss, fused_sced
from caref_kernels.testing import check_evaluation, evaluate, make_case, oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _values(shape, dtype):
    columns = shape[-1]
    return make_case("lm_like", math.prod(shape[:-1]), columns, dtype, seed=len(shape)).logits.view(shape)


def _in_gaps(shape, strides, dtype, offset=0):
    """A view with these strides into storage that holds NaN wherever no element lies."""
    size = offset + 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)) + 16
    storage = torch.full((size,), math.nan, dtype=dtype)
    view = storage.as_strided(shape, strides, offset)
    return view.copy_(_values(shape, dtype))


LAYOUTS = {
    "all but the last position": lambda dtype: _in_gaps((2, 4, 33), (5 * 33, 33, 1), dtype),
    "(S, B, V) transposed": lambda dtype: _values((4, 2, 33), dtype).transpose(0, 1),
    "column slice of padded rows": lambda dtype: _in_gaps((6, 33), (40, 1), dtype),
    "column slice, 3-D": lambda dtype: _in_gaps((2, 3, 33), (3 * 40, 40, 1), dtype),
    "every second column": lambda dtype: _in_gaps((6, 33), (70, 2), dtype),
    "transposed columns": lambda dtype: _values((33, 6), dtype).t(),
    "offset by one": lambda dtype: _in_gaps((6, 33), (33, 1), dtype, offset=1),
    "offset by seven, gaps": lambda dtype: _in_gaps((2, 3, 33), (200, 50, 1), dtype, offset=7),
    "expanded rows": lambda dtype: _values((1, 33), dtype).expand(6, 33),
    "expanded batch": lambda dtype: _values((1, 3, 33), dtype).expand(2, 3, 33),
    "4-D": lambda dtype: _values((2, 3, 2, 33), dtype),
    "4-D permuted": lambda dtype: _values((2, 3, 2, 33), dtype).permute(2, 0, 1, 3),
    "single column, odd stride": lambda dtype: _in_gaps((5, 1), (7, 3), dtype),
    "single row": lambda dtype: _in_gaps((1, 33), (500, 1), dtype),
    "rows with gaps of a block": lambda dtype: _in_gaps((3, 1500), (2048, 1), dtype),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, layout, dtype):
    logits = LAYOUTS[layout](dtype)
    rows = logits.shape[:-1]
    labels = torch.arange(math.prod(rows)).view(rows) % logits.size(-1)
    if labels.numel() > 1:
        labels.view(-1)[1] = -100
    strided = evaluate(logits, labels, backend=backend)
    dense = evaluate(logits.clone(memory_format=torch.contiguous_format), labels, backend=backend)
    for name, term in strided.terms._asdict().items():
        assert term.shape == rows
        assert torch.equal(term, getattr(dense.terms, name)), name
    for part, gradient in strided.gradients.items():
        assert gradient.shape == logits.shape
        assert torch.equal(gradient, dense.gradients[part]), part
    flat = logits.reshape(-1, logits.size(-1))
    if logits.dim() == 2:
        check_evaluation(strided, oracle(flat, labels.flatten()), label=layout)


NOT_COPIED = ("all but the last position", "(S, B, V) transposed", "column slice of padded rows", "column slice, 3-D",
              "offset by seven, gaps", "expanded rows", "expanded batch", "single column, odd stride")  # fmt: skip


@pytest.mark.parametrize("layout", NOT_COPIED)
def test_rows_that_lie_whole_are_not_copied(backend, layout):
    logits = LAYOUTS[layout](torch.float32).detach().requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_sced(logits, backend=backend)
    assert logits.data_ptr() in saved


@pytest.mark.parametrize("layout", ["all but the last position", "(S, B, V) transposed", "column slice of padded rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_gradient_stays_inside_a_strided_view(backend, dtype, layout):
    view = LAYOUTS[layout](dtype)
    storage = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    inside = torch.zeros(storage.shape, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    before = storage.clone()
    labels = torch.zeros(view.shape[:-1], dtype=torch.long)
    expected = evaluate(view.clone(), labels, ("loss",), backend=backend).gradients["loss"]
    carrier = view.detach().requires_grad_()
    logits = carrier.view_as(carrier)
    caref_loss(logits, labels, reduction="sum", inplace_backward=True, backend=backend).backward()
    assert torch.equal(view, expected)
    assert torch.equal(torch.nan_to_num(storage[~inside], nan=7), torch.nan_to_num(before[~inside], nan=7))


@pytest.mark.parametrize("layout", ["transposed", "every second row", "expanded"])
def test_strides_of_the_row_gradients(backend, layout):
    """The operator accepts gradients of the terms (N, 3) with any strides."""
    case = make_case("lm_like", 4, 33, seed=8, ignored=1)
    spec = (*CarefConfig(return_terms=True).row_spec(33), backend)
    weights = torch.randn(8, 3, generator=torch.Generator().manual_seed(8))
    strided = {
        "transposed": weights[:4].t().contiguous().t(),
        "every second row": weights[::2],
        "expanded": weights[:1].expand(4, 3),
    }[layout]
    _, stats = torch.ops.caref_kernels.forward(*case, *spec)
    gradients = [
        torch.ops.caref_kernels.backward(grad_terms, *case, stats, *spec)
        for grad_terms in (strided, strided.clone(memory_format=torch.contiguous_format))
    ]
    assert torch.equal(*gradients)
    assert torch.count_nonzero(gradients[0]) == 3 * 33


def test_gradient_reaches_the_padded_base(backend):
    """For a column slice of a padded vocabulary the gradient of the padding is exactly 0."""
    base = _values((4, 40), torch.float32).clone().requires_grad_()
    labels = torch.tensor([0, 1, 2, 32])
    caref_loss(base[:, :33], labels, backend=backend).backward()
    assert torch.count_nonzero(base.grad[:, 33:]) == 0
    dense = base.detach()[:, :33].clone().requires_grad_()
    caref_loss(dense, labels, backend=backend).backward()
    assert torch.equal(base.grad[:, :33], dense.grad)


def _label_layouts():
    wide = torch.arange(24).view(2, 12) % 33
    return {
        "sliced": wide[:, 1:4],
        "every third": wide[:, ::4],
        "transposed": (torch.arange(6).view(3, 2) * 5).t(),
        "expanded": torch.tensor([[4], [-100]]).expand(2, 3),
        "int32": wide.int()[:, 2:5],
    }


@pytest.mark.parametrize("layout", _label_layouts())
def test_label_layouts_change_nothing(backend, layout):
    labels = _label_layouts()[layout]
    logits = _values((2, 3, 33), torch.float32)
    strided = evaluate(logits, labels, ("loss",), backend=backend)
    dense = evaluate(logits, labels.clone(memory_format=torch.contiguous_format), ("loss",), backend=backend)
    assert torch.equal(strided.terms.loss, dense.terms.loss)
    assert torch.equal(strided.gradients["loss"], dense.gradients["loss"])


def test_mask_layouts_change_nothing(backend):
    logits = _values((2, 3, 33), torch.float32)
    mask = torch.tensor([[1, 1], [0, 1], [1, 0]]).t()
    strided = fused_sced(logits, valid=mask, reduction="none", backend=backend)
    assert torch.equal(strided, fused_sced(logits, valid=mask.contiguous(), reduction="none", backend=backend))
    assert torch.equal(strided != 0, mask != 0)


def test_parameter_is_accepted_as_a_tensor(backend):
    parameter = torch.nn.Parameter(_values((4, 33), torch.float32).clone())
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(caref_loss(parameter, labels, backend=backend).detach(),
                       caref_loss(parameter.detach(), labels, backend=backend))  # fmt: skip


def test_meta_tensors_have_shapes():
    logits = torch.empty(2, 3, 33, device="meta", requires_grad=True)
    labels = torch.empty(2, 3, dtype=torch.long, device="meta")
    for reduction, shape in (("none", (2, 3)), ("mean", ()), ("sum", ())):
        out = caref_loss(logits, labels, reduction=reduction, return_terms=True, backend="reference")
        assert {term.shape for term in out if term is not None} == {shape}
        assert torch.autograd.grad(out.loss.sum(), logits)[0].shape == (2, 3, 33)


def test_unknown_subclass_is_refused():
    class Annotated(torch.Tensor):
        pass

    logits = torch.zeros(2, 3).as_subclass(Annotated)
    with pytest.raises(TypeError, match="logits: expected a plain torch.Tensor; got the subclass Annotated"):
        caref_loss(logits, torch.tensor([0, 1]), backend="reference")
