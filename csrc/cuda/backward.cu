// The gradient of rows, with one read and one write of each element.  p is recomputed from the
// logits; the gradients of the three terms are scaled by the row's incoming gradient, added in T,
// and rounded once.
//
// The gradient may overwrite the logits: every thread reads a vector before it writes it, and the
// label, the only other column that a block reads, is read before any write.  This file is compiled
// once per storage type, which is the macro CAREF_STORAGE.
#include "keys.cuh"
#include "launch.cuh"

namespace caref::cuda {
namespace {

using S = CAREF_STORAGE;
using T = S::Arithmetic;
using Element = S::Element;

// Vectors that a thread loads before it writes any of them.
constexpr int kBatch = 4;

// The constants of p (constant + kl y + sced f') + everywhere - e inverse_residual top_slope, the
// gradient of a column.  The last term is used only for exponents without a one-pass form.
struct alignas(double) ColumnConstants {
  T maximum, inverse_d, c, constant, kl, sced, everywhere;
  T inverse_residual, top_slope;  // two factors, because their product could overflow
};

// The top-k mask of a row: the weight of a column follows from its key.
struct TopKMask {
  KeyOf<T> threshold;
  double tie_weight;

  __device__ TopKMask(const RowParams& params, int64_t row) {
    const T* stats = static_cast<const T*>(params.stats) + row * kNumTopKStatistics;
    threshold = key_of(stats[kThreshold]);
    tie_weight = static_cast<double>(stats[kTieWeight]);
  }

  __device__ double weight(T z) const {
    const KeyOf<T> key = key_of(z);
    return key > threshold ? 1.0 : key == threshold ? tie_weight : 0.0;
  }
};

struct TopKConstants : ColumnConstants {
  KeyOf<T> threshold;
  T tied_sced;  // sced times the weight of a column that equals the threshold
};
template <typename Kind>
using ConstantsOf = std::conditional_t<kIsTopKMasked<Kind>, TopKConstants, ColumnConstants>;

template <typename Kind>
__device__ ConstantsOf<Kind> column_constants(const RowBackward<T>& row) {
  ConstantsOf<Kind> constants{};
  constants.maximum = row.maximum;
  constants.inverse_d = static_cast<T>(row.constants.p_top);
  constants.c = static_cast<T>(row.constants.c);
  constants.kl = static_cast<T>(row.grad_kl);
  constants.sced = static_cast<T>(row.grad_sced);
  double sum = 0.0;
  if (Kind::kSced && row.grad_sced != 0.0) {
    sum = row.slope_sum;
    if (Kind::kOnePass) {
      sum += row.top_slope / row.constants.q_top;  // beta is an integer: p_a f'_a is finite
    } else {
      constants.inverse_residual = static_cast<T>(1.0 / row.constants.residual);
      constants.top_slope = static_cast<T>(row.grad_sced * row.top_slope);
    }
  }
  constants.constant =
      static_cast<T>(row.grad_ce + row.factor - row.grad_sced * sum - row.grad_kl * row.mean_shift);
  constants.everywhere = static_cast<T>(row.constant);
  return constants;
}

// The incoming gradient of SCED times the column's weight in the top-k mask.
template <typename Kind>
__device__ __forceinline__ T weighted_sced(T z, const ConstantsOf<Kind>& row) {
  if constexpr (kIsTopKMasked<Kind>) {
    const KeyOf<T> key = key_of(z);
    const T tied = key == row.threshold ? row.tied_sced : T(0);
    return key > row.threshold ? row.sced : tied;
  } else {
    return row.sced;
  }
}

// The gradient of a column.  It does not hold for the arg-max and the label columns, which are
// overwritten afterwards.
template <typename Kind>
__device__ __forceinline__ T column_gradient(T z, const ConstantsOf<Kind>& row,
                                             const Exponents& exponents) {
  const T shift = z - row.maximum;
  const T e = exponential(shift);  // propagates NaN
  const T y = clamp_shift(shift);  // does not propagate NaN
  const T p = e * row.inverse_d;
  T inner = row.kl * y + row.constant;
  if constexpr (Kind::kOnePass) {
    inner += weighted_sced<Kind>(z, row) *
             even_slope<Kind::Sums::kAlpha, Kind::Sums::kBeta>(p, y - row.c);
  } else if constexpr (Kind::kSced) {
    const T q = 1 - p, sced = weighted_sced<Kind>(z, row);
    if (!kIsTopKMasked<Kind> || sced != 0) {
      inner += sced * (sced_slope<T>(p, y - row.c, q, exponents) / q);
    }
    return p * inner - e * row.inverse_residual * row.top_slope + row.everywhere;
  }
  return p * inner + row.everywhere;
}

// Results of the set-up by thread 0, for its block.
enum Flag : int { kMode = 0, kTopColumn = 1, kLabelColumn = 2, kNumFlags = 3 };
enum Mode : int { kGradient = 0, kZero = 1, kPoison = 2 };

template <typename Constants>
struct GradientMemory {
  static constexpr int kValues = sizeof(Constants);
  static_assert(kValues % sizeof(double) == 0, "doubles are aligned");
  static constexpr int kFlags = kValues + 2 * static_cast<int>(sizeof(double));
  static constexpr int kBytes = kFlags + kNumFlags * static_cast<int>(sizeof(int));

