"""The Triton row formulas against their counterparts in objective.py, on a grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton_interpreter

from caref_kernels import config, objective
from caref_kernels.backends.triton import tiling
from caref_kernels.testing import check_identity

if not triton_interpreter.ACTIVE and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from caref_kernels.backends.triton import row_math  # noqa: E402

DEVICE = "cpu" if triton_interpreter.ACTIVE else "cuda"
EXPONENTS = list(itertools.product((1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 16.0), (0.0, 0.1, 0.5, 1.0, 2.0, 16.0)))
DTYPES = [torch.float32, torch.float64]


@triton.jit
def _kernel(
    p_ptr, ratio_ptr, q_ptr, out_ptr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, N: tl.constexpr
):
    index = tl.arange(0, N)
    p = tl.load(p_ptr + index)
    ratio = tl.load(ratio_ptr + index)
    q = tl.load(q_ptr + index)
    if FUNCTION == "sced_density":
        value = row_math.sced_density(p, ratio, q, ALPHA, BETA)
    elif FUNCTION == "sced_slope":
        value = row_math.sced_slope(p, ratio, q, ALPHA, BETA)
    elif FUNCTION == "even_slope":
        value = row_math.even_slope(p, ratio, 0.75, ALPHA, BETA)
    elif FUNCTION == "power":
        value = row_math.power(p, ALPHA)
    elif FUNCTION == "exponential":
        value = row_math.exponential(row_math.clamp_shift(ratio))
    elif FUNCTION == "log1p":
        value = row_math.log1p(p)
    elif FUNCTION == "log_ratio_offset":
        value = row_math.log_ratio_offset(p, 32128.0)
    elif FUNCTION == "is_one_hot":
        value = row_math.is_one_hot(p).to(p.dtype)
    tl.store(out_ptr + index, value)


def _run(function, p, ratio, q, alpha=1.0, beta=0.0):
    out = torch.empty_like(p)
    arguments = [tensor.to(DEVICE) for tensor in (p, ratio, q, out)]
    _kernel[(1,)](*arguments, function, alpha, beta, p.numel())
    return arguments[-1].cpu()


def _grid(dtype):
    """p in (0, 1/2], L of both signs and 0, and q = 1 - p: 256 points."""
    p = torch.cat((torch.logspace(-12, math.log10(0.5), 15, dtype=torch.float64), torch.tensor([0.0]).double()))
    ratio = torch.cat((torch.linspace(-30, 12, 15, dtype=torch.float64), torch.tensor([0.0]).double()))
    p, ratio = (values.flatten().to(dtype) for values in torch.meshgrid(p, ratio, indexing="ij"))
    return p, ratio, 1 - p


def _identity(dtype):
    return "float64" if dtype == torch.float64 else "float32_terms"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_density_and_slope(alpha, beta, dtype):
    p, ratio, q = _grid(dtype)
    for function in ("sced_density", "sced_slope"):
        expected = getattr(objective, function)(p.double(), ratio.double(), q.double(), alpha, beta)
        actual = _run(function, p, ratio, q, alpha, beta)
        # Compare relative errors point by point, so that large values do not hide errors of small ones.
        scale = expected.abs().clamp_min(torch.finfo(dtype).tiny * 1e10)
        check_identity(actual.double() / scale, expected / scale, _identity(dtype), f"{function} {alpha} {beta}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), config.ONE_PASS_EXPONENTS)
def test_slope_of_even_exponents(alpha, beta, dtype):
    p, ratio, q = _grid(dtype)
    expected = 0.75 * objective.sced_slope(p.double(), ratio.double(), q.double(), alpha, beta) / q.double()
    check_identity(_run("even_slope", p, ratio, q, alpha, beta), expected, _identity(dtype))


@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0, 1.25, 2.0, 3.0, 7.0, 15.0, 16.0])
def test_power(exponent):
    p, ratio, q = _grid(torch.float64)
    expected = p**exponent
    scale = expected.clamp_min(1e-290)
    check_identity(_run("power", p, ratio, q, exponent) / scale, expected / scale, "float64")


def test_logarithms_and_exponential():
    p = torch.cat((torch.tensor([0.0]).double(), torch.logspace(-300, 5, 63, dtype=torch.float64)))
    ratio = torch.linspace(-50, 0, 64, dtype=torch.float64)
    ratio[0], ratio[1] = -math.inf, math.nan
    scale = torch.log1p(p).clamp_min(1e-300)
    check_identity(_run("log1p", p, ratio, p) / scale, torch.log1p(p) / scale, "float64")
    check_identity(_run("log_ratio_offset", p, ratio, p), objective.log_ratio_offset(p, 32128), "float64")
    exponential = _run("exponential", p, ratio, p)
    assert exponential[0] == 0
    assert torch.isnan(exponential[1])
    check_identity(exponential[2:] / ratio[2:].exp(), torch.ones(62), "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot(dtype):
    limit = objective.ONE_HOT_RESIDUAL[dtype]
    residual = torch.tensor([0.0, limit / 2, limit * 2, 1.0], dtype=dtype)
    assert _run("is_one_hot", residual, residual, residual).tolist() == objective.one_hot_rows(residual).tolist()


@triton.jit
def _moments_kernel(y_ptr, out_ptr, delta, c, d, VARIANT: tl.constexpr, N: tl.constexpr):
    index = tl.arange(0, N)[:, None]
    y = tl.load(y_ptr + index)
    step = (index * 0).to(tl.float64) + delta
    sums = row_math.add_columns(row_math.zero_sums(y * 0, VARIANT), y, VARIANT)
    sums = row_math.shift_sums(row_math.add_top(sums, 1.0, VARIANT), tl.sum(step) / N, VARIANT)
    totals = ()
    for part in tl.static_range(len(sums)):
        totals = totals + (tl.sum(sums[part]),)
    about = totals[0] * 0 + c
    below = totals[0] * 0 + d
    tl.store(out_ptr, totals[0])
    tl.store(out_ptr + 1, totals[1])
    tl.store(out_ptr + 2, row_math.sced_from_moments(totals, about, below, VARIANT))
    tl.store(out_ptr + 3, row_math.slope_sum_from_moments(totals, about, below, VARIANT))


@pytest.mark.parametrize(("alpha", "beta"), config.ONE_PASS_EXPONENTS)
def test_moments(alpha, beta):
    """Sums of 64 columns and of 64 former maxima, moved to a maximum that is larger by 1.5."""
    y = torch.linspace(-9, 0, 64, dtype=torch.float64)
    shifted = torch.cat((y, torch.zeros(64))) - 1.5
    e, d, c = shifted.exp(), torch.tensor(40.0).double(), -4.25
    p, ratio = e / d, shifted - c
    slope = objective.sced_slope(p, ratio, 1 - p, alpha, beta) / (1 - p)
    expected = [
        e.sum(),
        (e * shifted).sum(),
        objective.sced_density(p, ratio, 1 - p, alpha, beta).sum(),
        (p * slope).sum(),
    ]
    out = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    _moments_kernel[(1,)](y.to(DEVICE), out, -1.5, c, 40.0, tiling.variant(alpha, beta, True, "none"), 64)
    check_identity(out.cpu(), torch.stack(expected), "float64")


@triton.jit
def _rounded_kernel(x_ptr, out_ptr, EMULATED: tl.constexpr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out_ptr + index, row_math.rounded(tl.load(x_ptr + index), out_ptr.dtype.element_ty, EMULATED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_nearest_even(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    ties = (torch.arange(4096, dtype=torch.int32) << 16) + 0x8000
    values = torch.cat((bits, ties)).view(torch.float32)
    values[:4] = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38])
    out = torch.empty(8192, dtype=dtype, device=DEVICE)
    _rounded_kernel[(1,)](values.to(DEVICE), out, triton_interpreter.ACTIVE, 8192)
    expected = values.to(dtype)
    assert torch.equal(torch.nan_to_num(out.cpu(), nan=7), torch.nan_to_num(expected, nan=7))
    assert torch.equal(torch.isnan(out.cpu()), torch.isnan(expected))
