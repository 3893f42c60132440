"""Mutants of the core in Python: an edit of one place, the mistake it stands for, and the tests that should see it."""

from __future__ import annotations

import re
from typing import NamedTuple

OBJECTIVE = "caref_kernels/objective.py"
REFERENCE = "caref_kernels/backends/reference.py"
CPU = "caref_kernels/backends/cpu.py"
COMPILED_CALLS = "caref_kernels/backends/compiled.py"
AUTOGRAD = "caref_kernels/autograd.py"
OPS = "caref_kernels/ops.py"
FUNCTIONAL = "caref_kernels/functional.py"
DIVISOR = "caref_kernels/divisor.py"
CHECKS = "caref_kernels/checks.py"


class Mutant(NamedTuple):
    """Replace ``old``, which occurs once in ``path``, by ``new``; a test of ``files`` and ``keyword`` should fail."""

    name: str
    mistake: str
    path: str
    old: str
    new: str
    files: tuple[str, ...]
    keyword: str

    @property
    def is_compiled(self) -> bool:
        return self.path.startswith("csrc/")

    @property
    def needs_build(self) -> bool:
        """Whether the extension must be built; the emulation of CUDA is compiled by its tests."""
        return self.is_compiled and not self.path.startswith("csrc/cuda/")

    @property
    def is_interpreted(self) -> bool:
        """Whether its tests run under Triton's interpreter; the tests of launches compile instead."""
        return self.path.startswith("caref_kernels/backends/triton/") and "triton_launches" not in self.files

    @property
    def is_control(self) -> bool:
        return self.mistake == "none"

    def matches(self, text: str) -> list[re.Match[str]]:
        """Where ``old`` is; in C++, where a formatter may break lines, any white space stands for any other."""
        words = self.old.split() if self.is_compiled else [self.old]
        return list(re.finditer(r"\s+".join(map(re.escape, words)), text))

    def applied(self, text: str) -> str:
        """``text`` with the mistake.

        Raises:
            ValueError: ``old`` does not occur exactly once.
        """
        found = self.matches(text)
        if len(found) != 1:
            raise ValueError(f"{self.name}: {self.old!r} must occur once in {self.path}; got {len(found)}")
        return text[: found[0].start()] + self.new + text[found[0].end() :]

    def arguments(self) -> list[str]:
        """The pytest selection that should fail."""
        selection = [f"tests/test_{name}.py" for name in self.files]
        return [*selection, "-k", self.keyword] if self.keyword else selection


Edit = tuple[str, str, str]  # name, old, new


def mutants(mistake: str, path: str, tests: str, keyword: str, *edits: Edit) -> list[Mutant]:
    """Mutants of one kind; ``tests`` names the files without test_ and .py."""
    return [Mutant(name, mistake, path, old, new, tuple(tests.split()), keyword) for name, old, new in edits]


