"""The top-k mask of SCED: exact thresholds, counts and tie weights, and the values and gradients they give."""

from __future__ import annotations

import math

import pytest
import torch
import triton_interpreter

from caref_kernels import CarefConfig, EntropyTopK, TopK, backends, caref_loss, fused_sced, objective, ops, sparsity
from caref_kernels.testing import (
    GRADCHECK,
    check_at_most,
    check_evaluation,
    check_gradient,
    check_identity,
    check_row_sums,
    check_term,
    eager_terms,
    evaluate,
    make_case,
    oracle,
    oracle_given,
)

POLICIES = (TopK(1), TopK(8), TopK(600), EntropyTopK(), EntropyTopK(scale=0.2, k_min=2), EntropyTopK(k_max=5))
# Not near_uniform: there log(p/U) is smaller than the rounding of r, which only cancels in a sum over all columns.
REGIMES = ("normal_1", "normal_10", "confident_1e-7", "bimodal", "lm_like", "tied_maxima")


def _statistics(logits, policy, backend):
    """(terms, statistics) of an operator call without labels."""
    spec = CarefConfig(sparsity=policy, return_terms=True).row_spec(logits.size(-1))
    return ops.forward(logits, None, spec, backend)


def _mask(logits, policy, backend):
    """(N, 3): num_kept, threshold, tie weight."""
    return _statistics(logits, policy, backend)[1][:, len(objective.STATISTICS) :]


def _exact_mask(logits, k):
    """The mask of a sort, in the dtype of the arithmetic."""
    values = logits.to(objective.accumulation_dtype(logits.dtype))
    return sparsity.top_k_mask(values, torch.full((len(logits), 1), k)).statistics()


