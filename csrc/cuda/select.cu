// SCED over the top k of rows, with one block per row.  k follows from the entropy, so the sums of
// the whole row are needed first.  If the row fits into shared memory, the same launch computes
// them and reads the row from memory once; otherwise they come from the statistics that the dense
// kernels have written (forward.cu).  Then the threshold is selected (select.cuh), and the columns
// above it are summed.
//
// This file is compiled once per storage type, which is the macro CAREF_STORAGE.
#include "select.cuh"

namespace caref::cuda {
namespace {

// Vectors per thread that are sampled for the bracket of a row that does not fit into shared
// memory.
constexpr int kSampledVectors = 16;
// Columns that a thread sums in float32 before it adds the sums in double.
constexpr int kFlushColumns = 256;

// The sums of f and of p f' of one thread.
template <typename Kind>
class TopKSums {
 public:
  __device__ TopKSums(const RowParams& params, const TopKMemory& shared)
      : maximum_(shared.constants[kTopValue]),
        inverse_d_(shared.constants[kInverseD]),
        c_(shared.constants[kOffset]),
        exponents_(Kind::exponents(params)) {}

  __device__ __forceinline__ void add(T z) {
    const T y = clamp_shift(z - maximum_);
    const T p = exponential(y) * inverse_d_;
    const T log_ratio = y - c_, q = 1 - p;
    density_ += sced_density(p, log_ratio, q, exponents_);
    if constexpr (Kind::kOnePass) {
      slope_ += p * even_slope<Kind::Sums::kAlpha, Kind::Sums::kBeta>(p, log_ratio);
    } else {
      slope_ += p * sced_slope<T>(p, log_ratio, q, exponents_) / q;
    }
    if (++count_ == kFlushColumns) flush();
  }

  __device__ __forceinline__ void flush() {
    sum[0] += static_cast<double>(density_);
    sum[1] += static_cast<double>(slope_);
    density_ = slope_ = 0;
    count_ = 0;
  }

  double sum[kScedSums] = {};

