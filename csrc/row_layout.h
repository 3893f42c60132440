// The interface between Python and the kernels: one plain struct of pointers, sizes and strides,
// and the order of the columns that the kernels write.  No file in csrc/ includes a torch header,
// so one build works with every version of torch.
#pragma once

#include <cstdint>

// Shared functions run on host and device and are always inlined.  The CPU kernels are compiled
// once per instruction set, and the linker would keep a single out-of-line copy for all of them,
// which might use instructions that the machine does not have.
#if defined(__CUDACC__)
#define CAREF_UNROLL _Pragma("unroll")
#else
#define CAREF_UNROLL _Pragma("GCC unroll 16")
#endif
#if defined(__CUDACC__)
#define CAREF_HD __host__ __device__ __forceinline__
#else
#define CAREF_HD inline __attribute__((always_inline))
#endif
#define CAREF_INLINE __attribute__((always_inline))  // for lambdas

namespace caref {

enum class DType : int32_t {
  kNone = 0,  // no targets: every row is valid
  kFloat32 = 1,
  kFloat64 = 2,
  kBFloat16 = 3,
  kFloat16 = 4,
  kInt32 = 5,
  kInt64 = 6,
  kBool = 7,  // a valid mask: one byte per row, 0 leaves the row out
};

// Columns of the row terms, (N, 3); counterparts of objective.TERMS.  With label smoothing there is
// a further one, kMeanOfShifts: the mean over all columns of z - m, not weighted by p.
enum Term : int { kCe = 0, kSced = 1, kKl = 2, kNumTerms = 3, kMeanOfShifts = 3 };

// Columns of grad_terms after those of the terms, if has_column_grads: the factor of p_v and a
// constant of every column; counterparts of the last two of objective.column_grads.
enum Grad : int { kFactor = kNumTerms + 0, kConstant = kNumTerms + 1 };

// Columns of the row statistics, (N, 5); counterparts of objective.STATISTICS: the maximum m, the
// first column a that holds it, r = sum over v != a of exp(z_v - m), ybar = sum p (z - m), and G =
// sum over v != a of p f'.
enum Statistic : int {
  kMaximum = 0,
  kArgmax = 1,
  kResidual = 2,
  kMeanShift = 3,
  kSlopeSum = 4,
  kNumStatistics = 5
};

// Additional columns when SCED has a top-k mask, (N, 8) in all; counterparts of the additional
// statistics in objective.py: the number k of kept tokens, the k-th largest logit, and the weight
// (k - n_gt) / n_eq of each column that equals it.
enum TopKStatistic : int {
  kNumKept = kNumStatistics + 0,
  kThreshold = kNumStatistics + 1,
  kTieWeight = kNumStatistics + 2,
  kNumTopKStatistics = kNumStatistics + 3
};

// Row i of the N = outer_rows * inner_rows rows starts
//   (i / inner_rows) * outer_stride + (i % inner_rows) * inner_stride
// elements after `logits`, and its columns are contiguous.  Terms and statistics are contiguous, in
// float (double for double logits).  grad_logits may alias logits.
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
  // Top-k mask: k = ceil(k_scale exp(H)) clipped to [k_min, k_max], both in [1, columns]. k_min = 0
  // means that there is no mask.
  double k_scale = 0.0;
  int64_t k_min = 0;
  int64_t k_max = 0;

  void* terms = nullptr;
  bool with_mean_of_shifts = false;  // the terms have the column kMeanOfShifts, CPU only
  void* stats = nullptr;

  const void* grad_terms = nullptr;
  int64_t grad_row_stride = 0;
  int64_t grad_term_stride = 0;
  bool has_column_grads = false;  // grad_terms has five columns, see Grad
  void* grad_logits = nullptr;
  int64_t out_outer_stride = 0;
  int64_t out_inner_stride = 0;

  int32_t threads = 1;

  CAREF_HD bool has_topk_mask() const { return k_min > 0; }
  CAREF_HD int64_t num_statistics() const {
    return has_topk_mask() ? int64_t{kNumTopKStatistics} : int64_t{kNumStatistics};
  }
  CAREF_HD int64_t num_terms() const { return kNumTerms + with_mean_of_shifts; }
  CAREF_HD int64_t rows() const { return outer_rows * inner_rows; }
  CAREF_HD int64_t logits_offset(int64_t row) const {
    return (row / inner_rows) * outer_stride + (row % inner_rows) * inner_stride;
  }
  CAREF_HD int64_t out_offset(int64_t row) const {
    return (row / inner_rows) * out_outer_stride + (row % inner_rows) * out_inner_stride;
  }
};

}  // namespace caref
