"""Tests of the compiled CPU kernels alone: every instruction set, 16-bit formats, row formulas, forked processes."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from caref_kernels import backends, config, objective
from caref_kernels.config import RowSpec
from caref_kernels.testing import check_evaluation, check_identity, evaluate, evaluate_eager, make_case, oracle

INSTRUCTION_SETS = ("x86-64-v4", "x86-64-v3", "baseline")
# Widths below, equal to and above one register of every instruction set, and one block of 1024 columns.
WIDTHS = (1, 3, 4, 15, 16, 17, 1023, 1024, 1025, 2049)
# Exponents with one pass, and with two passes and whole or fractional powers.
EXPONENTS = ((2.0, 1.0), (4.0, 2.0), (2.0, 0.0), (3.0, 1.0), (1.5, 0.5))


@pytest.fixture
def compiled():
    """The compiled module; tests are skipped without it, because the conformance suite reports its absence."""
    reason = backends.get("cpu").unsupported(torch.empty(1, 2))
    if reason is not None:
        pytest.skip(reason)
    from caref_kernels import _C

    yield _C
    _C.use_instruction_set("")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, compiled):
    try:
        compiled.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("columns", WIDTHS)
def test_instruction_sets_and_widths(instruction_set, columns):
    """Each instruction set has its own register width, and so its own tail of a row."""
    case = make_case("normal_3", 3, columns, seed=columns)
    check_evaluation(evaluate(*case, backend="cpu"), oracle(*case), evaluate_eager(*case), instruction_set)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_instruction_sets_and_dtypes(instruction_set, dtype, alpha, beta):
    case = make_case("lm_like", 3, 1500, dtype, seed=7)
    options = {"alpha": alpha, "beta": beta}
    check_evaluation(evaluate(*case, **options, backend="cpu"), oracle(*case, **options), label=instruction_set)


def test_unknown_instruction_set(compiled):
    with pytest.raises(ValueError, match=r"instruction set 'x86-64-v9' does not run on this machine"):
        compiled.use_instruction_set("x86-64-v9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read(instruction_set, dtype):
    """For all 65,536 bit patterns, results are bitwise identical to those of the same values in float32."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = patterns.reshape(-1, 16)
    spec = RowSpec(2.0, 1.0, 16, -100, True)
    terms, stats = backends.get("cpu").forward(logits, None, spec)
    expected_terms, expected_stats = backends.get("cpu").forward(logits.float(), None, spec)
    assert torch.equal(terms.nan_to_num(7.0), expected_terms.nan_to_num(7.0))
    assert torch.equal(stats.nan_to_num(7.0), expected_stats.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exponent", range(-30, 31, 4))
def test_gradients_round_once_to_nearest_even(instruction_set, dtype, exponent):
    """From the subnormal range of float16 to infinity, the gradient is the float32 gradient rounded as torch does."""
    case = make_case("normal_3", 8, 333, dtype, seed=exponent + 100)
    spec = RowSpec(2.0, 1.0, 333, -100, True)
    cpu = backends.get("cpu")
    _, stats = cpu.forward(case.logits, case.labels, spec)
    scale = torch.full((8, 3), 2.0**exponent)
    rounded, exact = torch.empty_like(case.logits), torch.empty(8, 333)
    cpu.gradient(scale, case.logits, case.labels, stats, spec, rounded)
    cpu.gradient(scale, case.logits.float(), case.labels, stats, spec, exact)
    assert torch.equal(rounded, exact.to(dtype))


def test_row_formulas_equal_their_counterparts(compiled):
    """csrc/row_math.h against the functions of the same names in objective.py, on a grid."""
    formulas = compiled.row_math
    for residual, vocab_size in itertools.product((1e-12, 1e-3, 1.0, 7.5, 1e5), (1, 50, 128256)):
        tensor = torch.tensor(residual, dtype=torch.float64)
        expected = objective.log_ratio_offset(tensor, vocab_size)
        check_identity(
            torch.tensor(formulas.log_ratio_offset(residual, vocab_size), dtype=torch.float64), expected, "float64"
        )
        expected = objective.entropy(tensor, torch.tensor(-0.3, dtype=torch.float64))
        check_identity(torch.tensor(formulas.entropy(residual, -0.3), dtype=torch.float64), expected, "float64")
    grid = itertools.product((0.0, 1e-12, 0.01, 0.5), (-8.0, -1.0, 0.0, 0.3, 11.0), (1.0, 1.5, 2.0, 3.0, 16.0))
    for (p, log_ratio, alpha), beta in itertools.product(grid, (0.0, 0.1, 1.0, 2.5)):
        arguments = [torch.tensor(value, dtype=torch.float64) for value in (p, log_ratio, 1 - p)]
        for name in ("sced_density", "sced_slope"):
            actual = getattr(formulas, name)(p, log_ratio, 1 - p, alpha, beta)
            expected = getattr(objective, name)(*arguments, alpha, beta)
            check_identity(torch.tensor(actual, dtype=torch.float64), expected, "float64")


def test_one_pass_exponents_are_those_of_python():
    """visit_exponents() in csrc/row_kinds.h has a one-pass kernel for exactly the pairs of the Python side."""
    source = (Path(__file__).parents[1] / "csrc" / "row_kinds.h").read_text(encoding="utf-8")
    condition = r"if \(alpha == (\d+)\.0 && beta == (\d+)\.0\) return visitor\(EvenExponents<(\d+), (\d+)>\{\}\);"
    found = [tuple(map(int, pair)) for pair in re.findall(condition, source)]
    assert all((alpha, beta) == (kind_alpha, kind_beta) for alpha, beta, kind_alpha, kind_beta in found)
    assert len(found) == source.count("return visitor(EvenExponents<")
    assert {pair[:2] for pair in found} == set(config.ONE_PASS_EXPONENTS)


def test_a_forked_child_computes_after_its_parent_has(compiled):
    """In the child, GNU OpenMP would wait for ever for threads that the fork did not copy; tested in a new process."""
    code = (
        "import os, signal, torch, caref_kernels\n"
        "torch.set_num_threads(2)\n"
        "logits, labels = torch.randn(64, 4096), torch.arange(64)\n"
        "before = caref_kernels.caref_loss(logits, labels, backend='cpu').item()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(30)\n"
        "    os._exit(0 if caref_kernels.caref_loss(logits, labels, backend='cpu').item() == before else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, (run.returncode, run.stderr)