 private:
  T maximum_, inverse_d_, c_;
  Exponents exponents_;
  T density_ = 0, slope_ = 0;
  int count_ = 0;
};

// The first pass over a row that fits into shared memory.  Afterwards the row is there without its
// arg-max column, its terms and statistics except SCED are written, and the maxima are recorded.
__device__ void sum_row(const RowParams& params, int64_t row, const Target& target,
                        const Element* logits, const RowChunk<S>& chunk, const TopKMemory& shared) {
  const Top<T> own = fetch(chunk, shared.row);
  note_maxima(own.value, shared);
  const Top<T> top = block_top(own, shared.top_values, shared.top_vectors);
  const bool has_top = top.value > -kInfinity;
  if (has_top && threadIdx.x == top.vector % blockDim.x) exclude_argmax(top, shared);
  const T reference = reference_of(top.value);
  ThreadSums<NoSced> sums;
  for (int i = threadIdx.x; i < chunk.vectors(); i += blockDim.x) {
    const Vector vector = shared.row[i];
    const auto z = S::unpack(vector);
    CAREF_UNROLL
    for (int k = 0; k < S::kWidth; ++k) sums.add(z.at[k] - reference);
  }
  block_sums(sums.sum, shared.sums, shared.totals);
  if (threadIdx.x != 0) return;
  const int argmax = has_top ? static_cast<int>(shared.flags[kTopColumn]) : 0;
  const T label_logit = target.has_label ? S::widen(logits[target.label]) : T(0);
  row_result<NoSced>(params, target, shared.totals, top.value, argmax, label_logit)
      .write(params, row);
}

// Records the maxima of a sample of each thread's columns, for a row that does not fit.
__device__ void sample_row(const RowChunk<S>& chunk, const TopKMemory& shared) {
  const int threads = blockDim.x, vectors = chunk.vectors();
  const int stride = vectors / (threads * kSampledVectors) + 1;
  T largest = static_cast<T>(-kInfinity);
  for (int first = 0; first < kSampledVectors; first += kBatch) {
    CAREF_UNROLL
    for (int i = first; i < first + kBatch; ++i) {
      const int index = i * stride * threads + static_cast<int>(threadIdx.x);
      if (index >= vectors) continue;
      const T other =
          S::maximum(index < chunk.whole() ? chunk.load_whole(index) : chunk.load(index));
      if (other > largest) largest = other;
    }
  }
  note_maxima(largest, shared);
}

// Thread 0 provides what its block needs of the softmax of the row.  The statistics are not
// trusted: a row whose residual is NaN or whose arg-max is out of range has no top-k mask.
__device__ void set_up(const RowParams& params, int64_t row, const TopKMemory& shared) {
  const T* stats = static_cast<const T*>(params.stats) + row * kNumTopKStatistics;
  const T residual = stats[kResidual], argmax = stats[kArgmax];
  shared.flags[kHasTopKMask] = residual == residual && argmax >= 0 && argmax < T(params.columns);
  if (!shared.flags[kHasTopKMask]) return;
  const RowConstants<T> constants(residual, static_cast<double>(params.vocab_size));
  const double nats = entropy(residual, stats[kMeanShift]);
  shared.flags[kTopColumn] = static_cast<int>(argmax);
  shared.flags[kNumWanted] =
      static_cast<int>(row_num_kept(nats, params.k_scale, params.k_min, params.k_max));
  shared.constants[kInverseD] = static_cast<T>(constants.p_top);
  shared.constants[kOffset] = static_cast<T>(constants.c);
  shared.constants[kTopValue] = stats[kMaximum];
}

// Writes SCED and the top-k mask of a row, from the sums over the columns above the threshold.  The
// columns that equal the threshold all have the same value, and the arg-max column has its own
// form.
template <typename Kind>
__device__ void write_topk_mask(const RowParams& params, int64_t row, const Selection& found,
                                Key top, double density, double slope) {
  T* stats = static_cast<T*>(params.stats) + row * kNumTopKStatistics;
  const T stored = stats[kResidual];
  const RowConstants<T> constants(stored, static_cast<double>(params.vocab_size));
  const Exponents exponents = Kind::exponents(params);
  const bool is_top_tied = top == found.threshold;
  const double tie_weight = static_cast<double>(found.num_kept - found.above) / found.equal;
  const double top_weight = top > found.threshold ? 1.0 : is_top_tied ? tie_weight : 0.0;
  const T threshold = S::widen(element_of<Element>(found.threshold));
  double sced = 0.0;
  if (is_one_hot(stored)) {
    slope = 0.0;
    if (params.beta == 0.0) sced = power(Ops<double>::absolute(constants.c), exponents.alpha);
  } else {
    const int tied = found.equal - is_top_tied;
    if (tied > 0) {
      const double y = static_cast<double>(threshold) - static_cast<double>(stats[kMaximum]);
      const double p = exp(y) / constants.d, q = 1.0 - p, log_ratio = y - constants.c;
      const double tied_weight = tie_weight * tied;
      density += tied_weight * sced_density(p, log_ratio, q, exponents);
      slope += tied_weight * p * sced_slope<double>(p, log_ratio, q, exponents) / q;
    }
    sced = density +
           top_weight * sced_density(constants.p_top, -constants.c, constants.q_top, exponents);
  }
  static_cast<T*>(params.terms)[row * kNumTerms + kSced] = static_cast<T>(sced);
  stats[kSlopeSum] = static_cast<T>(slope);
  stats[kNumKept] = static_cast<T>(found.num_kept);
  stats[kThreshold] = threshold;
  stats[kTieWeight] = static_cast<T>(tie_weight);
  // Store the maximum exactly: with -ftz a subnormal maximum may have become 0, and the backward
  // compares it with the threshold.
  stats[kMaximum] = S::widen(element_of<Element>(top));
}

template <typename Kind, typename Row>
__device__ __forceinline__ void topk_row(const RowParams& params, int64_t row_index, Row& row,
                                         const Element* logits, const TopKMemory& shared) {
  const int k = shared.flags[kNumWanted];
  const Key top = key_of(logits[static_cast<int>(shared.flags[kTopColumn])]);
  const Key high = key_of_bound(shared.constants[kTopValue], kMinNormal);
  const Selection found = select_top(row, shared, least_key(shared, k), high, top, k);
  TopKSums<Kind> sums(params, shared);
  if (found.above > (top > found.threshold)) {
    row.visit(found.threshold + 1, [&](Key key) { sums.add(S::widen(element_of<Element>(key))); });
  }
  sums.flush();
  block_sums(sums.sum, shared.sums, shared.totals);
  if (threadIdx.x != 0) return;
  write_topk_mask<Kind>(params, row_index, found, top, shared.totals[0], shared.totals[1]);
}

// One block per row.  kFits says whether the row fits into shared memory.
template <typename Kind, bool kFits>
__global__ void __launch_bounds__(kTopKThreads, (kTopKBlocks<T, Kind>))
    topk_kernel(const RowParams params, const Splits splits, const int depth) {
  CAREF_DYNAMIC_SHARED(memory);
  const TopKMemory shared(memory);
  const int64_t row = splits.first_row + blockIdx.x;
  const Target target = target_of(params, row);
  if (!target.is_valid || is_outside(target, params.columns)) {
    const double value = target.is_valid ? kNan : 0.0;
    if (kFits && threadIdx.x == 0) RowResult<T>(value).write(params, row);
    return;
  }
  const Element* logits = static_cast<const Element*>(params.logits) + params.logits_offset(row);
  const RowChunk<S> chunk(logits, static_cast<int>(params.columns));
  if constexpr (kFits) {
    sum_row(params, row, target, logits, chunk, shared);
  } else {
    sample_row(chunk, shared);
  }
  if (threadIdx.x == 0) set_up(params, row, shared);
  __syncthreads();  // the constants and the maxima are written
  if (!shared.flags[kHasTopKMask]) return;
  if constexpr (kFits) {
    KeptRow keys(shared, chunk.vectors());
    topk_row<Kind>(params, row, keys, logits, shared);
  } else {
    ListedRow keys(shared, chunk, shared.flags[kTopColumn], depth);
    topk_row<Kind>(params, row, keys, logits, shared);
  }
}

}  // namespace

template <>
Status topk_of<S>(const RowParams& params, const TopKLaunchConfig& config,
                  const Resources& resources) {
  Launches launches(resources.stream, config.blocks);
  visit_topk_kinds(params, [&](auto kind) {
    using Kind = decltype(kind);
    if (config.row_fits) {
      const int bytes = TopKMemory::kRow + config.blocks.chunk_bytes(sizeof(Element));
      launches.each_split("topk_kernel", topk_kernel<Kind, true>, bytes, params, 0);
    } else {
      const int bytes = TopKMemory::kRow + config.depth * config.blocks.threads * int{sizeof(Bits)};
      launches.each_split("topk_kernel", topk_kernel<Kind, false>, bytes, params, config.depth);
    }
  });
  return launches.status();
}

}  // namespace caref::cuda
