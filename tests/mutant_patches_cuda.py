"""Mutants of the CUDA kernels: as mutant_patches.py, tested on the emulated device, which compiles them itself."""

from __future__ import annotations

from mutant_patches import mutants

FORWARD = "csrc/cuda/forward.cu"
BACKWARD = "csrc/cuda/backward.cu"
LAUNCH = "csrc/cuda/launch.cu"
REDUCE = "csrc/cuda/reduce.cuh"
SLICES = "csrc/cuda/slices.cuh"
STORAGE = "csrc/cuda/storage.cuh"

CUDA = [
    *mutants(
        "a wrong merge of maxima",
        FORWARD,
        "cuda_kernels",
        "shared_rows",
        ("g-blocks-lose-their-maxima", "own.raise(part[0] - top.value);", ";"),
        ("g-column-within-the-slice", "partial[1] = place.begin + argmax;", "partial[1] = argmax;"),
        ("g-second-pass-counts-the-top", "i == top ? T(0) : exponential(y)", "i == top - 99 ? T(0) : exponential(y)"),
    ),
    *mutants(
        "the arg-max column in r",
        FORWARD,
        "numerics",
        "cuda-emulated and (N02 or N21)",
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
        "cuda-emulated and N01",
        ("g-sced-gradient-zero", "inner += row.sced * even_slope", "inner += 0 * row.sced * even_slope"),
        ("g-two-columns-not-written", "if (column >= 0) out.store_one", "if (column < -1) out.store_one"),
    ),
    *mutants(
        "NaN swallowed by a maximum",
        BACKWARD,
        "numerics",
        "cuda-emulated and N10",
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
        SLICES,
        "cuda_kernels",
        "more_rows",
        ("g-first-row-forgotten", "row(slices.first_row + blockIdx.x", "row(blockIdx.x"),
    ),
    *mutants(
        "too much shared memory",
        LAUNCH,
        "cuda_kernels",
        "shared_rows",
        ("g-nothing-reserved", "kReservedBytes = 3 * 1024", "kReservedBytes = -64 * 1024"),
    ),
]
