"""Mutants of the CUDA kernels; their tests compile the mutated sources for the emulated device themselves."""

from __future__ import annotations

from .patches import mutants

FORWARD = "csrc/cuda/forward.cu"
BACKWARD = "csrc/cuda/backward.cu"
LAUNCH = "csrc/cuda/launch.cu"
REDUCE = "csrc/cuda/reduce.cuh"
SPLITS = "csrc/cuda/splits.cuh"
STORAGE = "csrc/cuda/storage.cuh"
KEYS = "csrc/cuda/keys.cuh"
SELECT = "csrc/cuda/select.cuh"
MASK = "csrc/cuda/select.cu"
ROW_SUMS = "csrc/cuda/row_sums.cuh"

CUDA = [
    *mutants(
        "maxima combined wrongly",
        FORWARD,
        "cuda_kernels",
        "shared_rows",
        ("g-blocks-lose-their-maxima", "own.raise(part[0] - top.value);", "{}"),
        ("g-column-within-the-split", "partial[1] = block.begin + argmax;", "partial[1] = argmax;"),
        ("g-second-pass-counts-the-top", "i == top ? T(0) : exponential(y)", "i == top - 99 ? T(0) : exponential(y)"),
    ),
    *mutants(
        "the arg-max column in r",
        ROW_SUMS,
        "numerics",
        "cuda-emulated and (distributions or widest or tied_maxima)",
        ("g-top-counted-in-residual", "shared.columns[column] = S::narrow(-kInfinity);", ""),
    ),
    *mutants(
        "a tie decided by another column",
        REDUCE,
        "cuda_kernels",
        "shared_rows",
        ("g-last-vector-wins", "other_vector < vector", "other_vector > vector"),
    ),
    *mutants(
        "gradient zero, or the general form where it does not hold",
        BACKWARD,
        "numerics",
        "cuda-emulated and (many_rows or vocabularies or widths)",
        (
            "g-sced-gradient-zero",
            "inner += weighted_sced<Kind>(z, row) *",
            "inner += 0 * weighted_sced<Kind>(z, row) *",
        ),
        ("g-two-columns-not-written", "if (column >= 0) out.store_one", "if (column < -1) out.store_one"),
    ),
    *mutants(
        "NaN swallowed by a maximum",
        BACKWARD,
        "numerics",
        "cuda-emulated and poisoned_row_is_nan_alone",
        ("g-unusable-row-is-zero", "mode == kZero ? 0.0 : kNan", "0.0"),
    ),
    *mutants(
        "16-byte loads of misaligned rows",
        STORAGE,
        "cuda_kernels",
        "misaligned",
        (
            "g-misaligned-load",
            "% kVectorBytes == 0 ? columns / S::kWidth : 0) {} __device__ __forceinline__ int vectors()",
            "% kVectorBytes < 99 ? columns / S::kWidth : 0) {} __device__ __forceinline__ int vectors()",
        ),
    ),
    *mutants(
        "rows beyond the blocks of a launch",
        SPLITS,
        "cuda_kernels",
        "more_rows",
        ("g-first-row-forgotten", "row(splits.first_row + blockIdx.x", "row(blockIdx.x"),
    ),
    *mutants(
        "too much shared memory",
        LAUNCH,
        "cuda_kernels",
        "shared_rows",
        ("g-nothing-reserved", "kReservedBytes = 3 * 1024", "kReservedBytes = -64 * 1024"),
    ),
    *mutants(
        "a wrong threshold or count",
        SELECT,
        "cuda_selection",
        "exact or short",
        ("g-last-digit-skipped", "} while (bits > 0);", "} while (bits > kDigitBits);"),
        ("g-rank-not-lowered", "rank -= shared.found[kAboveBin];", ""),
        (
            "g-tail-counted-as-keys",
            "kZeroKey<Element> - (S::kInfinityBits - 1);",
            "kZeroKey<Element> - S::kInfinityBits;",
        ),
        ("g-top-not-a-key", "if (threadIdx.x == 0 && top >= base) count(top);", "if (rank < 0) count(top);"),
        (
            "g-bracket-for-any-k",
            "return k <= threads && key > kLowestKey",
            "return k <= 2 * threads && key > kLowestKey",
        ),
        ("g-overflow-unnoticed", "is_listed_ = shared.overflow[0] == 0;", "is_listed_ = shared.overflow[0] >= 0;"),
        (
            "g-top-listed-too",
            "index * S::kWidth + k == argmax_) continue;",
            "index * S::kWidth + k == -1 - argmax_) continue;",
        ),
        (
            "g-flushed-bound-believed",
            "fabs(value) < kMinNormal ? subnormal : value",
            "subnormal == 0 ? subnormal : value",
        ),
    ),
    *mutants(
        "shared memory used before a barrier",
        SELECT,
        "cuda_selection",
        "exact or short",
        ("g-histogram-not-clear", "__syncthreads();  // the histogram is clear", ""),
        ("g-histogram-not-complete", "__syncthreads();  // the histogram is complete", ""),
    ),
    *mutants(
        "keys that do not order the values",
        KEYS,
        "cuda_selection",
        "exact or short",
        ("g-zeros-differ", "bits & kZero ? kZero - magnitude :", "bits & kZero ? kZero - 1 - magnitude :"),
    ),
    *mutants(
        "ties broken another way; the weight of the arg-max in the top-k mask",
        MASK,
        "cuda_selection",
        "exact or short or terms or subnormal",
        ("g-tie-weight-one", "static_cast<double>(found.num_kept - found.above) / found.equal;", "1.0;"),
        ("g-ties-not-summed", "if (tied > 0) {", "if (tied < 0) {"),
        ("g-top-counts-as-tied", "const int tied = found.equal - is_top_tied;", "const int tied = found.equal;"),
        ("g-top-always-whole", "top > found.threshold ? 1.0 : is_top_tied ? tie_weight : 0.0;", "1.0;"),
        ("g-topk-slopes-dropped", "sum[1] += static_cast<double>(slope_);", ""),
        ("g-flushed-maximum-stored", "stats[kMaximum] = S::widen(element_of<Element>(top));", ""),
    ),
    *mutants(
        "columns outside the top-k mask counted in the backward, or ties counted whole",
        BACKWARD,
        "cuda_selection",
        "terms or subnormal",
        (
            "g-backward-without-topk-mask",
            "return key > row.threshold ? row.sced : tied;",
            "return key > 0 ? row.sced : tied;",
        ),
        ("g-backward-ties-whole", "static_cast<T>(row.grad_sced * mask.tie_weight)", "static_cast<T>(row.grad_sced)"),
        (
            "g-label-without-topk-mask",
            "label_weight = TopKMask(params, block.row).weight(logit);",
            "label_weight = 1.0;",
        ),
        ("g-top-slope-without-topk-mask", "row.top_slope *= mask.weight(row.maximum);", ""),
    ),
]