MATHS = [
    *mutants(
        "gradient zero, flipped or halved",
        OBJECTIVE,
        "oracle",
        "",
        ("sced-gradient-zero", "gradient + grad_sced * _sced", "gradient + 0 * grad_sced * _sced"),
        ("sced-gradient-flipped", "gradient + grad_sced * _sced", "gradient - grad_sced * _sced"),
        ("sced-gradient-halved", "gradient + grad_sced * _sced", "gradient + 0.5 * grad_sced * _sced"),
        ("kl-gradient-halved", "gradient = grad_kl * p", "gradient = 0.5 * grad_kl * p"),
        ("ce-gradient-flipped", "gradient + grad_ce * ce_slope", "gradient - grad_ce * ce_slope"),
    ),
    *mutants(
        "p * G dropped",
        OBJECTIVE,
        "oracle",
        "",
        ("slope-sum-dropped", "slopes - p * slope_sum - share", "slopes - share"),
        ("slope-sum-dropped-at-the-top", "top_slope - p * slope_sum, rest", "top_slope, rest"),
        ("top-slope-dropped", "p * slope_sum - share * top_slope", "p * slope_sum"),
    ),
    *mutants(
        "log2, or another U",
        OBJECTIVE,
        "oracle",
        "",
        ("logarithm-to-base-2", "torch.log((1 + residual) / vocab_size)", "torch.log2((1 + residual) / vocab_size)"),
        ("one-column-fewer-in-u", "(1 + residual) / vocab_size", "(1 + residual) / (vocab_size - 1)"),
    ),
    *mutants(
        "exponents",
        OBJECTIVE,
        "oracle",
        "",
        ("beta-dropped-from-value", "return density if beta == 0 else density * q**beta", "return density"),
        ("beta-dropped-from-slope", "return slope if beta == 0 else slope * q**beta", "return slope"),
        ("beta-term-dropped-from-slope", " * q - beta * t", " * q"),
        ("sign-dropped", "alpha * torch.sign(log_ratio) * (log_ratio + 1)", "alpha * (log_ratio + 1)"),
        ("alpha-off-by-one-in-slope", "t ** (alpha - 1) * slope", "t**alpha * slope"),
    ),
    *mutants(
        "a single lse instead of (m, a, r)",
        OBJECTIVE,
        "numerics oracle",
        "confident",
        ("cross-entropy-from-d", "torch.log1p(rows.residual) - rows.raw", "torch.log(1 + rows.residual) - rows.raw"),
        ("entropy-from-d", "return torch.log1p(residual) - mean_shift", "return torch.log(1 + residual) - mean_shift"),
        ("top-complement-from-d", "q = residual / (1 + residual)\n", "q = 1 - 1 / (1 + residual)\n"),
        ("label-slope-from-d", "q_top = rows.residual / (1 + rows.residual)", "q_top = 1 - 1 / (1 + rows.residual)"),
    ),
    *mutants(
        "the arg-max column in r, or left out twice on ties",
        OBJECTIVE,
        "numerics oracle",
        "tied_maxima",
        ("top-counted-in-residual", "torch.where(is_top, 0.0, shift.exp())", "shift.exp()"),
        (
            "ties-left-out-together",
            "torch.arange(logits.size(-1), device=logits.device) == argmax",
            "logits == maximum",
        ),
    ),
    *mutants(
        "eps inside the logarithm",
        OBJECTIVE,
        "oracle numerics",
        "50_digits or uniform_row or official_formula",
        (
            "eps-in-kl",
            "    kl = _mean_shift(rows) - offset",
            "    kl = _mean_shift(rows) - offset + 1e-9 * spec.vocab_size",
        ),
        ("eps-in-sced", "* log_ratio.abs()) ** alpha\n", "* (log_ratio + 1e-9).abs()) ** alpha\n"),
    ),
    *mutants(
        "NaN swallowed",
        OBJECTIVE,
        "numerics",
        "poisoned_row_is_nan_alone and reference",
        (
            "row-without-softmax-is-finite",
            "torch.isfinite(maximum), residual, torch.nan",
            "torch.isfinite(maximum), residual, 1.0",
        ),
    ),
]

