// SCED over the top k of rows, a block for each row.  The budget follows from the entropy, so what
// comes first are the sums of the whole row: in the same launch if the row fits into shared memory,
// which it then is read into once, or from the statistics that the dense kernels have left
// (forward.cu).  Then the threshold (select.cuh), and the sums of the columns above it.
//
// Compiled once per storage type, which is the macro CAREF_STORAGE.
#include "select.cuh"

namespace caref::cuda {
namespace {

// Vectors of a thread that are looked at for the bracket of a row that does not fit.
constexpr int kSampledVectors = 16;
// Columns that a thread sums in float32.
constexpr int kFoldedColumns = 256;

// sum f and sum p f' of one thread.
template <typename Kind>
class MaskedSums {
 public:
  __device__ MaskedSums(const RowParams& params, const MaskMemory& shared)
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
    if (++count_ == kFoldedColumns) fold();
  }

  __device__ __forceinline__ void fold() {
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

// The first look at a row that fits: it is in shared memory then, without its arg-max column, its
// terms and statistics but for SCED are written, and the maxima noted.
__device__ void sum_row(const RowParams& params, int64_t row, const Target& target,
                        const Element* logits, const Share<S>& share, const MaskMemory& shared) {
  const Top<T> own = fetch(share, shared.row);
  note_maxima(own.value, shared);
  const Top<T> top = block_top(own, shared.top_values, shared.top_vectors);
  const bool has_top = top.value > -kInfinity;
  if (has_top && threadIdx.x == top.vector % blockDim.x) take_out(top, shared);
  const T reference = reference_of(top.value);
  ThreadSums<NoSced> sums;
  for (int i = threadIdx.x; i < share.vectors(); i += blockDim.x) {
    const Vector vector = shared.row[i];
    const auto z = S::unpack(vector);
    CAREF_UNROLL
    for (int k = 0; k < S::kWidth; ++k) sums.add(z.at[k] - reference);
  }
  block_sums(sums.sum, shared.sums, shared.totals);
  if (threadIdx.x != 0) return;
  const int argmax = has_top ? static_cast<int>(shared.flags[kTopColumn]) : 0;
  const T label_logit = target.has_label ? S::widen(logits[target.label]) : T(0);
  finish<NoSced>(params, target, shared.totals, top.value, argmax, label_logit).write(params, row);
}

// The maxima of a row that does not fit: of some of each thread's columns.
__device__ void sample_row(const Share<S>& share, const MaskMemory& shared) {
  const int threads = blockDim.x, vectors = share.vectors();
  const int stride = vectors / (threads * kSampledVectors) + 1;
  T largest = static_cast<T>(-kInfinity);
  for (int first = 0; first < kSampledVectors; first += kBatch) {
    CAREF_UNROLL
    for (int i = first; i < first + kBatch; ++i) {
      const int index = i * stride * threads + static_cast<int>(threadIdx.x);
      if (index >= vectors) continue;
      const T other =
          S::maximum(index < share.whole() ? share.load_whole(index) : share.load(index));
      if (other > largest) largest = other;
    }
  }
  note_maxima(largest, shared);
}

// What a block needs of the softmax of its row, by thread 0; the statistics are data, and checked.
__device__ void set_up(const RowParams& params, int64_t row, const MaskMemory& shared) {
  const T* stats = static_cast<const T*>(params.stats) + row * kNumMaskedStatistics;
  const T residual = stats[kResidual], argmax = stats[kArgmax];
  shared.flags[kHasMask] = residual == residual && argmax >= 0 && argmax < T(params.columns);
  if (!shared.flags[kHasMask]) return;
  const RowConstants<T> constants(residual, static_cast<double>(params.vocab_size));
  const double nats = entropy(residual, stats[kMeanShift]);
  shared.flags[kTopColumn] = static_cast<int>(argmax);
  shared.flags[kBudget] =
      static_cast<int>(row_support(nats, params.k_scale, params.k_min, params.k_max));
  shared.constants[kInverseD] = static_cast<T>(constants.p_top);
  shared.constants[kOffset] = static_cast<T>(constants.c);
  shared.constants[kTopValue] = stats[kMaximum];
}

// SCED and the mask of a row, from the sums over the columns above the threshold; the columns at it
// are alike, and the arg-max column has its own form.
template <typename Kind>
__device__ void write_mask(const RowParams& params, int64_t row, const Selection& found, Key top,
                           double density, double slope) {
  T* stats = static_cast<T*>(params.stats) + row * kNumMaskedStatistics;
  const T stored = stats[kResidual];
  const RowConstants<T> constants(stored, static_cast<double>(params.vocab_size));
  const Exponents exponents = Kind::exponents(params);
  const bool is_top_tied = top == found.threshold;
  const double tie_weight = static_cast<double>(found.support - found.above) / found.equal;
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
      const double share = tie_weight * tied;
      density += share * sced_density(p, log_ratio, q, exponents);
      slope += share * p * sced_slope<double>(p, log_ratio, q, exponents) / q;
    }
    sced = density +
           top_weight * sced_density(constants.p_top, -constants.c, constants.q_top, exponents);
  }
  static_cast<T*>(params.terms)[row * kNumTerms + kSced] = static_cast<T>(sced);
  stats[kSlopeSum] = static_cast<T>(slope);
  stats[kSupport] = static_cast<T>(found.support);
  stats[kThreshold] = threshold;
  stats[kTieWeight] = static_cast<T>(tie_weight);
  // Exactly: a subnormal maximum has been read as 0, and the backward compares it.
  stats[kMaximum] = S::widen(element_of<Element>(top));
}

template <typename Kind, typename Row>
__device__ __forceinline__ void mask_row(const RowParams& params, int64_t row_index, Row& row,
                                         const Element* logits, const MaskMemory& shared) {
  const int k = shared.flags[kBudget];
  const Key top = key_of(logits[static_cast<int>(shared.flags[kTopColumn])]);
  const Key high = key_of_bound(shared.constants[kTopValue], kLeastNormal);
  const Selection found = select_top(row, shared, least_key(shared, k), high, top, k);
  MaskedSums<Kind> sums(params, shared);
  if (found.above > (top > found.threshold)) {
    row.visit(found.threshold + 1, [&](Key key) { sums.add(S::widen(element_of<Element>(key))); });
  }
  sums.fold();
  block_sums(sums.sum, shared.sums, shared.totals);
  if (threadIdx.x != 0) return;
  write_mask<Kind>(params, row_index, found, top, shared.totals[0], shared.totals[1]);
}

// A block for each row, which fits into shared memory or not.
template <typename Kind, bool kFits>
__global__ void __launch_bounds__(kMaskThreads, (kMaskBlocks<T, Kind>))
    mask_kernel(const RowParams params, const Slices slices, const int depth) {
  CAREF_DYNAMIC_SHARED(memory);
  const MaskMemory shared(memory);
  const int64_t row = slices.first_row + blockIdx.x;
  const Target target = target_of(params, row);
  if (!target.counts || is_outside(target, params.columns)) {
    const double value = target.counts ? kNan : 0.0;
    if (kFits && threadIdx.x == 0) RowResult<T>(value).write(params, row);
    return;
  }
  const Element* logits = static_cast<const Element*>(params.logits) + params.logits_offset(row);
  const Share<S> share(logits, static_cast<int>(params.columns));
  if constexpr (kFits) {
    sum_row(params, row, target, logits, share, shared);
  } else {
    sample_row(share, shared);
  }
  if (threadIdx.x == 0) set_up(params, row, shared);
  __syncthreads();  // the constants and the maxima are there
  if (!shared.flags[kHasMask]) return;
  if constexpr (kFits) {
    KeptRow keys(shared, share.vectors());
    mask_row<Kind>(params, row, keys, logits, shared);
  } else {
    ListedRow keys(shared, share, shared.flags[kTopColumn], depth);
    mask_row<Kind>(params, row, keys, logits, shared);
  }
}

}  // namespace

template <>
Status mask_of<S>(const RowParams& params, const MaskPlan& plan, const Resources& resources) {
  Launches launches(resources.stream, plan.blocks);
  visit_masked_kinds(params, [&](auto kind) {
    using Kind = decltype(kind);
    if (plan.row_fits) {
      const int bytes = MaskMemory::kRow + plan.blocks.share_bytes(sizeof(Element));
      launches.each_slice("mask_kernel", mask_kernel<Kind, true>, bytes, params, 0);
    } else {
      const int bytes = MaskMemory::kRow + plan.depth * plan.blocks.threads * int{sizeof(Bits)};
      launches.each_slice("mask_kernel", mask_kernel<Kind, false>, bytes, params, plan.depth);
    }
  });
  return launches.status();
}

}  // namespace caref::cuda
