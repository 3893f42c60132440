"""Properties that hold for every row, on rows that hypothesis chooses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caref_kernels import CarefConfig, EntropyTopK, TopK, backends, caref_loss, fused_sced, objective, ops, sparsity
from caref_kernels.testing import (
    check_at_most,
    check_identity,
    check_row_sums,
    check_term,
    evaluate,
    oracle,
)

NAMES = [name for name in backends.ORDER if backends.get(name).unsupported(torch.empty(1, 2)) is None]
ALPHAS = (1.0, 1.5, 2.0, 3.0, 4.0)
BETAS = (0.0, 0.1, 0.5, 1.0, 2.0)
every_row = settings(max_examples=200, deadline=None, derandomize=True, database=None)
few_rows = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def _rows(draw, rows, columns, kind, generator):
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if kind == "normal":
        return noise * 10 ** draw(st.floats(-6, 1.5))
    if kind == "one-hot":
        top = torch.randint(columns, (rows, 1), generator=generator)
        return noise.scatter(-1, top, draw(st.floats(0, 200)))
    if kind == "ties":
        return noise.mul(2).round()
    if kind == "-inf":
        masked = torch.rand(rows, columns, generator=generator) < 0.3
        masked[:, draw(st.integers(0, columns - 1))] = False
        return torch.where(masked, -math.inf, noise * 3)
    if kind == "blocks":
        levels = torch.randn(rows, 4, generator=generator, dtype=torch.float64) * 3
        return levels.gather(-1, torch.randint(4, (rows, columns), generator=generator))
    bits = torch.randint(0x3F000000, 0x41800000, (rows, columns), generator=generator, dtype=torch.int32)
    return bits.view(torch.float32).double() * noise.sign()


@st.composite
def row_sets(
    draw, kinds=("normal", "one-hot", "ties", "-inf", "blocks", "bits"), dtypes=(torch.float64, torch.float32)
):
    """(logits, labels, backend): 1 to 6 rows of 1 to 300 columns, some of them ignored."""
    rows, columns = draw(st.integers(1, 6)), draw(st.one_of(st.integers(1, 12), st.integers(13, 300)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = _rows(draw, rows, columns, draw(st.sampled_from(kinds)), generator).to(draw(st.sampled_from(dtypes)))
    labels = logits.argmax(-1)  # a label on a -inf column would make the loss infinite
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    return logits, labels, draw(st.sampled_from(NAMES))


exponents = st.tuples(st.sampled_from(ALPHAS), st.sampled_from(BETAS))
FINITE = ("normal", "one-hot", "ties", "blocks", "bits")
WIDE = (torch.float64,)


def _identity(logits):
    return "float64" if logits.dtype == torch.float64 else "float32"


def _terms(logits, labels, backend, **options):
    return evaluate(logits, labels, (), backend=backend, **options).terms


@every_row
@given(row_sets(), exponents)
def test_oracle_and_finiteness(drawn, powers):
    """Loss and gradient are finite and the terms near the oracle; SCED of a one-hot row is its limit (DESIGN.md)."""
    logits, labels, backend = drawn
    actual = evaluate(logits, labels, alpha=powers[0], beta=powers[1], backend=backend)
    for value in (*actual.terms, *actual.gradients.values()):
        assert torch.isfinite(value).all()
    exact = oracle(logits, labels, alpha=powers[0], beta=powers[1])
    for name in ("ce", "kl", "entropy"):
        check_term(name, getattr(actual.terms, name), getattr(exact.terms, name), least_unit=1e-3)
    residual = objective.shift_rows(logits.double()).residual.squeeze(-1) / objective.ONE_HOT_RESIDUAL[logits.dtype]
    regular, one_hot = residual > 1.01, (residual < 0.99) & (labels != -100)
    check_term("sced", actual.terms.sced[regular], exact.terms.sced[regular], least_unit=1e-2)
    limit = math.log(logits.size(-1)) ** powers[0] if powers[1] == 0 else 0.0
    check_term("sced", actual.terms.sced[one_hot], exact.terms.sced[one_hot].new_tensor(limit), least_unit=1e-3)


@few_rows
@given(row_sets(kinds=("normal", "blocks")), st.integers(-12, 12))
def test_shift_invariance(drawn, power):
    """On a grid of 2^-8 the shift is exact, and the results are bitwise identical."""
    logits, labels, backend = drawn
    grid = (logits * 256).round() / 256
    shift = math.copysign(2.0 ** abs(power), power)
    before, after = (evaluate(z, labels, backend=backend) for z in (grid, grid + shift))
    if torch.equal((grid + shift) - shift, grid):
        for name, term in after.terms._asdict().items():
            assert torch.equal(term, getattr(before.terms, name)), name
        assert torch.equal(after.gradients["loss"], before.gradients["loss"])


@every_row
@given(row_sets(), st.randoms(use_true_random=False), exponents)
def test_permutation_of_the_columns(drawn, random, powers):
    logits, labels, backend = drawn
    order = torch.tensor(random.sample(range(logits.size(-1)), logits.size(-1)))
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    moved_labels = torch.where(labels == -100, labels, place[labels.clamp_min(0)])
    options = {"alpha": powers[0], "beta": powers[1], "backend": backend}
    plain = evaluate(logits, labels, ("loss",), **options)
    moved = evaluate(logits[:, order], moved_labels, ("loss",), **options)
    slack = "float64" if logits.dtype == torch.float64 else "float32_terms"
    for name in ("loss", "ce", "entropy"):
        check_identity(getattr(moved.terms, name), getattr(plain.terms, name), slack, name)
    unmoved = torch.empty_like(plain.gradients["loss"])
    unmoved[:, order] = moved.gradients["loss"]
    difference = (unmoved - plain.gradients["loss"]).norm(dim=-1)
    check_at_most(difference, 0.0, "float64" if logits.dtype == torch.float64 else "float32_gradient")


@every_row
@given(row_sets(), exponents)
def test_gradients_sum_to_zero(drawn, powers):
    logits, labels, backend = drawn
    gradients = evaluate(logits, labels, alpha=powers[0], beta=powers[1], backend=backend).gradients
    for part, gradient in gradients.items():
        # The SCED gradient of rows with few different values is a small difference of slopes near 1.
        check_row_sums(gradient, part, least_unit=0.1)


@few_rows
@given(row_sets(), st.data())
def test_rows_add_up(drawn, data):
    """Ignoring a row equals deleting it; parts add up; a doubled batch has twice the sum and the same mean."""
    logits, labels, backend = drawn
    whole = evaluate(logits, labels, backend=backend)
    keep = labels != -100
    if keep.any():
        kept = evaluate(logits[keep], labels[keep], backend=backend)
        assert torch.equal(kept.terms.loss, whole.terms.loss[keep])
        for part, gradient in kept.gradients.items():
            assert torch.equal(gradient, whole.gradients[part][keep])
    cut = data.draw(st.integers(0, len(labels)))
    total = caref_loss(logits, labels, reduction="sum", backend=backend)
    parts = [caref_loss(logits[p], labels[p], reduction="sum", backend=backend) for p in (slice(cut), slice(cut, None))]
    check_identity(parts[0].double() + parts[1].double(), total, _identity(logits))
    twice = (torch.cat((logits, logits)), torch.cat((labels, labels)))
    check_identity(caref_loss(*twice, reduction="sum", backend=backend), total * 2, _identity(logits))
    if keep.any():
        check_identity(
            caref_loss(*twice, backend=backend), caref_loss(logits, labels, backend=backend), _identity(logits)
        )


@every_row
@given(row_sets())
def test_kl_and_entropy(drawn):
    """KL = log V - H, 0 <= KL <= log V, H <= log of the number of columns that are not -inf."""
    logits, labels, backend = drawn
    terms = _terms(logits, labels, backend)
    keep = labels != -100
    width = math.log(logits.size(-1))
    kl, entropy = terms.kl[keep], terms.entropy[keep]
    slack = _identity(logits)
    check_at_most((kl + entropy - width).abs(), 0.0, slack)
    check_at_most(-kl, 0.0, slack)
    check_at_most(kl, width, slack)
    check_at_most(-entropy, 0.0, slack)
    check_at_most(entropy, torch.isfinite(logits[keep]).sum(-1).double().log(), slack)


@every_row
@given(row_sets(dtypes=WIDE), st.sampled_from(ALPHAS))
def test_bounds_of_sced(drawn, alpha):
    """KL <= SCED(1, 0) <= KL + 2/e; 0 <= SCED, falling in beta, at most (log V + 2/e)^alpha."""
    logits, labels, backend = drawn
    plain = _terms(logits, labels, backend, alpha=1.0, beta=0.0)
    check_at_most(plain.kl, plain.sced, "float64")
    check_at_most(plain.sced, plain.kl + 2 / math.e, "float64")
    ceiling = (math.log(logits.size(-1)) + 2 / math.e) ** alpha
    previous = torch.full_like(plain.sced, ceiling)
    for beta in BETAS:
        sced = _terms(logits, labels, backend, alpha=alpha, beta=beta).sced
        check_at_most(-sced, 0.0, "float64")
        check_at_most(sced, previous, "float64", f"beta {beta}")
        previous = sced


@few_rows
@given(st.integers(2, 300), st.sampled_from(ALPHAS), st.sampled_from(NAMES))
def test_one_hot_limit(columns, alpha, backend):
    """With a growing gap SCED falls to 0 (beta > 0) or rises to (log V)^alpha (beta = 0); a uniform row has 0."""
    gaps = torch.linspace(math.log(columns) + 6, 120, 40, dtype=torch.float64)
    logits = torch.zeros(40, columns, dtype=torch.float64)
    logits[:, columns // 2] = gaps
    labels = torch.zeros(40, dtype=torch.long)
    falling = _terms(logits, labels, backend, alpha=alpha, beta=1.0).sced
    check_at_most(falling[1:], falling[:-1], "float64")
    check_at_most(falling[-1], 0.0, "float64")
    limit = _terms(logits, labels, backend, alpha=alpha, beta=0.0).sced[-1]
    check_identity(limit, torch.tensor(math.log(columns) ** alpha, dtype=torch.float64), "float64")
    uniform = _terms(torch.zeros(1, columns), labels[:1], backend, alpha=alpha, beta=1.0)
    assert float(uniform.sced) == 0


@pytest.mark.parametrize(
    ("columns", "largest", "steepest"), [(32128, 23.45, 7.98), (128256, 30.63, 10.30), (262144, 34.71, 11.61)]
)
@pytest.mark.parametrize("name", NAMES)
def test_largest_value_and_slope(name, columns, largest, steepest):
    """SCED and its slope stay below known maxima over two-level rows, so that float16 cannot overflow.

    The value peaks where two columns share nearly everything, the slope where one column holds 0.41.
    """
    values, slopes = [], []
    for tops, mass in ((1, torch.linspace(0.36, 0.72, 10)), (2, torch.tensor([0.9, 0.99, 0.999, 0.99999]))):
        mass = mass.double()
        logits = torch.zeros(len(mass), columns)
        logits[:, 7 : 7 + tops] = (torch.log(mass / (1 - mass)) + math.log((columns - tops) / tops)).float()[:, None]
        actual = evaluate(logits, torch.zeros(len(mass), dtype=torch.long), ("sced",), backend=name)
        values.append(float(actual.terms.sced.max()))
        slopes.append(float(actual.gradients["sced"].abs().max()))
    assert 0.99 * largest < max(values) < 1.01 * largest
    assert 0.99 * steepest < max(slopes) < 1.01 * steepest


@few_rows
@given(row_sets(dtypes=(torch.float32, torch.float64, torch.bfloat16)), st.integers(-8, 8))
def test_scaled_backward(drawn, power):
    """A power of two passes through the gradient exactly."""
    logits, labels, backend = drawn
    leaf = logits.clone().requires_grad_()
    loss = caref_loss(leaf, labels, reduction="sum", backend=backend)
    plain = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    scaled = torch.autograd.grad(loss * 2.0**power, leaf)[0]
    normal = plain.abs() > torch.finfo(plain.dtype).tiny * 2**20
    assert torch.equal(scaled[normal], (plain * 2.0**power)[normal])


@few_rows
@given(row_sets(), st.floats(0, 10), st.floats(0, 10))
def test_linear_in_the_weights(drawn, w_sced, w_kl):
    logits, labels, backend = drawn
    options = {"lambda_sced": w_sced, "lambda_kl": w_kl, "reduction": "none", "backend": backend}
    terms = _terms(logits, labels, backend)
    expected = terms.ce.double() + w_sced * terms.sced.double() + w_kl * terms.kl.double()
    check_identity(caref_loss(logits, labels, **options), expected, _identity(logits))


@few_rows
@given(row_sets(), st.integers(1, 400), exponents)
def test_masked_columns_change_nothing(drawn, extra, powers):
    logits, labels, backend = drawn
    columns = logits.size(-1)
    padded = torch.cat((logits, torch.full((len(logits), extra), -math.inf, dtype=logits.dtype)), -1)
    options = {"alpha": powers[0], "beta": powers[1], "vocab_size": columns, "backend": backend}
    plain = evaluate(logits, labels, **options)
    wide = evaluate(padded, labels, **options)
    slack = "float64" if logits.dtype == torch.float64 else "float32_terms"
    for name in ("ce", "entropy", "loss"):
        check_identity(getattr(wide.terms, name), getattr(plain.terms, name), slack, name)
    for part, gradient in wide.gradients.items():
        assert torch.count_nonzero(gradient[:, columns:]) == 0
        check_at_most((gradient[:, :columns] - plain.gradients[part]).abs().max(), 0.0, slack, part)


@few_rows
@given(row_sets(), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]), st.data())
def test_rows_are_independent(drawn, value, data):
    logits, labels, backend = drawn
    row = data.draw(st.integers(0, len(labels) - 1))
    changed = logits.clone()
    changed[row] = value
    others = torch.arange(len(labels)) != row
    before, after = (evaluate(z, labels, backend=backend) for z in (logits, changed))
    for name, term in after.terms._asdict().items():
        assert torch.equal(term[others], getattr(before.terms, name)[others]), name
    for part, gradient in after.gradients.items():
        assert torch.equal(gradient[others], before.gradients[part][others]), part


@few_rows
@given(
    row_sets(dtypes=(torch.float32, torch.bfloat16, torch.float64)),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(0, 7),
)
def test_layout_independence(drawn, step, gap, offset):
    logits, labels, backend = drawn
    rows, columns = logits.shape
    stride = columns * step + gap
    storage = torch.full((offset + rows * stride + step,), math.nan, dtype=logits.dtype)
    view = storage.as_strided((rows, columns), (stride, step), offset).copy_(logits)
    dense, strided = (evaluate(z, labels, backend=backend) for z in (logits, view))
    for name, term in strided.terms._asdict().items():
        assert torch.equal(term, getattr(dense.terms, name)), name
    for part, gradient in strided.gradients.items():
        assert torch.equal(gradient, dense.gradients[part]), part


@few_rows
@given(row_sets(kinds=("normal", "one-hot"), dtypes=WIDE), exponents, st.integers(0, 2**31))
def test_directional_derivative(drawn, powers, seed):
    logits, labels, backend = drawn
    alpha, beta = powers
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {
        "alpha": max(alpha, 2.0),
        "beta": beta,
        "backend": backend,
    }  # below 2 the second derivative is infinite at p = U
    step = 1e-5 * (1 + logits.abs().amax()).clamp_max(2) / math.sqrt(logits.size(-1))
    plus, minus = (_terms(logits + sign * step * direction, labels, **options) for sign in (1, -1))
    gradients = evaluate(logits, labels, **options).gradients
    for part in ("ce", "sced", "kl", "loss"):
        difference = (getattr(plus, part) - getattr(minus, part)) / (2 * step)
        slope = (gradients[part] * direction).sum(-1)
        check_at_most((difference - slope).abs(), 0.0, "directional_derivative", part)


@few_rows
@given(row_sets(kinds=FINITE, dtypes=(torch.bfloat16, torch.float16)))
def test_sixteen_bits_are_the_upcast_values(drawn):
    logits, labels, backend = drawn
    logits = logits.clamp(-6e4, 6e4)
    narrow = evaluate(logits, labels, backend=backend)
    wide = evaluate(logits.float(), labels, backend=backend)
    for name, term in narrow.terms._asdict().items():
        assert torch.equal(term, getattr(wide.terms, name)), name
    for part, gradient in narrow.gradients.items():
        assert torch.equal(gradient, wide.gradients[part].to(logits.dtype)), part


@every_row
@given(row_sets(), st.integers(1, 310), st.integers(1, 310), st.floats(0.01, 3))
def test_masks(drawn, k, other, scale):
    """The mask is that of a sort; SCED does not fall with k, and with all columns it equals the dense term."""
    logits, labels, backend = drawn
    valid = labels != -100
    columns, smaller, larger = logits.size(-1), min(k, other), max(k, other)
    for policy in (TopK(k), EntropyTopK(scale=scale)):
        spec = CarefConfig(sparsity=policy, return_terms=True).row_spec(columns)
        _, stats = ops.forward(logits, valid, spec, backend)
        num_kept, *mask = stats[valid][:, len(objective.STATISTICS) :].unbind(-1)
        exact = sparsity.top_k_mask(logits[valid], num_kept.long()[:, None])
        assert torch.equal(torch.stack([num_kept, *mask], -1), exact.statistics())
        assert torch.equal(num_kept, num_kept.clamp(1, columns).ceil())
        check_identity(exact.weight.double().sum(-1), num_kept, "float32")
    values = [
        fused_sced(logits, valid=valid, sparsity=policy, reduction="none", backend=backend)
        for policy in (TopK(smaller), TopK(larger), TopK(columns), None)
    ]
    for smaller_value, larger_value in zip(values[:2], values[1:3], strict=True):
        check_at_most(smaller_value, larger_value, "float32_terms")
    check_at_most((values[2] - values[3]).abs(), 0.0, "float32_terms")
