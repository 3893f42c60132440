// The gradient of rows: one read, one write.  p is computed again from the logits; the three term
// gradients are scaled by the row's incoming gradient and added in T, and rounded once.
//
// A thread reads a vector before it writes it, and the one other column that its block looks at,
// the label, before any write: the gradient may overwrite the logits.  Compiled once per storage
// type, which is the macro CAREF_STORAGE.
#include "keys.cuh"
#include "launch.cuh"

namespace caref::cuda {
namespace {

using S = CAREF_STORAGE;
using T = S::Arithmetic;
using Element = S::Element;

// Vectors that a thread has in flight, read before any of them is written.
constexpr int kBatch = 4;

// What the columns of a row need: p (constant + kl y + sced f') - e share top_slope, where the last
// term is for exponents without an expansion.
struct ColumnConstants {
  T maximum, inverse_d, c, constant, kl, sced;
  T share, top_slope;  // kept apart where the product with 1/r could overflow
};

// The mask of a row: w of a column from its key, among those of T.
struct RowMask {
  KeyOf<T> threshold;
  double tie_weight;

  __device__ RowMask(const RowParams& params, int64_t row) {
    const T* stats = static_cast<const T*>(params.stats) + row * kNumMaskedStatistics;
    threshold = key_of(stats[kThreshold]);
    tie_weight = static_cast<double>(stats[kTieWeight]);
  }

  __device__ double weight(T z) const {
    const KeyOf<T> key = key_of(z);
    return key > threshold ? 1.0 : key == threshold ? tie_weight : 0.0;
  }
};

struct MaskedConstants : ColumnConstants {
  KeyOf<T> threshold;
  T tied_sced;  // sced times the weight of a column at the threshold
};
template <typename Kind>
using ConstantsOf = std::conditional_t<kIsMasked<Kind>, MaskedConstants, ColumnConstants>;

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
      constants.share = static_cast<T>(1.0 / row.constants.residual);
      constants.top_slope = static_cast<T>(row.grad_sced * row.top_slope);
    }
  }
  constants.constant =
      static_cast<T>(row.grad_ce - row.grad_sced * sum - row.grad_kl * row.mean_shift);
  return constants;
}

// The incoming gradient of SCED times the column's weight in the mask.
template <typename Kind>
__device__ __forceinline__ T weighted_sced(T z, const ConstantsOf<Kind>& row) {
  if constexpr (kIsMasked<Kind>) {
    const KeyOf<T> key = key_of(z);
    const T tied = key == row.threshold ? row.tied_sced : T(0);
    return key > row.threshold ? row.sced : tied;
  } else {
    return row.sced;
  }
}

// The gradient of every column but the arg-max and the label, which are written again.
template <typename Kind>
__device__ __forceinline__ T column_gradient(T z, const ConstantsOf<Kind>& row,
                                             const Exponents& exponents) {
  const T shift = z - row.maximum;
  const T e = exponential(shift);  // NaN passes here
  const T y = clamp_shift(shift);  // and not here
  const T p = e * row.inverse_d;
  T inner = row.kl * y + row.constant;
  if constexpr (Kind::kOnePass) {
    inner += weighted_sced<Kind>(z, row) *
             even_slope<Kind::Sums::kAlpha, Kind::Sums::kBeta>(p, y - row.c);
  } else if constexpr (Kind::kSced) {
    const T q = 1 - p, sced = weighted_sced<Kind>(z, row);
    if (!kIsMasked<Kind> || sced != 0) {
      inner += sced * (sced_slope<T>(p, y - row.c, q, exponents) / q);
    }
    return p * inner - e * row.share * row.top_slope;
  }
  return p * inner;
}

// What thread 0 finds out for its block.
enum Flag : int { kMode = 0, kTopColumn = 1, kLabelColumn = 2, kNumFlags = 3 };
enum Mode : int { kGradient = 0, kZero = 1, kPoison = 2 };

template <typename Constants>
struct GradientMemory {
  static constexpr int kValues = sizeof(Constants);
  static_assert(kValues % sizeof(double) == 0, "doubles are aligned");
  static constexpr int kFlags = kValues + 2 * static_cast<int>(sizeof(double));
  static constexpr int kBytes = kFlags + kNumFlags * static_cast<int>(sizeof(int));

  SharedArray<Constants> constants;
  SharedArray<double> values;  // gradients of the arg-max and the label
  SharedArray<int> flags;

  __device__ explicit GradientMemory(unsigned char* memory)
      : constants(memory, 0), values(memory, kValues), flags(memory, kFlags) {}
};

