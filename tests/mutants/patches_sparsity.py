"""Mutants of the top-k masks, in Python, C++ and Triton."""

from __future__ import annotations

from .patches import mutants

SPARSITY = "caref_kernels/sparsity.py"
OBJECTIVE = "caref_kernels/objective.py"
CONFIG = "caref_kernels/config.py"
SELECT = "csrc/cpu/select.cpp"
KEYS = "csrc/cpu/select.h"
TOPK_SUMS = "csrc/cpu/topk_sums.h"
BACKWARD = "csrc/cpu/backward.cpp"
LAUNCH = "csrc/cpu/launch.cpp"
ROW_MATH = "csrc/row_math.h"
T_SELECT = "caref_kernels/backends/triton/select.py"
T_BACKWARD = "caref_kernels/backends/triton/backward.py"
T_ROW_MATH = "caref_kernels/backends/triton/row_math.py"

SPARSE = [
    *mutants(
        "k off by one; ties broken another way; k from NaN",
        SPARSITY,
        "sparsity",
        "entropy_to_num_kept or reference and (topk or one_token or heavy_ties or fewer_finite_logits or budgets)",
        ("k-off-by-one", "values.gather(-1, num_kept - 1)", "values.gather(-1, (num_kept - 2).clamp_min(0))"),
        ("ties-count-whole", "torch.where(equal, tie_weight, above", "torch.where(equal, 1.0, above"),
        ("ties-count-nothing", "torch.where(equal, tie_weight, above", "torch.where(equal, 0.0, above"),
        ("floor-instead-of-ceil", ".exp()).ceil()", ".exp()).floor()"),
        (
            "nan-becomes-an-index",
            "torch.where(wanted >= top_k.k_min, wanted,",
            "torch.where(wanted == wanted, wanted,",
        ),
        (
            "masked-columns-in-the-mask",
            "num_kept = torch.minimum(num_kept, finite)",
            "num_kept = num_kept + 0 * finite",
        ),
    ),
    *mutants(
        "G over all columns although there is a mask",
        OBJECTIVE,
        "sparsity",
        "reference and (one_token or num_kept or budgets) or gradients",
        (
            "mask-not-on-slopes",
            "return _masked(rows, torch.where(carries, p * slope / q, 0.0))",
            "return p * slope / q",
        ),
        (
            "top-always-whole",
            "rows.top_k.weight.gather(-1, rows.argmax) * values",
            "(0 * rows.top_k.weight.gather(-1, rows.argmax) + 1) * values",
        ),
    ),
    *mutants(
        "the budget not clipped to the row",
        CONFIG,
        "sparsity",
        "whole_row",
        ("k-max-not-clipped", "k_max=min(self.k_max or columns, columns)", "k_max=self.k_max or columns"),
    ),
    *mutants(
        "k off by one; a bracket that is not verified; counts from the wrong side",
        SELECT,
        "sparsity",
        "cpu and (heavy_ties or bit_patterns or equal_row or widest_rows)",
        ("c-rank-off-by-one", "if (count >= rank) {", "if (count > rank) {"),
        ("c-bracket-too-high-unnoticed", "if (above < k && k <= above + size) {", "if (above < k) {"),
        ("c-bracket-too-low-unnoticed", "if (above < k && k <= above + size) {", "if (k <= above + size) {"),
        ("c-above-forgotten", "      found.above += above;\n", ""),
        ("c-tail-not-listed", "for (; i < columns; ++i) {", "for (; i < 0; ++i) {"),
        ("c-list-not-padded", "list[size + lane] = kNoKey<T>;", "list[size + lane] = kInfinityKey<T>;"),
        ("c-dropped-keys-forgotten", "dropped = beyond_high;", "dropped = 0;"),
    ),
    *mutants(
        "keys that do not order the values",
        KEYS,
        "sparsity",
        "cpu and (heavy_ties or bit_patterns)",
        (
            "c-negative-keys-reversed",
            "return (magnitude ^ sign) - sign;",
            "return bits ^ (sign & ~kSignBit<T>);",
        ),
    ),
    *mutants(
        "the arg-max counted twice or not at all; ties broken another way",
        TOPK_SUMS,
        "sparsity",
        "cpu and (one_token or heavy_ties or fewer_finite_logits or num_kept or budgets)",
        ("c-top-summed-with-the-rest", "        list[i] = kNoKey<T>;\n", ""),
        ("c-tie-weight-one", "key == selection.threshold ? tie_weight : 0.0", "key == selection.threshold ? 1.0 : 0.0"),
        ("c-ties-not-summed", "if (tied > 0) {", "if (tied < 0) {"),
        ("c-top-counts-as-tied", "found.equal - (mask.top == found.threshold)", "found.equal"),
        ("c-infinite-columns-kept", "if (mask.selection.threshold == -kInfinityKey<T>) {", "if (false) {"),
    ),
    *mutants(
        "columns outside the top-k mask counted in the backward, or ties counted whole",
        BACKWARD,
        "sparsity",
        "cpu and (one_token or num_kept or budgets or columns_outside or gradients)",
        (
            "c-backward-without-topk-mask",
            "keys > threshold ? splat<T>(sced) : tied",
            "keys == keys ? splat<T>(sced) : tied",
        ),
        (
            "c-backward-ties-whole",
            "tied_sced(static_cast<T>(row.grad_sced * row.tie_weight))",
            "tied_sced(static_cast<T>(row.grad_sced))",
        ),
        ("c-label-without-topk-mask", "kIsTopKMasked<Kind> ? row.weight(key_at(place)) : 1.0", "1.0"),
        (
            "c-top-slope-without-topk-mask",
            "  if constexpr (kIsTopKMasked<Kind>) row.top_slope *= row.weight(key_at(logits + row.argmax));\n",
            "",
        ),
    ),
    *mutants(
        "k from NaN, floor",
        ROW_MATH,
        "sparsity",
        "num_kept or budgets",
        ("c-floor-instead-of-ceil", "ceil(k_scale * exp(entropy))", "floor(k_scale * exp(entropy))"),
        (
            "c-nan-becomes-an-index",
            "if (!(wanted > static_cast<double>(k_min)))",
            "if (wanted <= static_cast<double>(k_min))",
        ),
    ),
    *mutants(
        "threads share the memory of their lists",
        LAUNCH,
        "determinism sparsity",
        "masks and cpu",
        ("c-shared-workspace", "omp_get_thread_num() * workspace_bytes", "0 * workspace_bytes"),
    ),
    *mutants(
        "k off by one; lists that overflow; a sample that is believed",
        T_SELECT,
        "sparsity triton_selection",
        "triton and (one_token or heavy_ties or equal_row or fewer_finite_logits or too_short or keys)",
        ("t-rank-off-by-one", ".to(tl.int32)) >= rank:", ".to(tl.int32)) > rank:"),
        ("t-overflow-unnoticed", "(tl.max(used) <= SELECT.depth) & (listed >= k)", "listed >= k"),
        ("t-sample-believed", "(tl.max(used) <= SELECT.depth) & (listed >= k)", "tl.max(used) <= SELECT.depth"),
        ("t-sign-of-keys-dropped", "return tl.where(bits < 0, -magnitude, magnitude)", "return magnitude"),
        ("t-tied-maxima-forgotten", "others = top_weight * (at_maximum - 1).to(tl.float64)", "others = top_weight * 0"),
        ("t-ties-not-summed", "density += tied * row_math", "density += 0 * tied * row_math"),
    ),
    *mutants(
        "columns outside the top-k mask counted in the backward",
        T_BACKWARD,
        "sparsity",
        "triton and (num_kept or budgets) and tied_maxima",
        (
            "t-top-slope-without-topk-mask",
            "            top_slope *= row_math.topk_weight(",
            "            row_math.topk_weight(",
        ),
    ),
    *mutants(
        "ties counted whole; k from NaN",
        T_ROW_MATH,
        "sparsity",
        "triton and (num_kept or budgets) and tied_maxima",
        ("t-ties-count-whole", "tl.where(z == threshold, tie_weight, 0.0)", "tl.where(z == threshold, 1.0, 0.0)"),
    ),
]
