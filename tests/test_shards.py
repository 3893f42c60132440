"""A row split over ranks equals the row; the ranks are threads here, processes in test_vocab_parallel.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_threads import evaluate_split
from test_properties import row_sets

from caref_kernels import EntropyTopK, TopK
from caref_kernels.testing import REGIMES, check_gradient, check_identity, check_term, make_case, oracle

TERMS = ("ce", "sced", "kl")
PARTS = {"loss": [1.0, 0.1, 0.1], "ce": [1.0, 0.0, 0.0], "sced": [0.0, 1.0, 0.0], "kl": [0.0, 0.0, 1.0]}
CUTS = [7, 7, 150]  # of 300 columns: 7, none, 143 and 150


def check_split(logits, labels, cuts, backend, label="", **options):
    expected = oracle(logits, labels, **options)
    terms, gradients, calls = evaluate_split(logits, labels, cuts, backend, list(PARTS.values()), **options)
    for index, name in enumerate(TERMS):
        check_term(name, terms[:, index], getattr(expected.terms, name), label=f"{label} {name}")
    for name, gradient in zip(PARTS, gradients, strict=True):
        check_gradient(gradient, expected.gradients[name], label=f"{label} gradient of {name}")
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(backend, regime, dtype):
    check_split(*make_case(regime, 9, 300, dtype, seed=3, ignored=2), CUTS, backend)


@pytest.mark.parametrize("regime", ["normal_3", "confident_1e-7", "lm_like", "tied_maxima"])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5, "beta": 0.5},
        {"alpha": 4.0, "beta": 2.0},
        {"alpha": 1.0, "beta": 0.0},
        {"alpha": 16.0, "beta": 0.1},
        {"vocab_size": 310},
        {"sparsity": TopK(3)},
        {"sparsity": TopK(1000)},
        {"sparsity": EntropyTopK(scale=0.3)},
        {"sparsity": EntropyTopK(scale=2.0, k_min=2, k_max=9), "alpha": 1.5},
    ],
    ids=str,
)
def test_options(backend, regime, options):
    check_split(*make_case(regime, 9, 300, torch.float32, seed=4, ignored=2), CUTS, backend, **options)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows=row_sets(dtypes=(torch.float64,)), data=st.data())
def test_any_split(rows, data):
    """A row split at any points over 1 to 4 ranks, some of them empty, gives the result of the whole row."""
    logits, labels, backend = rows
    cuts = sorted(data.draw(st.lists(st.integers(0, logits.size(1)), max_size=3)))
    whole, (gradient,), _ = evaluate_split(logits, labels, [], backend, [PARTS["loss"]])
    split, (pieces,), _ = evaluate_split(logits, labels, cuts, backend, [PARTS["loss"]])
    for index, name in enumerate(TERMS):
        # One is added because KL and SCED of a near-uniform row are small differences of larger numbers.
        check_identity(1 + split[:, index], 1 + whole[:, index], "float64", name)
    check_identity(pieces, gradient, "float64_far")
    expected = oracle(logits, labels, ("loss",))
    check_identity(split @ split.new_tensor(PARTS["loss"]), expected.terms.loss, "float64_far")


def test_maxima_on_several_ranks(backend):
    """Several ranks may hold the maximum, one of them twice, and the label may be at a maximum or elsewhere."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 300, generator=generator)
    logits[:, [2, 60, 61, 299]] = logits.max() + 3
    for options in ({}, {"alpha": 1.5, "beta": 0.5}, {"sparsity": TopK(2)}, {"sparsity": TopK(7)}):
        check_split(logits, torch.tensor([2, 61, 299, 100]), [50, 170], backend, str(options), **options)


@pytest.mark.parametrize("options", [{"sparsity": TopK(9)}, {"sparsity": EntropyTopK(k_min=5)}], ids=str)
def test_a_mask_over_fewer_finite_columns_than_k(backend, options):
    """Columns of -inf are never in a mask, whether a rank has some finite columns or none; k is the finite ones."""
    logits, labels = make_case("normal_3", 5, 60, seed=11)
    logits = logits.clone()
    logits[:, 20:] = -math.inf  # two of three ranks
    logits[0, 1:] = logits[1, 4:] = -math.inf
    logits[2, 3:19] = -math.inf
    check_split(logits, logits.argmax(-1), [20, 40], backend, str(options), **options)