def _num_kept(logits, labels, policy, backend, **options):
    return caref_loss(
        logits, labels, sparsity=policy, backend=backend, reduction="none", return_terms=True, **options
    ).num_kept


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(("columns", "dtype"), [(1000, torch.float32), (5000, torch.bfloat16)])
def test_values_given_the_num_kept(backend, regime, policy, columns, dtype):
    case = make_case(regime, 3, columns, dtype, seed=3)
    num_kept = _num_kept(*case, policy, backend)
    exact = _num_kept(case.logits.double(), case.labels, policy, "reference")
    assert ((num_kept - exact).abs() <= 1 + 2e-6 * exact).all()
    check_evaluation(evaluate(*case, sparsity=policy, backend=backend), oracle_given(num_kept, *case))


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.0), (4.0, 2.0), (1.5, 0.5), (3.0, 1.0), (1.0, 0.0)])
def test_exponents(backend, alpha, beta):
    case = make_case("lm_like", 3, 1000, seed=5)
    options = {"alpha": alpha, "beta": beta}
    num_kept = _num_kept(*case, EntropyTopK(), backend, **options)
    actual = evaluate(*case, sparsity=EntropyTopK(), backend=backend, **options)
    check_evaluation(actual, oracle_given(num_kept, *case, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(backend, dtype):
    case = make_case("normal_3", 3, 700, dtype, seed=6, ignored=1)
    num_kept = _num_kept(*case, EntropyTopK(scale=0.3), backend)
    assert num_kept[case.labels == -100] == 0
    counted = case.labels != -100
    actual = evaluate(case.logits[counted], case.labels[counted], sparsity=EntropyTopK(scale=0.3), backend=backend)
    check_evaluation(actual, oracle_given(num_kept[counted], case.logits[counted], case.labels[counted]))


@pytest.mark.parametrize("k", [1, 5, 64])
def test_reference_against_torch_topk(k):
    """The reference is the plain composition in float64 over the indices of torch.topk, however it breaks ties."""
    case = make_case("normal_3", 4, 500, torch.bfloat16, seed=7)
    leaf = case.logits.double().requires_grad_()
    p = leaf.softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, case.logits.topk(k, -1).indices, 1.0)
    sced = ((p * (p * 500).log()) ** 2 * (1 - p) * kept).sum(-1)
    (gradient,) = torch.autograd.grad(sced.sum(), leaf)
    actual = evaluate(case.logits.double(), case.labels, ("sced",), sparsity=TopK(k), backend="reference")
    check_term("sced", actual.terms.sced, sced.detach())
    # torch.topk gives the gradient of the tied columns to those that it happens to keep.
    tied = (case.logits == _mask(case.logits, TopK(k), "reference")[:, 1:2]).double()
    share = (gradient * tied).sum(-1, keepdim=True) / tied.sum(-1, keepdim=True)
    shared = torch.where(tied == 1, share, gradient)
    check_gradient(actual.gradients["sced"], shared)


@pytest.mark.parametrize("policy", [TopK(300), TopK(3000), EntropyTopK(scale=1e9)], ids=str)
def test_whole_row(backend, policy):
    case = make_case("normal_3", 3, 300, seed=8)
    masked = evaluate(*case, sparsity=policy, backend=backend)
    dense = evaluate(*case, backend=backend)
    check_identity(masked.terms.sced, dense.terms.sced, "float32_terms")
    check_identity(masked.gradients["sced"], dense.gradients["sced"], "float32_gradient")
    assert _num_kept(*case, policy, backend).tolist() == [300] * 3


def test_one_token(backend):
    """With k = 1 SCED is that of the arg-max; two columns at the maximum share it."""
    logits = torch.tensor([[0.0, 3.0, 1.0, -2.0], [0.0, 3.0, 3.0, -2.0]])
    p = logits.double().softmax(-1).amax(-1)
    expected = (p * (4 * p).log()) ** 2 * (1 - p)
    check_term("sced", fused_sced(logits, sparsity=TopK(1), reduction="none", backend=backend), expected)
    assert _mask(logits, TopK(1), backend).tolist() == [[1.0, 3.0, 1.0], [1.0, 3.0, 0.5]]


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 999, 1000])
def test_heavy_ties(backend, k):
    logits = (torch.randperm(3000, generator=torch.Generator().manual_seed(1)) % 64).view(3, 1000).bfloat16() / 8
    assert torch.equal(_mask(logits, TopK(k), backend), _exact_mask(logits, k))
    sced = fused_sced(logits, sparsity=TopK(k), reduction="none", backend=backend)
    exact = logits.double()
    check_term("sced", sced, fused_sced(exact, sparsity=TopK(k), reduction="none", backend="reference"))


def test_equal_row(backend):
    """Every column has the weight k / V, bitwise identical in a hundred runs."""
    logits = torch.full((1, 200), 1.5)
    assert torch.equal(_mask(logits, TopK(10), backend), torch.tensor([[10.0, 1.5, 0.05]]))
    first = _statistics(logits, TopK(10), backend)
    for _ in range(3 if backend in backends.DEVICE_CHECKED else 100):
        assert all(torch.equal(a, b) for a, b in zip(_statistics(logits, TopK(10), backend), first, strict=True))