ROWS = [
    *mutants(
        "an ignored row gets a term or a gradient",
        REFERENCE,
        "labels regressions",
        "(ignore_index or ignored_row or valid_masks) and reference",
        ("ignored-row-has-terms", "return _zero_unless(valid, terms)", "return terms"),
        ("ignored-row-has-gradient", "return _zero_unless(valid, gradient).to", "return gradient.to"),
        ("ignored-row-is-read", "torch.where(valid, values, 0.0), spec), labels", "values, spec), labels"),
    ),
    *mutants(
        "label not checked, wrapped to 32 bits, or checked by an assertion",
        CHECKS,
        "labels",
        "bad_label or out_of_range or checks_survive_python_optimised",
        ("label-unchecked", "    if bool(wrong.any()):", "    if False and bool(wrong.any()):"),
        ("negative-label-accepted", "((labels < 0) | (labels >= columns))", "(labels >= columns)"),
        ("label-v-accepted", "((labels < 0) | (labels >= columns))", "((labels < 0) | (labels > columns))"),
        ("label-wrapped-to-int32", "    wrong = ((labels", "    labels = labels.int()\n    wrong = ((labels"),
        ("label-checked-by-assertion", "    if bool(wrong.any()):", "    if __debug__ and bool(wrong.any()):"),
    ),
    *mutants(
        "ignore_index wrapped to the 32 bits of the labels",
        CHECKS,
        "labels shards",
        "cannot_hold",
        ("ignore-index-wraps", "labels.long() if labels.dtype == torch.int32 else labels", "labels"),
    ),
    *mutants(
        "written in place where something else is lost",
        CHECKS,
        "inplace validation",
        "inplace",
        ("overlapping-rows-written", "            if stride <= reach:\n", "            if stride == 0:\n"),
        (
            "batches-of-overlapping-rows-written",
            "            reach += stride * (size - 1)",
            "            reach = stride",
        ),
        ("negated-rows-written", "    if logits.is_neg():\n", "    if False:\n"),
        ("hooks-not-seen", "    if saves and torch", "    if False and torch"),
    ),
    *mutants(
        "written in place where something else is lost",
        AUTOGRAD,
        "inplace",
        "two_threads",
        ("two-passes-write", "    if take(ctx.intact) is None:\n", "    if False:\n"),
    ),
    *mutants(
        "a mistake named that was not made",
        CHECKS,
        "hints",
        "",
        ("any-shape-is-transposed", "or rows.shape != logits.shape[:1] + logits.shape[2:]:", "or rows.dim() < 2:"),
        ("any-integers-are-labels", "    if floating.shape == rows.shape[:-1]:\n", "    if True:\n"),
    ),
    *mutants(
        "sums in the dtype of the rows",
        OPS,
        "reductions",
        "",
        ("rows-summed-in-bfloat16", "return terms.sum(0, dtype=torch.float64)", "return terms.bfloat16().sum(0)"),
    ),
    *mutants(
        "mean over all rows",
        DIVISOR,
        "reductions labels",
        "reduction or mean_of_fused_sced or micro_batches or num_items or ignore_index",
        ("mean-over-all-rows", "return counts.sum().to(dtype)", "return torch.ones_like(counts).sum().to(dtype)"),
        ("num-items-ignored", "    if num_items is None:\n", "    if True:\n"),
    ),
    *mutants(
        "incoming gradient ignored, only the first used, or applied twice",
        AUTOGRAD,
        "autograd",
        "scaled_loss or gradient_per_row or strides_of_the_incoming_gradient or backward_twice",
        ("incoming-gradient-ignored", "[grad_loss * weight for", "[torch.ones_like(grad_loss) * weight for"),
        (
            "incoming-gradient-of-first-row",
            "[grad_loss * weight for",
            "[grad_loss.flatten()[0].expand_as(grad_loss) * weight for",
        ),
        ("incoming-gradient-twice", "[grad_loss * weight for", "[grad_loss * grad_loss * weight for"),
    ),
    *mutants(
        "divisor lost on the way back",
        AUTOGRAD,
        "reductions autograd",
        "",
        ("divisor-not-in-gradient", "any_items else grad / divisor", "any_items else grad / 1"),
    ),
    *mutants(
        "labels or weights that are not those of the next position, or of a valid row",
        CHECKS,
        "row_options",
        "shift or token_weights",
        ("shift-fills-a-label", "_shifted(labels.long(), config.ignore_index)", "_shifted(labels.long(), 0)"),
        ("shift-in-32-bits", "_shifted(labels.long(), config.ignore_index)", "_shifted(labels, config.ignore_index)"),
        ("shift-backwards", "rows.roll(-1, -1)", "rows.roll(1, -1)"),
        ("weights-not-shifted", "(_shifted(weights, 0) if config.shift else weights)", "weights"),
        (
            "weight-of-an-ignored-row",
            "return torch.where(valid_labels(labels, config.ignore_index), weights, 0)",
            "return weights",
        ),
    ),
    *mutants(
        "token weights left out of the loss",
        OPS,
        "row_options",
        "token_weights",
        ("loss-not-weighted", "terms if token_weights is None else terms * token_weights[:, None]", "terms"),
    ),
    *mutants(
        "token weights left out of the gradient",
        AUTOGRAD,
        "row_options",
        "token_weights",
        ("gradient-not-weighted", "grad if token_weights is None else grad * token_weights[:, None]", "grad"),
    ),
    *mutants(
        "log-sum-exp relative to the maximum",
        OBJECTIVE,
        "row_options",
        "lse",
        ("lse-without-maximum", "return maximum + torch.log1p(residual)", "return torch.log1p(residual)"),
    ),
    *mutants(
        "no items taken for no row, or a gradient of NaN",
        AUTOGRAD,
        "num_items",
        "not_read",
        ("no-items-divide-the-gradient", "divided(grad, divisor) if", "grad / divisor if"),
    ),
    *mutants(
        "no items taken for no row, or a gradient of NaN",
        DIVISOR,
        "num_items",
        "",
        ("no-items-over-rows-accepted", "    if rows:\n", "    if False:\n"),
        ("no-items-unread", "any_items=known is None", "any_items=False"),
    ),
    *mutants(
        "no items taken for no row, or a gradient of NaN",
        OPS,
        "num_items",
        "not_read",
        ("terms-of-weight-0-added", "term if weight else torch", "term if True else torch"),
        (
            "no-items-are-no-number",
            "per_item(reduced, divisor) if any_items else",
            "reduced / divisor if any_items else",
        ),
    ),
    *mutants(
        "terms that cannot be weighed again",
        AUTOGRAD,
        "reductions",
        "",
        ("gradient-of-terms-dropped", "weighted if grad is None else grad + weighted", "weighted"),
    ),
    *mutants(
        "every number of a schedule compiled anew",
        OPS,
        "compile_schedules",
        "cpu",
        ("schedule-of-constants", "    if all(has_static_value(value) for value in values):", "    if True:"),
        (
            "schedule-of-old-weights",
            "varying = changing(weights, ",
            "varying = changing((1.0, 1.0, weights[2]), ",
        ),
    ),
    *mutants(
        "logits written in place",
        OPS,
        "autograd",
        "backward_twice or logits_are_left_alone or upstream_op_that_saved_the_logits",
        (
            "gradient-over-the-logits",
            "    out = _backward_fake(grad_terms, logits, targets, stats, *arguments)\n",
            "    out = logits.detach()\n",
        ),
    ),
    *mutants(
        "in-place write without raising the version",
        AUTOGRAD,
        "autograd",
        "inplace_backward or overwritten_logits",
        ("version-not-raised", "    torch.autograd.graph.increment_version(logits)\n", ""),
    ),
    *mutants(
        "strides assumed",
        FUNCTIONAL,
        "layouts",
        "layout",
        ("last-stride-assumed-1", "if logits.stride(-1) != 1 and", "if False and"),
    ),
    *mutants(
        "strides assumed",
        COMPILED_CALLS,
        "layouts",
        "layout or padded_base or lie_whole",
        ("row-stride-assumed-v", "else (0, rows.stride(0))", "else (0, rows.size(-1))"),
        (
            "outer-stride-assumed",
            "(rows.stride(0), rows.stride(1)) if",
            "(rows.size(1) * rows.stride(1), rows.stride(1)) if",
        ),
    ),
    *mutants(
        "none", OBJECTIVE, "oracle", "tied_maxima and reference", ("control", "e^y is 0 there", "e^y is zero there")
    ),
]

PYTHON = [*MATHS, *ROWS]