// The set-up of a block, by thread 0: what its columns need, and the two gradients with a form of
// their own if their columns are in this slice (-1 if not).
template <typename Kind>
__device__ void set_up(const RowParams& params, const Place& place, const Element* share,
                       const GradientMemory<ConstantsOf<Kind>>& shared) {
  const Target target = target_of(params, place.row);
  shared.flags[kTopColumn] = shared.flags[kLabelColumn] = -1;
  if (!target.counts || is_outside(target, params.columns)) {
    shared.flags[kMode] = kZero;
    return;
  }
  const Exponents exponents = Kind::exponents(params);
  RowBackward<T> row(params, place.row, target, exponents);
  if (!row.is_usable(params.columns)) {
    shared.flags[kMode] = kPoison;
    return;
  }
  shared.flags[kMode] = kGradient;
  double label_weight = 1.0;
  if constexpr (kIsMasked<Kind>) {
    // The arg-max column itself may lie in a slice whose gradient is written already.
    const RowMask mask(params, place.row);
    row.top_slope *= mask.weight(row.maximum);
    ConstantsOf<Kind> constants = column_constants<Kind>(row);
    constants.threshold = mask.threshold;
    constants.tied_sced = static_cast<T>(row.grad_sced * mask.tie_weight);
    shared.constants[0] = constants;
  } else {
    shared.constants[0] = column_constants<Kind>(row);
  }
  const int64_t top = row.argmax - place.begin;
  if (top >= 0 && top < place.columns) {
    shared.values[0] = row.top(target);
    shared.flags[kTopColumn] = static_cast<int>(top);
  }
  const int64_t label = target.label - place.begin;
  if (target.has_label && target.label != row.argmax && label >= 0 && label < place.columns) {
    const T logit = S::widen(share[label]);
    const double shift = static_cast<double>(logit) - row.maximum;
    if constexpr (kIsMasked<Kind>) label_weight = RowMask(params, place.row).weight(logit);
    shared.values[1] = row.label(shift, label_weight, exponents);
    shared.flags[kLabelColumn] = static_cast<int>(label);
  }
}

// A block for each slice of each row.
template <typename Kind>
__global__ void __launch_bounds__(kMostThreads, kBlocks<T>)
    gradient_kernel(const RowParams params, const Slices slices) {
  CAREF_DYNAMIC_SHARED(memory);
  const GradientMemory<ConstantsOf<Kind>> shared(memory);
  const Place place(slices, params.columns);
  const Element* logits =
      static_cast<const Element*>(params.logits) + params.logits_offset(place.row) + place.begin;
  Element* gradient =
      static_cast<Element*>(params.grad_logits) + params.out_offset(place.row) + place.begin;
  const Share<S> share(logits, place.columns);
  const OutShare<S> out(gradient, place.columns);
  if (threadIdx.x == 0) set_up<Kind>(params, place, logits, shared);
  __syncthreads();
  const int mode = shared.flags[kMode];
  if (mode != kGradient) {
    typename S::Numbers numbers;
    CAREF_UNROLL
    for (int k = 0; k < S::kWidth; ++k) numbers.at[k] = static_cast<T>(mode == kZero ? 0.0 : kNan);
    for (int i = threadIdx.x; i < share.vectors(); i += blockDim.x) out.store(i, S::pack(numbers));
    return;
  }
  const ConstantsOf<Kind> row = shared.constants[0];
  const Exponents exponents = Kind::exponents(params);
  for_each_vector<kBatch>(share, [&](const Vector& vector, int index) {
    auto numbers = S::unpack(vector);
    CAREF_UNROLL
    for (int k = 0; k < S::kWidth; ++k) {
      numbers.at[k] = column_gradient<Kind>(numbers.at[k], row, exponents);
    }
    out.store(index, S::pack(numbers));
  });
  __syncthreads();  // the two columns are written after the general form of them
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 2; ++i) {
    const int column = shared.flags[kTopColumn + i];
    if (column >= 0) out.store_one(column, shared.values[i]);
  }
}

}  // namespace

template <>
Status backward_of<S>(const RowParams& params, const Plan& plan, const Resources& resources) {
  Launches launches(resources.stream, plan);
  const auto launch = [&](auto kind) {
    using Kind = decltype(kind);
    launches.each_slice("gradient_kernel", gradient_kernel<Kind>,
                        GradientMemory<ConstantsOf<Kind>>::kBytes, params);
  };
  if (has_mask(params)) {
    visit_masked_kinds(params, launch);
  } else {
    visit_kinds<S>(params, launch);
  }
  return launches.status();
}

}  // namespace caref::cuda