def test_rows_without_a_softmax(backend):
    """A row with NaN, with +inf, or of -inf only is NaN on every rank; the other rows are unchanged."""
    case = make_case("lm_like", 7, 60, seed=6)
    spoiled = case.logits.clone()
    spoiled[1, 5] = math.nan
    spoiled[3, 59] = math.inf
    spoiled[4] = -math.inf
    spoiled[5, :40] = -math.inf  # a whole rank of -inf, which is no error
    labels = case.labels.clone()
    labels[5], labels[6] = 50, -100
    terms, (gradient,), _ = evaluate_split(spoiled, labels, [20, 40], backend, [PARTS["loss"]])
    good = [0, 2, 5, 6]
    assert terms.isnan().all(1).tolist() == [False, True, False, True, True, False, False]
    expected = oracle(spoiled[good], labels[good], ("loss",))
    for index, name in enumerate(TERMS):
        check_term(name, terms[good, index], getattr(expected.terms, name), label=name)
    check_gradient(gradient[good], expected.gradients["loss"])
    assert gradient[[1, 3, 4]].isnan().all()


@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 59])
def test_ignored_rows(backend, ignore_index):
    """Rows are ignored by their global label, also if it is a column or equals another label's local column."""
    case = make_case("lm_like", 6, 60, seed=7)
    logits, labels = case.logits.clone(), torch.tensor([3, 23, 43, 0, 59, 20])
    labels[1] = labels[4] = ignore_index
    logits[1] = math.nan
    terms, (gradient,), _ = evaluate_split(
        logits, labels, [20, 40], backend, [PARTS["loss"]], ignore_index=ignore_index
    )
    counts = labels != ignore_index
    assert torch.equal(terms[~counts], torch.zeros_like(terms[~counts]))
    assert torch.equal(gradient[~counts], torch.zeros_like(gradient[~counts]))
    expected = oracle(logits[counts], labels[counts], ("loss",), ignore_index=ignore_index)
    check_gradient(gradient[counts], expected.gradients["loss"])


@pytest.mark.parametrize("ignore_index", [2**32 + 3, -(2**32), 2**40])
def test_ignore_index_that_int32_labels_cannot_hold(backend, ignore_index):
    case = make_case("lm_like", 4, 60, seed=10)
    labels = torch.tensor([3, 0, 59, 23])
    wide, narrow = (
        evaluate_split(case.logits, kind, [20, 40], backend, [PARTS["loss"]], ignore_index=ignore_index)
        for kind in (labels, labels.int())
    )
    assert torch.equal(wide[0], narrow[0])
    assert torch.equal(wide[1][0], narrow[1][0])
    check_term("ce", narrow[0][:, 0], oracle(case.logits, labels, ()).terms.ce)


@pytest.mark.parametrize("label", [60, -1, 2**40])
def test_label_out_of_range(backend, label):
    """The label is refused before anything is exchanged, so no rank waits for another."""
    case = make_case("lm_like", 3, 60, seed=8)
    labels = case.labels.clone()
    labels[2] = label
    with pytest.raises(IndexError, match=rf"target {label} at row 2 is out of range \[0, 60\)"):
        evaluate_split(case.logits, labels, [20], backend, [PARTS["loss"]])


@pytest.mark.parametrize(
    ("options", "bytes_per_row"),
    [
        ({}, [("MAX", 4), ("SUM", 80)]),
        ({"alpha": 4.0, "beta": 2.0}, [("MAX", 4), ("SUM", 152)]),
        ({"lambda_sced": 0.0, "return_terms": False}, [("MAX", 4), ("SUM", 32)]),
        ({"alpha": 1.5}, [("MAX", 4), ("SUM", 32), ("SUM", 16)]),
        ({"sparsity": TopK(5)}, [("MAX", 4), ("SUM", 32), ("GATHER", 20), ("SUM", 8), ("SUM", 16)]),
    ],
    ids=str,
)
def test_exchanges_and_their_bytes(options, bytes_per_row):
    """The bytes per row are those that the documents state: 4 + 80 for the defaults."""
    rows = 11
    calls = evaluate_split(*make_case("lm_like", rows, 60, seed=9), [20, 40], "reference", [], **options)[2]
    assert calls == [(kind, size * rows) for kind, size in bytes_per_row]
