"""``num_items=0``, the divisor of a rank or micro-batch without labels, in every function, eager and compiled."""

from __future__ import annotations

import math

import pytest
import torch

from caref_kernels import (
    CarefConfig,
    CarefLoss,
    LinearCarefLoss,
    SCEDLoss,
    TopK,
    caref_loss,
    fused_sced,
    linear_caref_loss,
)
from caref_kernels.testing import make_case

ROWS, COLUMNS, FEATURES = 6, 40, 5
WEIGHTS = [{"lambda_kl": 0.0}, {"lambda_sced": 0.0}, {"lambda_sced": 0.0, "lambda_kl": 0.0}]


def _loss(function: str, backend: str, num_items, **options):
    """A function of (leaf, weight, labels); the leaf is the logits, or the hidden states of a head."""
    options["backend"] = backend
    sced = {name: value for name, value in options.items() if not name.startswith(("lambda", "return"))}
    return {
        "caref_loss": lambda x, _, y: caref_loss(x, y, num_items=num_items, **options),
        "fused_sced": lambda x, _, y: fused_sced(x, valid=y != -100, num_items=num_items, **sced),
        "linear": lambda x, w, y: linear_caref_loss(x, w, y, num_items=num_items, chunk_rows=4, **options),
        "CarefLoss": lambda x, _, y: CarefLoss(**options)(x, y, num_items=num_items),
        "SCEDLoss": lambda x, _, y: SCEDLoss(**sced)(x, y != -100, num_items=num_items),
        "LinearCarefLoss": lambda x, w, y: LinearCarefLoss(**options)(x, w, y, num_items=num_items),
    }[function]


FUNCTIONS = ["caref_loss", "fused_sced", "linear", "CarefLoss", "SCEDLoss", "LinearCarefLoss"]


def _tensors(function: str, ignored: int, rows: int = ROWS):
    case = make_case("normal_1", rows, COLUMNS, seed=1, ignored=ignored)
    weight = make_case("normal_1", COLUMNS, FEATURES, seed=2).logits.requires_grad_()
    leaf = make_case("normal_1", rows, FEATURES, seed=3).logits if "inear" in function else case.logits
    leaf = leaf.clone()
    leaf[case.labels == CarefConfig.ignore_index] = math.nan  # ignored rows may hold anything
    return leaf.requires_grad_(), weight, case.labels


def _items(kind: str):
    return {"int": 0, "float": 0.0, "int64": torch.tensor(0), "int32": torch.tensor(0, dtype=torch.int32),
            "float32": torch.tensor(0.0)}[kind]  # fmt: skip


# Of torch's own compiler.
compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("rows", [ROWS, 0])
@pytest.mark.parametrize("kind", ["int", "float", "int64", "int32", "float32"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_row_and_no_item(backend, function, kind, rows):
    """Loss and gradient are 0, so that such a rank adds nothing to a step; a mean over no row stays NaN."""
    leaf, weight, labels = _tensors(function, rows, rows)
    loss = _loss(function, backend, _items(kind))(leaf, weight, labels)
    assert loss.item() == 0
    (3 * loss).backward()
    for gradient in (leaf.grad, weight.grad if "inear" in function else leaf.grad):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    mean = _loss(function, backend, None)(leaf, weight, labels)
    assert math.isnan(mean.detach())
    assert torch.count_nonzero(torch.autograd.grad(mean, leaf)[0]) == 0


@pytest.mark.parametrize("function", ["caref_loss", "linear"])
def test_no_row_and_no_item_with_terms(backend, function):
    leaf, weight, labels = _tensors(function, ROWS)
    options = {"return_terms": True, "sparsity": TopK(3)}
    out = _loss(function, backend, 0, **options)(leaf, weight, labels)
    assert [term.item() for term in out if term is not None] == [0.0] * 8
    for name in ("loss", "ce", "sced", "kl"):
        (gradient,) = torch.autograd.grad(getattr(out, name), leaf, retain_graph=True)
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("kind", ["int", "float", "int64", "float32"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_that_are_no_items_are_an_error(raising_backend, function, kind):
    """The error names both numbers; it is raised where it needs no synchronisation with a device."""
    tensors = _tensors(function, 2)
    with pytest.raises(
        ValueError, match=r"num_items must be > 0 where there are valid rows; got .*0.* for 4 valid rows"
    ):
        _loss(function, raising_backend, _items(kind))(*tensors)


@compiler
@pytest.mark.parametrize(
    ("function", "weights"),
    [*((name, {}) for name in FUNCTIONS), *((name, one) for name in ("caref_loss", "linear") for one in WEIGHTS)],
    ids=str,
)
def test_a_number_of_items_that_is_not_read(backend, function, weights):
    """Compiled code does not read the number: 0 gives 0 without valid rows, infinity with them, no gradient of NaN."""
    torch._dynamo.reset()

    def step(leaf, weight, labels, items):
        return _loss(function, backend, items, **weights)(leaf * 1.0, weight, labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ignored, value in ((ROWS, 0.0), (2, math.inf)):
        leaf, weight, labels = _tensors(function, ignored)
        loss = compiled(leaf, weight, labels, torch.tensor(0, dtype=torch.int32))
        assert loss.item() == value
        (2 * loss).backward()
        assert torch.count_nonzero(leaf.grad) == 0
        assert "inear" not in function or torch.count_nonzero(weight.grad) == 0
    leaf, weight, labels = _tensors(function, 2)
    for items in (3.0, 7.0):
        assert torch.equal(compiled(leaf, weight, labels, torch.tensor(items)), step(leaf, weight, labels, items))


@compiler
def test_terms_of_a_number_of_items_that_is_not_read(backend):
    torch._dynamo.reset()

    def step(logits, labels, items):
        return tuple(caref_loss(logits * 1.0, labels, num_items=items, return_terms=True, backend=backend))[:5]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ignored, value in ((ROWS, 0.0), (2, math.inf)):
        leaf, _, labels = _tensors("caref_loss", ignored)
        terms = compiled(leaf, labels, torch.tensor(0.0))
        assert [term.item() for term in terms] == [value] * 5
        (gradient,) = torch.autograd.grad(terms[0] + terms[2], leaf)
        assert torch.count_nonzero(gradient) == 0
