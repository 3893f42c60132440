"""Mutants of the Triton kernels, tested under Triton's interpreter."""

from __future__ import annotations

from .patches import mutants

ROWS = "caref_kernels/backends/triton/rows.py"
ROW_MATH = "caref_kernels/backends/triton/row_math.py"
FORWARD = "caref_kernels/backends/triton/forward.py"
TILING = "caref_kernels/backends/triton/tiling.py"
BACKWARD = "caref_kernels/backends/triton/backward.py"
SELECT = "caref_kernels/backends/triton/select.py"
LAUNCHES = "caref_kernels/backends/triton/__init__.py"

TRITON = [
    *mutants(
        "tail columns not masked",
        ROWS,
        "labels layouts numerics",
        "triton and (canaries or layout or lie_whole or single_column or uniform_row)",
        (
            "t-tail-loaded",
            'mask=column < columns, other=float("-inf")',
            'mask=column < columns + 8, other=float("-inf")',
        ),
        ("t-tail-counts-as-zero", 'mask=column < columns, other=float("-inf")', "mask=column < columns, other=0.0"),
    ),
    *mutants(
        "tail columns not masked",
        BACKWARD,
        "labels layouts",
        "triton and (canaries or layout or padded_base or lie_whole)",
        ("t-tail-written", "tl.store(out + column, rounded, mask=column < columns)", "tl.store(out + column, rounded)"),
        (
            "t-fill-past-the-end",
            "tl.store(out + column, filled, mask=column < columns)",
            "tl.store(out + column, filled)",
        ),
    ),
    *mutants(
        "32-bit row offset",
        ROWS,
        "regressions",
        "triton and row_offsets_beyond_32_bits",
        (
            "t-offset-32-bits",
            "(row32 % inner_rows).to(tl.int64) * inner_stride.to(tl.int64)\n",
            "((row32 % inner_rows).to(tl.int64) * inner_stride.to(tl.int64)).to(tl.int32).to(tl.int64)\n",
        ),
    ),
    *mutants(
        "label not checked before use",
        ROWS,
        "labels",
        "triton and (bad_label or out_of_range or canaries)",
        ("t-label-unchecked", "in_range = (label >= 0) & (label < columns)", "in_range = label == label"),
        (
            "t-label-cast-before-check",
            "tl.load(targets + row).to(tl.int64)",
            "tl.load(targets + row).to(tl.int32).to(tl.int64)",
        ),
        ("t-negative-label", "in_range = (label >= 0) & (label < columns)", "in_range = label < columns"),
    ),
    *mutants(
        "NaN swallowed by a maximum",
        ROW_MATH,
        "numerics",
        "triton and poisoned_row_is_nan_alone",
        (
            "t-nan-swallowed",
            "tl.maximum(y, SHIFT_FLOOR, propagate_nan=tl.PropagateNan.ALL)",
            "tl.where(y > SHIFT_FLOOR, y, SHIFT_FLOOR)",
        ),
    ),
    *mutants(
        "grad_output[0] only",
        BACKWARD,
        "autograd layouts",
        "triton and (gradient_per_row or strides_of)",
        ("t-first-gradient-for-all", "grad_terms + row * row_stride.to(tl.int64)", "grad_terms + row * 0"),
        ("t-contiguous-gradient", "place + SCED * term_stride", "place + SCED"),
    ),
    *mutants(
        "maxima combined wrongly",
        FORWARD,
        "numerics triton_kernels",
        "triton and (distributions or widest or tied_maxima or order_of_the_columns or shared or splits or flush)",
        ("t-old-maximum-forgotten", 'tl.where(maximum > float("-inf"), one_lane, 0.0)', "one_lane * 0.0"),
        ("t-sums-not-shifted", "sums64 = row_math.shift_sums(sums64, delta, VARIANT)", "sums64 = sums64"),
        (
            "t-new-sums-not-shifted",
            "row_math.add_top(sums, readmitted, VARIANT), delta, VARIANT)",
            "row_math.add_top(sums, readmitted, VARIANT), delta * 0, VARIANT)",
        ),
        (
            "t-splits-lose-their-maxima",
            '(maxima > float("-inf")) & (split != winner), 1.0, 0.0)',
            "split < 0, 1.0, 0.0)",
        ),
        (
            "t-last-split-wins",
            "tl.min(tl.where(maxima == maximum, split, MAX_SPLITS))",
            "tl.max(tl.where(maxima == maximum, split, 0))",
        ),
        (
            "t-arg-max-counted",
            "parts = rows.without_column(parts, argmax, start, TILE)\n                readmitted",
            "readmitted",
        ),
    ),
    *mutants(
        "a whole row summed in float32",
        TILING,
        "triton_kernels",
        "triton and one_warp",
        ("t-never-flushed", "FLUSH_TILES = 16", "FLUSH_TILES = 2**20"),
    ),
    *mutants(
        "gradient zero, flipped or halved",
        BACKWARD,
        "numerics",
        "triton and (many_rows or vocabularies or widths)",
        ("t-sced-gradient-zero", "gradient = p * (inner + slope)", "gradient = p * (inner + 0 * slope)"),
        ("t-top-column-general", "tl.where(rows.is_at(argmax, start, part, TILE), top, value)", "value"),
        ("t-label-column-general", "parts[part] - grad_ce, parts[part])", "parts[part], parts[part])"),
    ),
    *mutants(
        "a kernel for each value of a number",
        BACKWARD,
        "triton_launches",
        "",
        ("t-strides-specialized", '"inner_rows", *STRIDES, "vocab_size"', '"inner_rows", "vocab_size"'),
    ),
    *mutants(
        "a kernel for each value of a number",
        SELECT,
        "triton_launches",
        "",
        ("t-topk-spec-specialized", '*("scale_bits", "k_min", "k_max"),', '"scale_bits",'),
    ),
    *mutants(
        "strides assumed",
        LAUNCHES,
        "triton_launches",
        "",
        ("t-gradient-lies-like-the-logits", "(*call.strides, *row_strides(out), ", "(*call.strides, *call.strides, "),
    ),
]