def test_fewer_finite_logits(backend):
    logits = torch.full((2, 300), -math.inf)
    logits[0, [5, 17, 250]] = torch.tensor([1.0, 2.0, 3.0])
    logits[1, :40] = torch.linspace(0, 1, 40)
    labels = torch.tensor([5, 0])
    num_kept = _num_kept(logits, labels, TopK(20), backend)
    assert num_kept.tolist() == [3.0, 20.0]
    check_evaluation(
        evaluate(logits, labels, sparsity=TopK(20), backend=backend), oracle_given(num_kept, logits, labels)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_softmax(backend, value):
    """Such a row is NaN by itself, and no index is computed from its entropy."""
    case = make_case("normal_1", 3, 300, seed=9)
    logits = case.logits.clone()
    logits[1] = value if value == -math.inf else logits[1]
    logits[1, 7] = value
    before, after = (
        evaluate(z, case.labels, ("sced",), sparsity=EntropyTopK(), backend=backend) for z in (case.logits, logits)
    )
    assert after.terms.sced[1].isnan()
    assert after.gradients["sced"][1].isnan().all()
    assert _num_kept(logits, case.labels, EntropyTopK(), backend)[1].isnan()
    for row in (0, 2):
        assert torch.equal(after.terms.sced[row], before.terms.sced[row])
        assert torch.equal(after.gradients["sced"][row], before.gradients["sced"][row])


def _patterns(name, columns):
    index = torch.arange(columns, dtype=torch.int32)
    generator = torch.Generator().manual_seed(columns)
    random = torch.randn(columns, generator=generator)
    return {
        "one_and_on": lambda: (0x3F800000 + index).view(torch.float32),
        "small_and_on": lambda: (0x3805ED27 + index).view(torch.float32),
        "ascending": lambda: torch.linspace(-5, 5, columns),
        "both_zeros": lambda: torch.where(random < 0.4, 0.0, -0.0),
        "subnormal": lambda: torch.randint(-50, 50, (columns,), generator=generator).float() * 1e-43,
        "all_exponents": lambda: random.sign() * torch.exp(40 * random).clamp(1e-44, 80),
        # A sample at even distances represents such a row badly.
        "periodic": lambda: torch.where(index % 16 < 8, random, -20.0 + random),
        "clump": lambda: torch.where(index < columns // 50, random, -20 + 0.01 * random),
        "sampled_is_large": lambda: torch.where(_is_sampled(index), random, -20 + random),
        "sampled_is_small": lambda: torch.where(_is_sampled(index), -20 + random, random),
    }[name]()


def _is_sampled(index):
    """Whether a column is near one of the 128 evenly spaced ones from which every backend brackets the threshold."""
    distance = index.double() * 128 / len(index) % 1 * len(index) / 128
    return torch.minimum(distance, len(index) / 128 - distance) < 24


PATTERNS = (
    *("one_and_on", "small_and_on", "ascending", "both_zeros", "subnormal", "all_exponents"),
    *("periodic", "clump", "sampled_is_large", "sampled_is_small"),
)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("columns", [1000, 4100, 70000])
def test_bit_patterns(backend, name, columns):
    """The mask equals that of a sort: -0.0 equals 0.0, and subnormals are distinguished."""
    logits = _patterns(name, columns)[None]
    small = columns > 1000 and backend in backends.DEVICE_CHECKED
    for k in (9,) if small else sorted({1, 9, 300, columns // 2, columns - 1, columns}):
        assert torch.equal(_mask(logits, TopK(k), backend), _exact_mask(logits, k)), k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bit_patterns_of_other_dtypes(backend, dtype):
    names = PATTERNS[2:4] if triton_interpreter.ACTIVE else PATTERNS  # whose bfloat16 has no subnormals
    logits = torch.stack([_patterns(name, 1000) for name in names]).to(dtype)
    for k in (1, 77, 500, 1000):
        assert torch.equal(_mask(logits, TopK(k), backend), _exact_mask(logits, k)), k


def test_entropy_to_num_kept():
    """The number of tokens follows from the entropy by one rule everywhere: ceil, both clips, NaN and infinity."""
    entropies = torch.tensor([0.0, 1e-12, 1.0, math.log(7), 5.0, 700.0, math.inf, math.nan, -1.0], dtype=torch.float64)
    budget = sparsity.TopKSpec(0.5, 2, 40)
    expected = [2, 2, 2, 4, 40, 40, 40, 2, 2]
    assert sparsity.row_num_kept(entropies[:, None], budget).flatten().tolist() == expected
    compiled = pytest.importorskip("caref_kernels._C").row_math
    assert [compiled.row_num_kept(entropy, *budget) for entropy in entropies.tolist()] == expected


def test_integer_budgets(backend):
    """With n columns at the maximum and no others exp(H) is an integer up to rounding, and k is n."""
    for n in (1, 2, 8, 1000):
        logits = torch.full((1, 1024), -200.0)
        logits[0, :n] = 2.0
        num_kept = _num_kept(logits, torch.tensor([0]), EntropyTopK(), backend)
        assert n <= num_kept <= n + 1


def test_gradients():
    for seed, policy in enumerate((TopK(4), EntropyTopK(scale=0.3), TopK(20))):
        for alpha, beta in ((2.0, 1.0), (1.5, 0.5), (3.0, 0.0)):
            leaf = make_case("normal_1", 2, 20, torch.float64, seed=seed).logits.requires_grad_()

            def loss(logits, policy=policy, alpha=alpha, beta=beta):
                return fused_sced(
                    logits, sparsity=policy, alpha=alpha, beta=beta, reduction="none", backend="reference"
                )

            assert torch.autograd.gradcheck(loss, leaf, **GRADCHECK)
            assert torch.autograd.gradgradcheck(loss, leaf, **GRADCHECK)


def test_columns_outside_the_mask(backend):
    """Columns outside the mask have the gradient -p G of the softmax; every row sums to zero."""
    case = make_case("normal_1", 2, 500, seed=11)
    gradient = evaluate(*case, ("sced",), sparsity=TopK(20), backend=backend).gradients["sced"]
    threshold = _mask(case.logits, TopK(20), backend)[:, 1:2]
    p = case.logits.softmax(-1)
    for row in range(2):
        outside = case.logits[row] < threshold[row]
        ratio = (gradient[row] / p[row])[outside]
        assert ratio[0] < 0
        check_identity(ratio, ratio[:1].expand_as(ratio), "float32_gradient")
    check_row_sums(gradient)


def test_order_of_columns(backend):
    logits = (make_case("normal_3", 2, 1000, torch.bfloat16, seed=12).logits).float()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1])
    moved = torch.argsort(order)[labels]
    for policy in (TopK(30), EntropyTopK()):
        one = evaluate(logits, labels, ("sced",), sparsity=policy, backend=backend)
        other = evaluate(logits[:, order], moved, ("sced",), sparsity=policy, backend=backend)
        assert torch.equal(_mask(logits, TopK(30), backend), _mask(logits[:, order], TopK(30), backend))
        check_identity(other.terms.sced, one.terms.sced, "float32_terms")
        check_identity(other.gradients["sced"], one.gradients["sced"][:, order], "float32_gradient")


def test_ragged_budgets(backend):
    """Rows with k from 1 to V in one batch are bitwise identical to calls of one row."""
    scale = torch.tensor([0.0, 1e-3, 0.3, 1.0, 3.0, 30.0])[:, None]
    case = make_case("normal_1", 6, 400, seed=13)
    logits = case.logits * scale
    together = evaluate(logits, case.labels, ("loss",), sparsity=EntropyTopK(), backend=backend)
    num_kept = _num_kept(logits, case.labels, EntropyTopK(), backend)
    assert num_kept.max() >= 399
    assert num_kept.min() <= 3
    for row in range(6):
        alone = evaluate(
            logits[row : row + 1], case.labels[row : row + 1], ("loss",), sparsity=EntropyTopK(), backend=backend
        )
        assert torch.equal(alone.terms.sced[0], together.terms.sced[row])
        assert torch.equal(alone.gradients["loss"][0], together.gradients["loss"][row])


def test_calls_of_other_sizes_between(backend):
    """A selection does not depend on what a call of another size left in its working memory."""
    case = make_case("lm_like", 2, 900, seed=14)
    first = _statistics(case.logits, TopK(40), backend)
    for columns in (5, 1300, 33):
        _statistics(torch.full((3, columns), 9.0), EntropyTopK(), backend)
        again = _statistics(case.logits, TopK(40), backend)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_widest_rows(backend):
    """The mask is exact for k = 4,096 of 262,144 in bfloat16, with thousands of columns at the threshold."""
    logits = make_case("normal_3", 2, 262144, torch.bfloat16, seed=15).logits
    logits[1] = logits[1].float().round().bfloat16()
    assert torch.equal(_mask(logits, TopK(4096), backend), _exact_mask(logits, 4096))
    assert (logits[1] == _mask(logits, TopK(4096), backend)[1, 1]).sum() > 1024


@pytest.mark.parametrize("policy", [TopK(7), EntropyTopK()], ids=str)
def test_inplace_and_mask_of_rows(backend, policy):
    """``fused_sced`` in place with a valid mask has the same gradient, and 0 in the rows left out."""
    case = make_case("lm_like", 4, 300, seed=16)
    valid = torch.tensor([True, False, True, True])
    gradients = []
    for inplace in (False, True):
        leaf = case.logits.clone().requires_grad_()
        loss = fused_sced(leaf * 1.0, valid=valid, sparsity=policy, inplace_backward=inplace, backend=backend)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)
    assert torch.count_nonzero(gradients[0][1]) == 0
    assert torch.count_nonzero(gradients[0][0]) > 0


def test_reductions_of_the_num_kept(backend):
    case = make_case("lm_like", 5, 300, seed=17, ignored=2)
    rows, mean, total = (
        caref_loss(*case, sparsity=EntropyTopK(), reduction=reduction, return_terms=True, backend=backend).num_kept
        for reduction in ("none", "mean", "sum")
    )
    assert rows.shape == (5,)
    assert total == rows.sum()
    assert mean == total / 3
    assert caref_loss(*case, return_terms=True, backend=backend).num_kept is None
    # Without the SCED term there is nothing to mask.
    loss = caref_loss(*case, sparsity=TopK(1), lambda_sced=0.0, backend=backend)
    assert torch.equal(loss, caref_loss(*case, lambda_sced=0.0, backend=backend))


def test_small_mask_is_a_part(backend):
    """SCED over k tokens does not fall with k and lies between 0 and SCED over all of them."""
    case = make_case("lm_like", 3, 300, seed=18)
    values = [
        fused_sced(case.logits, sparsity=TopK(k), reduction="none", backend=backend) for k in (1, 2, 10, 100, 300)
    ]
    values.append(fused_sced(case.logits, reduction="none", backend=backend))
    assert (values[0] > 0).all()
    for smaller, larger in zip(values, values[1:], strict=False):
        check_at_most(smaller, larger, "float32_terms")


def test_backend_that_cannot_select_says_so(monkeypatch):
    """A backend that cannot select is refused by name, and "auto" takes the next one."""
    reference = backends.get("reference")

    class Dense(type(reference)):
        name = "dense"

        def unsupported(self, logits, spec=None):
            return "it has no selection" if spec is not None and spec.is_masked else None

    monkeypatch.setattr(backends, "_BACKENDS", {"dense": Dense(), "reference": reference})
    monkeypatch.setattr(backends, "ORDER", ("dense", "reference"))
    monkeypatch.setattr(backends, "_warn_slow", lambda device: None)
    case = make_case("normal_1", 2, 30)
    with pytest.raises(
        NotImplementedError, match=r"'dense' cannot run: it has no selection; available here: reference"
    ):
        caref_loss(*case, sparsity=TopK(3), backend="dense")
    assert caref_loss(*case, sparsity=TopK(3), reduction="none", return_terms=True).num_kept.tolist() == [3, 3]
    spec = CarefConfig(sparsity=TopK(3)).row_spec(30)
    assert backends.select("auto", case.logits, spec) == "reference"
    assert backends.select("auto", case.logits, CarefConfig().row_spec(30)) == "dense"


def test_dense_loss_and_composition_agree_with_the_mask_of_all():
    """For k = V the dense loss and the plain composition in float64 give the same value."""
    case = make_case("normal_3", 3, 200, torch.float64, seed=19)
    actual = evaluate(*case, ("sced",), sparsity=TopK(200), backend="reference")
    check_term("sced", actual.terms.sced, eager_terms(*case).sced)
    check_gradient(actual.gradients["sced"], oracle(*case, ("sced",)).gradients["sced"])
