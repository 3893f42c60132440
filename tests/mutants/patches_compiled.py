"""Mutants of the C++ sources; each one needs a build of the extension."""

from __future__ import annotations

from .patches import mutants

ROW_LAYOUT = "csrc/row_layout.h"
ROW_MATH = "csrc/row_math.h"
LANES = "csrc/cpu/lanes.h"
ROWS = "csrc/cpu/rows.h"
KINDS = "csrc/row_kinds.h"
RESULTS = "csrc/row_results.h"
FORWARD = "csrc/cpu/forward.cpp"
BACKWARD = "csrc/cpu/backward.cpp"
LAUNCH = "csrc/cpu/launch.cpp"
BINDINGS = "csrc/bindings.cpp"

COMPILED = [
    *mutants(
        "gradient zero, flipped or halved",
        BACKWARD,
        "numerics",
        "(many_rows or vocabularies or widths or distributions or widest) and cpu",
        ("c-sced-gradient-zero", "inner += weight(x) * even_slope", "inner += 0 * weight(x) * even_slope"),
        ("c-sced-gradient-flipped", "inner += weight(x) * even_slope", "inner -= weight(x) * even_slope"),
        ("c-kl-gradient-halved", "kl(static_cast<T>(row.grad_kl))", "kl(static_cast<T>(0.5 * row.grad_kl))"),
        ("c-label-column-not-written", "if (has_label_column) store_one(out + target.label, label);", ""),
        ("c-top-column-not-written", "  store_one(out + row.argmax, top);\n", ""),
    ),
    *mutants(
        "p * G dropped",
        BACKWARD,
        "numerics",
        "(many_rows or vocabularies or widths or distributions or widest) and cpu",
        ("c-slope-sum-dropped", "row.grad_sced == 0.0 ? 0.0 : row.slope_sum", "0.0"),
        ("c-top-slope-dropped", "sum += row.top_slope / row.constants.q_top;", "sum += 0.0;"),
    ),
    *mutants(
        "the arg-max column in r, a tie left out with it, or a maximum forgotten",
        FORWARD,
        "numerics",
        "(distributions or widest or tied_maxima or order_of_the_columns) and cpu",
        ("c-top-counted-in-residual", "      block.exclude(argmax);\n    } else", "    } else"),
    ),
    *mutants(
        "the arg-max column in r, a tie left out with it, or a maximum forgotten",
        KINDS,
        "numerics",
        "(distributions or widest or tied_maxima or order_of_the_columns) and cpu",
        ("c-old-maximum-forgotten", "scale * (residual + 1.0)", "scale * residual"),
        ("c-old-maximum-not-in-moments", "moments.add(delta, e);", ""),
        ("c-moments-not-shifted", "moments.shift(delta, e);", ""),
        ("c-first-moment-not-shifted", "+ delta * residual + delta)", "+ delta)"),
    ),
    *mutants(
        "a single lse instead of (m, a, r)",
        ROW_MATH,
        "numerics",
        "(distributions or widest or confident_rows) and cpu",
        ("c-top-complement-from-d", "q_top(residual / d)", "q_top(1.0 - static_cast<T>(1.0 / d))"),
    ),
    *mutants(
        "exponents",
        ROW_MATH,
        "numerics",
        "(exponents or instruction_sets_and_dtypes) and cpu",
        ("c-sign-dropped", "* Ops<X>::sign(log_ratio) * (log_ratio + 1)", "* (log_ratio + 1)"),
        ("c-beta-dropped", "density : density * power(q, exponents.beta)", "density : density"),
    ),
    *mutants(
        "tail lanes not masked",
        ROWS,
        "numerics",
        "(many_rows or vocabularies or widths or instruction_sets_and_widths) and cpu",
        (
            "c-tail-lanes-counted",
            "store_one(tail_ + lane, -std::numeric_limits<double>::infinity());",
            "store_one(tail_ + lane, 0.0);",
        ),
        (
            "c-tail-skipped",
            "registers_ = (end_ - start_ + kLanes - 1) / kLanes;",
            "registers_ = (end_ - start_) / kLanes;",
        ),
    ),
    *mutants(
        "32-bit row offset",
        ROW_LAYOUT,
        "layouts regressions",
        "cpu",
        (
            "c-int32-row-offset",
            "return (row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride;",
            "return static_cast<int32_t>((row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride);",
        ),
    ),
    *mutants(
        "strides assumed",
        ROW_LAYOUT,
        "layouts",
        "(layout or padded_base or lie_whole) and cpu",
        ("c-row-stride-assumed-v", "+ (row % inner_rows) * inner_stride;", "+ (row % inner_rows) * columns;"),
    ),
    *mutants(
        "incoming gradient of the first row only, or of another term",
        RESULTS,
        "autograd regressions",
        "(scaled_loss or gradient_per_row or any_strides or strides_of) and cpu",
        ("c-incoming-gradient-of-first-row", "+ row * params.grad_row_stride,", "+ 0 * row * params.grad_row_stride,"),
        ("c-term-stride-assumed-1", "grad_kl(grads[kKl * stride])", "grad_kl(grads[kKl])"),
    ),
    *mutants(
        "an ignored row gets a term or a gradient",
        BACKWARD,
        "labels",
        "(ignore_index or ignored_row or valid_masks) and cpu",
        ("c-ignored-row-has-gradient", "fill_row(out, params.columns, 0.0);", "fill_row(out, params.columns, 1e-6);"),
    ),
    *mutants(
        "an ignored row gets a term or a gradient",
        FORWARD,
        "labels",
        "(ignore_index or ignored_row or valid_masks) and cpu",
        ("c-ignored-row-has-terms", "Arithmetic>(0.0).write(params, row);", "Arithmetic>(1e-3).write(params, row);"),
    ),
    *mutants(
        "label not checked, or wrapped to 32 bits",
        LAUNCH,
        "labels",
        "(bad_label or out_of_range) and cpu",
        ("c-label-unchecked", "if ((label < 0 || label >= params.columns) &&", "if (false &&"),
        ("c-negative-label-accepted", "(label < 0 || label >= params.columns)", "(label >= params.columns)"),
        ("c-label-v-accepted", "label >= params.columns)", "label > params.columns)"),
        (
            "c-label-wrapped-to-int32",
            ": static_cast<const int64_t*>(params.targets)[row];",
            ": static_cast<int32_t>(static_cast<const int64_t*>(params.targets)[row]);",
        ),
    ),
    *mutants(
        "an address formed from what the backward was given",
        BINDINGS,
        "labels",
        "canaries and cpu",
        (
            "c-label-unchecked-in-backward",
            "check(params, true);",
            "check(params, true); return caref::cpu::run(kernels.backward, params);",
        ),
    ),
    *mutants(
        "an address formed from what the backward was given",
        RESULTS,
        "labels",
        "hostile and cpu",
        ("c-arg-max-unchecked", "argmax >= 0 && argmax < columns;", "true;"),
    ),
    *mutants(
        "NaN swallowed",
        LANES,
        "numerics",
        "poisoned_row_is_nan_alone and cpu",
        (
            "c-nan-lost-in-the-clamp",
            "return larger(splat<T>(Lanes<T>::kFloor), y);",
            "return larger(y, splat<T>(Lanes<T>::kFloor));",
        ),
    ),
    *mutants(
        "NaN swallowed",
        RESULTS,
        "numerics",
        "poisoned_row_is_nan_alone and cpu",
        ("c-infinite-maximum-accepted", "if (!has_maximum || sums.residual", "if (sums.residual"),
    ),
    *mutants(
        "NaN swallowed",
        ROWS,
        "numerics regressions",
        "(nan_among_masked_columns_before_the_maximum or poisoned_row_is_nan_alone) and cpu",
        ("c-nan-before-a-maximum-lost", "found |= x[lane] != x[lane];", "found |= false;"),
    ),
    *mutants(
        "rounded twice, truncated, or overflowing",
        LANES,
        "numerics dtypes",
        "(gradient_of_the_true_class or sixteen_bit or has_the_dtype) and cpu",
        ("c-bfloat16-truncated", "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;", "bits >> 16;"),
        (
            "c-bfloat16-rounded-twice",
            "const BitsF rounded = (bits + 0x7fffu",
            "const BitsF rounded = ((bits + 0x3fffu) / 0x8000u * 0x8000u + 0x7fffu",
        ),
        (
            "c-float16-truncated",
            "(magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23))",
            "(magnitude - (112u << 23))",
        ),
    ),
    *mutants(
        "sums in the dtype of the row",
        LANES,
        "dtypes numerics",
        "(sixteen_bit or has_the_dtype or many_rows or vocabularies or widths) and cpu",
        (
            "c-blocks-summed-in-bfloat16",
            "    memcpy(halves, &block, sizeof(halves));\n",
            "    block = bit_cast<VecF>(bit_cast<BitsF>(block) & 0xffff0000u);\n"
            "    memcpy(halves, &block, sizeof(halves));\n",
        ),
    ),
]
