// What crosses the boundary between Python and the kernels: one plain struct of pointers, sizes and
// strides, and the order of the columns that the kernels write.  No torch header anywhere in csrc/.
#pragma once

#include <cstdint>

// Host and device, and always inlined: the CPU kernels are compiled once per instruction set, and
// an out-of-line copy of a shared function would be merged across them by the linker.
#if defined(__CUDACC__)
#define CAREF_HD __host__ __device__ __forceinline__
#else
#define CAREF_HD inline __attribute__((always_inline))
#endif
#define CAREF_INLINE __attribute__((always_inline))  // for lambdas

namespace caref {

enum class DType : int32_t {
  kNone = 0,  // no targets: every row counts
  kFloat32 = 1,
  kFloat64 = 2,
  kBFloat16 = 3,
  kFloat16 = 4,
  kInt32 = 5,
  kInt64 = 6,
  kBool = 7,  // a mask of the rows that count, one byte each
};

// Columns of the row terms, (N, 3); twins of objective.TERMS.
enum Term : int { kCe = 0, kSced = 1, kKl = 2, kNumTerms = 3 };

// Columns of the row statistics, (N, 5); twins of objective.STATISTICS.  The maximum m, its first
// column a, r = sum over v != a of exp(z_v - m), ybar = sum p (z - m), G = sum over v != a of p f'.
enum Statistic : int {
  kMaximum = 0,
  kArgmax = 1,
  kResidual = 2,
  kMeanShift = 3,
  kSlopeSum = 4,
  kNumStatistics = 5
};

// Further columns of rows with a mask, (N, 8) in all; twins of objective.MASK_STATISTICS.  k, the
// k-th largest logit, and (k - n_gt) / n_eq.
enum MaskStatistic : int {
  kSupport = kNumStatistics + 0,
  kThreshold = kNumStatistics + 1,
  kTieWeight = kNumStatistics + 2,
  kNumMaskedStatistics = kNumStatistics + 3
};

// Row i of the N = outer_rows * inner_rows rows lies at
//   (i / inner_rows) * outer_stride + (i % inner_rows) * inner_stride   elements from `logits`,
// its columns next to one another.  Terms and statistics are contiguous, in float (double for
// double logits).  grad_logits may be the logits themselves.
struct RowParams {
  const void* logits = nullptr;
  DType logits_dtype = DType::kFloat32;
  int64_t outer_rows = 0;
  int64_t inner_rows = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  int64_t columns = 0;

  const void* targets = nullptr;
  DType targets_dtype = DType::kNone;
  int64_t ignore_index = -100;

  double alpha = 2.0;
  double beta = 1.0;
  int64_t vocab_size = 0;
  bool with_sced = true;
  // k = ceil(k_scale exp(H)) clipped to [k_min, k_max], which are in [1, columns]; k_min = 0 for no
  // mask.
  double k_scale = 0.0;
  int64_t k_min = 0;
  int64_t k_max = 0;

  void* terms = nullptr;
  void* stats = nullptr;

  const void* grad_terms = nullptr;
  int64_t grad_row_stride = 0;
  int64_t grad_term_stride = 0;
  void* grad_logits = nullptr;
  int64_t out_outer_stride = 0;
  int64_t out_inner_stride = 0;

  int32_t threads = 1;

  CAREF_HD bool is_masked() const { return k_min > 0; }
  CAREF_HD int64_t num_statistics() const {
    return is_masked() ? int64_t{kNumMaskedStatistics} : int64_t{kNumStatistics};
  }
  CAREF_HD int64_t rows() const { return outer_rows * inner_rows; }
  CAREF_HD int64_t logits_offset(int64_t row) const {
    return (row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride;
  }
  CAREF_HD int64_t out_offset(int64_t row) const {
    return (row / inner_rows) * out_outer_stride + (row % inner_rows) * out_inner_stride;
  }
};

}  // namespace caref