  SharedArray<Constants> constants;
  SharedArray<double> values;  // the gradients of the arg-max and label columns
  SharedArray<int> flags;

  __device__ explicit GradientMemory(unsigned char* memory)
      : constants(memory, 0), values(memory, kValues), flags(memory, kFlags) {}
};

// The set-up of a block by thread 0: the constants of the columns, and the gradients of the arg-max
// and label columns if these columns are in this split (their index is -1 if not).
template <typename Kind>
__device__ void set_up(const RowParams& params, const BlockIndex& block, const Element* logits,
                       const GradientMemory<ConstantsOf<Kind>>& shared) {
  const Target target = target_of(params, block.row);
  shared.flags[kTopColumn] = shared.flags[kLabelColumn] = -1;
  if (!target.is_valid || is_outside(target, params.columns)) {
    shared.flags[kMode] = kZero;
    return;
  }
  const Exponents exponents = Kind::exponents(params);
  RowBackward<T> row(params, block.row, target, exponents);
  if (!row.is_usable(params.columns)) {
    shared.flags[kMode] = kPoison;
    return;
  }
  shared.flags[kMode] = kGradient;
  double label_weight = 1.0;
  if constexpr (kIsTopKMasked<Kind>) {
    // The weight follows from the stored maximum, because another block may already have
    // overwritten the arg-max column.
    const TopKMask mask(params, block.row);
    row.top_slope *= mask.weight(row.maximum);
    ConstantsOf<Kind> constants = column_constants<Kind>(row);
    constants.threshold = mask.threshold;
    constants.tied_sced = static_cast<T>(row.grad_sced * mask.tie_weight);
    shared.constants[0] = constants;
  } else {
    shared.constants[0] = column_constants<Kind>(row);
  }
  const int64_t top = row.argmax - block.begin;
  if (top >= 0 && top < block.columns) {
    shared.values[0] = row.top(target);
    shared.flags[kTopColumn] = static_cast<int>(top);
  }
  const int64_t label = target.label - block.begin;
  if (target.has_label && target.label != row.argmax && label >= 0 && label < block.columns) {
    const T logit = S::widen(logits[label]);
    const double shift = static_cast<double>(logit) - row.maximum;
    if constexpr (kIsTopKMasked<Kind>) label_weight = TopKMask(params, block.row).weight(logit);
    shared.values[1] = row.label(shift, label_weight, exponents);
    shared.flags[kLabelColumn] = static_cast<int>(label);
  }
}

// One block per split of each row.
template <typename Kind>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>)
    gradient_kernel(const RowParams params, const Splits splits) {
  CAREF_DYNAMIC_SHARED(memory);
  const GradientMemory<ConstantsOf<Kind>> shared(memory);
  const BlockIndex block(splits, params.columns);
  const Element* logits =
      static_cast<const Element*>(params.logits) + params.logits_offset(block.row) + block.begin;
  Element* gradient =
      static_cast<Element*>(params.grad_logits) + params.out_offset(block.row) + block.begin;
  const RowChunk<S> chunk(logits, block.columns);
  const OutputChunk<S> out(gradient, block.columns);
  if (threadIdx.x == 0) set_up<Kind>(params, block, logits, shared);
  __syncthreads();
  const int mode = shared.flags[kMode];
  if (mode != kGradient) {
    typename S::Numbers numbers;
    CAREF_UNROLL
    for (int k = 0; k < S::kWidth; ++k) numbers.at[k] = static_cast<T>(mode == kZero ? 0.0 : kNan);
    for (int i = threadIdx.x; i < chunk.vectors(); i += blockDim.x) out.store(i, S::pack(numbers));
    return;
  }
  const ConstantsOf<Kind> row = shared.constants[0];
  const Exponents exponents = Kind::exponents(params);
  for_each_vector<kBatch>(chunk, [&](const Vector& vector, int index) {
    auto numbers = S::unpack(vector);
    CAREF_UNROLL
    for (int k = 0; k < S::kWidth; ++k) {
      numbers.at[k] = column_gradient<Kind>(numbers.at[k], row, exponents);
    }
    out.store(index, S::pack(numbers));
  });
  __syncthreads();  // the general form has been written before the two columns are overwritten
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 2; ++i) {
    const int column = shared.flags[kTopColumn + i];
    if (column >= 0) out.store_one(column, shared.values[i]);
  }
}

}  // namespace

template <>
Status backward_of<S>(const RowParams& params, const LaunchConfig& config,
                      const Resources& resources) {
  Launches launches(resources.stream, config);
  const auto launch = [&](auto kind) {
    using Kind = decltype(kind);
    launches.each_split("gradient_kernel", gradient_kernel<Kind>,
                        GradientMemory<ConstantsOf<Kind>>::kBytes, params);
  };
  if (uses_topk_mask(params)) {
    visit_topk_kinds(params, launch);
  } else {
    visit_kinds<S>(params, launch);
  }
  return launches.status();
}

}  // namespace caref::cuda
