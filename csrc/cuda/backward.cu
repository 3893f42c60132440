// The gradient of rows: one read, one write.  p is computed again from the logits; the three term
// gradients are scaled by the row's incoming gradient and added in T, and rounded once.
//
// A thread reads a vector before it writes it, and the one other column that its block looks at,
// the label, before any write: the gradient may overwrite the logits.  Compiled once per storage
// type, which is the macro CAREF_STORAGE.
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

template <typename Kind>
__device__ ColumnConstants column_constants(const RowBackward<T>& row) {
  ColumnConstants constants{};
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

// The gradient of every column but the arg-max and the label, which are written again.
template <typename Kind>
__device__ __forceinline__ T column_gradient(T z, const ColumnConstants& row,
                                             const Exponents& exponents) {
  const T shift = z - row.maximum;
  const T e = exponential(shift);  // NaN passes here
  const T y = clamp_shift(shift);  // and not here
  const T p = e * row.inverse_d;
  T inner = row.kl * y + row.constant;
  if constexpr (Kind::kOnePass) {
    inner += row.sced * even_slope<Kind::Sums::kAlpha, Kind::Sums::kBeta>(p, y - row.c);
  } else if constexpr (Kind::kSced) {
    const T q = 1 - p;
    inner += row.sced * (sced_slope<T>(p, y - row.c, q, exponents) / q);
    return p * inner - e * row.share * row.top_slope;
  }
  return p * inner;
}

// What thread 0 finds out for its block.
enum Flag : int { kMode = 0, kTopColumn = 1, kLabelColumn = 2, kNumFlags = 3 };
enum Mode : int { kGradient = 0, kZero = 1, kPoison = 2 };

struct GradientMemory {
  static constexpr int kValues = sizeof(ColumnConstants);
  static constexpr int kFlags = kValues + 2 * static_cast<int>(sizeof(double));
  static constexpr int kBytes = kFlags + kNumFlags * static_cast<int>(sizeof(int));

  SharedArray<ColumnConstants> constants;
  SharedArray<double> values;  // gradients of the arg-max and the label
  SharedArray<int> flags;

  __device__ explicit GradientMemory(unsigned char* memory)
      : constants(memory, 0), values(memory, kValues), flags(memory, kFlags) {}
};
static_assert(GradientMemory::kValues % sizeof(double) == 0, "doubles are aligned");

// The set-up of a block, by thread 0: what its columns need, and the two gradients with a form of
// their own if their columns are in this slice (-1 if not).
template <typename Kind>
__device__ void set_up(const RowParams& params, const Place& place, const Element* share,
                       const GradientMemory& shared) {
  const Target target = target_of(params, place.row);
  shared.flags[kTopColumn] = shared.flags[kLabelColumn] = -1;
  if (!target.counts || is_outside(target, params.columns)) {
    shared.flags[kMode] = kZero;
    return;
  }
  const Exponents exponents = Kind::exponents(params);
  const RowBackward<T> row(params, place.row, target, exponents);
  if (!row.is_usable(params.columns)) {
    shared.flags[kMode] = kPoison;
    return;
  }
  shared.flags[kMode] = kGradient;
  shared.constants[0] = column_constants<Kind>(row);
  const int64_t top = row.argmax - place.begin;
  if (top >= 0 && top < place.columns) {
    shared.values[0] = row.top(target);
    shared.flags[kTopColumn] = static_cast<int>(top);
  }
  const int64_t label = target.label - place.begin;
  if (target.has_label && target.label != row.argmax && label >= 0 && label < place.columns) {
    const double shift = static_cast<double>(S::widen(share[label])) - row.maximum;
    shared.values[1] = row.label(shift, 1.0, exponents);
    shared.flags[kLabelColumn] = static_cast<int>(label);
  }
}

// A block for each slice of each row.
template <typename Kind>
__global__ void __launch_bounds__(kMostThreads, kBlocks<T>)
    gradient_kernel(const RowParams params, const Slices slices) {
  CAREF_DYNAMIC_SHARED(memory);
  const GradientMemory shared(memory);
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
  const ColumnConstants row = shared.constants[0];
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
  visit_kinds<S>(params, [&](auto kind) {
    launches.each_slice("gradient_kernel", gradient_kernel<decltype(kind)>, GradientMemory::kBytes,
                        params);
  });
  return launches.status();
}

}  // namespace caref::cuda
