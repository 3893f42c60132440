"""Eight rows that a real language model produced (bfloat16, V = 49,152), with float64 values of other code.

tests/data/README.md says where they come from.
"""

from __future__ import annotations

import pytest
import torch
from real_data import DATA, require_data

from caref_kernels import CarefConfig, EntropyTopK, caref_loss, ops
from caref_kernels.testing import check_evaluation, check_term, evaluate, evaluate_eager, oracle

TERMS = ("ce", "sced", "kl", "entropy")
TIED_MAXIMUM = 3


@pytest.fixture(scope="module")
def real():
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load_file(require_data(DATA / "smollm2_rows.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_terms_of_real_rows(backend, real, dtype):
    """Against the values in the file, which share no code with this project."""
    terms = evaluate(real["logits"].to(dtype), real["labels"], (), backend=backend).terms
    for name in TERMS:
        check_term(name, getattr(terms, name), real[name])


def test_reference_agrees_with_the_file(real):
    """Two float64 implementations; the same rows, so also the same tie rule at the maximum."""
    terms = oracle(real["logits"], real["labels"], ()).terms
    for name in TERMS:
        check_term(name, getattr(terms, name), real[name])


def test_masked_terms_of_real_rows(backend, real):
    """k = ceil(exp(H)), the counts above and at the threshold, and SCED over the mask, from the file."""
    out = caref_loss(
        real["logits"],
        real["labels"],
        sparsity=EntropyTopK(),
        reduction="none",
        return_terms=True,
        backend=backend,
    )
    assert torch.equal(out.num_kept.double(), real["support"].double())
    check_term("sced", out.sced, real["sced_entropy_topk"])
    spec = CarefConfig(sparsity=EntropyTopK()).row_spec(real["logits"].size(-1))
    _, stats = ops.forward(real["logits"], None, spec, backend)
    threshold, tie_weight = stats[:, -2:, None].unbind(1)
    above, equal = ((real["logits"] > threshold).sum(-1), (real["logits"] == threshold).sum(-1))
    assert torch.equal(above, real["n_gt"].long())
    assert torch.equal(equal, real["n_eq"].long())
    assert torch.equal(tie_weight[:, 0], ((real["support"] - above) / equal).to(tie_weight.dtype))


def test_gradients_of_real_rows(backend, real):
    """Several columns at the maximum, in three of the rows, against oracle and eager."""
    logits, labels = real["logits"], real["labels"]
    top = logits.max(-1, keepdim=True).values
    assert torch.equal((logits == top).sum(-1) > 1, real["selection"] == TIED_MAXIMUM)
    assert (real["selection"] == TIED_MAXIMUM).sum() == 3
    actual = evaluate(logits, labels, backend=backend)
    check_evaluation(actual, oracle(logits, labels), evaluate_eager(logits, labels))
