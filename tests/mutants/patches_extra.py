"""Mutants of the z-loss and label smoothing."""

from __future__ import annotations

from .patches import OBJECTIVE, OPS, Mutant, mutants

TESTS = "extra_terms"

EXTRA: list[Mutant] = [
    *mutants(
        "value or gradient of an extra term",
        OBJECTIVE,
        TESTS,
        "not cuda",
        ("z-loss-not-squared", "log_sum_exp(maximum, residual) ** 2, ", "log_sum_exp(maximum, residual), "),
        ("z-slope-halved", "2 * log_sum_exp(maximum, residual) * grad_z", "log_sum_exp(maximum, residual) * grad_z"),
        ("uniform-without-p", "* grad_z + grad_uniform\n", "* grad_z\n"),
        ("uniform-without-the-constant", "-grad_uniform / max(spec.smoothed, 1)", "0 * grad_uniform"),
        ("constant-left-out", "(extra[0] * p + extra[1]) if extra", "(extra[0] * p) if extra"),
    ),
    *mutants(
        "a share of the cross-entropy that smoothing does not take away",
        "caref_kernels/config.py",
        TESTS,
        "not cuda",
        ("smoothing-on-top", "weights = (1.0 - smoothing, ", "weights = (1.0, "),
    ),
    *mutants(
        "what a row that is not valid holds is read, or the terms are columns of others",
        OPS,
        TESTS,
        "not cuda",
        ("smoothed-ignored-row", "uniform_ce = torch.where(valid, uniform_ce, 0.0)", "pass"),
        ("mean-from-zero", "reshape(-1) / spec.smoothed - maximum", "reshape(-1) / spec.smoothed"),
    ),
    *mutants(
        "sum of the logits of other ranks, or of other columns",
        "caref_kernels/distributed/local_stats.py",
        "vocab_parallel",
        "every_option",
        ("local-sum-of-smoothing-lost", "sums[block, -1] = values.sum(-1, dtype=torch.float64)", "pass"),
    ),
    *mutants(
        "the Trainer's own smoother stays",
        "caref_kernels/integrations/trainer.py",
        "row_options_of_models",
        "smoothing",
        ("trainer-smooths-too", "trainer.label_smoother = None", "pass"),
    ),
    *mutants(
        "column gradients left out of a column",
        "csrc/cpu/backward.cpp",
        TESTS,
        "cpu",
        ("c-factor-left-out", "row.grad_ce + row.factor - row.grad_sced", "row.grad_ce - row.grad_sced"),
        ("c-constant-left-out", "return p * inner + everywhere;", "return p * inner;"),
        ("c-constant-left-out-of-two-passes", "top_slope + everywhere;", "top_slope;"),
    ),
    *mutants(
        "column gradients left out of the arg-max or the label column",
        "csrc/row_results.h",
        TESTS,
        "cpu",
        ("c-top-without-constant", "factor * constants.p_top + constant;", "factor * constants.p_top;"),
        ("c-label-without-factor", "+ factor * p + constant;", "+ constant;"),
    ),
    *mutants(
        "mean of the logits of other columns",
        "csrc/cpu/rows.h",
        TESTS,
        "cpu",
        ("c-mean-with-padding", "lane < end_ - start_; ++lane) total", "lane < kLanes; ++lane) total"),
    ),
    *mutants(
        "mean of the logits relative to another maximum",
        "csrc/cpu/forward.cpp",
        TESTS,
        "cpu",
        ("c-mean-from-the-first-maximum", "(static_cast<double>(sums.pivot) - maximum)", "0.0"),
    ),
    *mutants(
        "column gradients left out by the CUDA kernels",
        "csrc/cuda/backward.cu",
        TESTS,
        "emulated",
        ("g-factor-left-out", "row.grad_ce + row.factor - row.grad_sced", "row.grad_ce - row.grad_sced"),
        ("g-constant-left-out", "constants.everywhere = static_cast<T>(row.constant);", ""),
    ),
    *mutants(
        "column gradients left out by the Triton kernels",
        "caref_kernels/backends/triton/backward.py",
        TESTS,
        "triton",
        ("t-factor-left-out", "        constant += factor\n", "        constant += 0\n"),
        ("t-top-without-constant", "top += factor * p_top + everywhere", "top += factor * p_top"),
        ("t-constant-left-out", "        gradient += everywhere\n", "        gradient += 0\n"),
    ),
]
