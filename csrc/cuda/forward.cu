// Terms and statistics of rows.  A block copies its chunk of a row into shared memory while it
// searches for the maximum, excludes the arg-max column, and sums the rest.  The row is read from
// memory once, and the sums never have to be moved to a larger maximum.  Exponents without a
// one-pass form need a second pass, which reads shared memory if the block has the whole row.
//
// If several blocks share a row, a second launch combines their sums; exponents without a one-pass
// form then take two more launches.  This file is compiled once per storage type, which is the
// macro CAREF_STORAGE.
#include "launch.cuh"
#include "row_sums.cuh"

namespace caref::cuda {
namespace {

// A partial result consists of the maximum, its column, and the sums, of which residual and first
// moment come first.
constexpr int kPartialHead = 2;
template <typename Kind>
constexpr int kPartialSize = kPartialHead + kSums<Kind>;
constexpr int kSecondBytes = (kMaxWarps + 1) * kScedSums * sizeof(double);

// Shared memory of row_kernel: small arrays, then the block's chunk of the row.
template <typename Kind>
struct RowMemory {
  static constexpr int kTotals = kMaxWarps * kSums<Kind> * sizeof(double);
  static constexpr int kTopValues = kTotals + kSums<Kind> * sizeof(double);
  static constexpr int kTopVectors = kTopValues + kMaxWarps * sizeof(T);
  static constexpr int kConstants = kTopVectors + kMaxWarps * sizeof(int);
  static constexpr int kFlags = kConstants + 2 * sizeof(T);
  static constexpr int kRow = (kFlags + 2 * static_cast<int>(sizeof(int)) + 15) / 16 * 16;

  SharedArray<double> sums;    // one element per warp and sum
  SharedArray<double> totals;  // one element per sum
  SharedArray<T> top_values;
  SharedArray<int> top_vectors;
  SharedArray<T> constants;  // 1/d and c of the second pass
  SharedArray<int> flags;    // index of the arg-max in the chunk; whether there is a second pass
  SharedArray<Vector> row;
  SharedArray<Element> columns;  // aliases `row`

  __device__ explicit RowMemory(unsigned char* memory)
      : sums(memory, 0),
        totals(memory, kTotals),
        top_values(memory, kTopValues),
        top_vectors(memory, kTopVectors),
        constants(memory, kConstants),
        flags(memory, kFlags),
        row(memory, kRow),
        columns(memory, kRow) {}
};

// Adds f and p f' of a vector.  `top` is the index of the excluded column, if it is in the vector.
__device__ __forceinline__ void add_sced(const Vector& vector, int top, T maximum, T inverse_d, T c,
                                         const Exponents& exponents, T (&sums)[kScedSums]) {
  const auto z = S::unpack(vector);
  CAREF_UNROLL
  for (int i = 0; i < S::kWidth; ++i) {
    const T y = clamp_shift(z.at[i] - maximum);
    const T p = i == top ? T(0) : exponential(y) * inverse_d;
    const T q = 1 - p;
    sums[0] += sced_density(p, y - c, q, exponents);
    sums[1] += p * sced_slope<T>(p, y - c, q, exponents) / q;
  }
}

// The second pass of a block that has the whole row; thread 0 adds the sums to its `result`.
template <typename Kind>
__device__ void add_second_pass(const RowParams& params, const RowMemory<Kind>& shared, int vectors,
                                T maximum, RowResult<T>& result) {
  if (threadIdx.x == 0) {
    shared.constants[0] = static_cast<T>(result.constants().p_top);
    shared.constants[1] = static_cast<T>(result.constants().c);
    shared.flags[1] = result.needs_sced();
  }
  __syncthreads();  // the constants are written, and the sums of the first pass have been read
  if (!shared.flags[1]) return;
  const Exponents exponents = Kind::exponents(params);
  const T inverse_d = shared.constants[0], c = shared.constants[1];
  T sums[kScedSums] = {};
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const Vector vector = shared.row[i];
    add_sced(vector, -1, maximum, inverse_d, c, exponents, sums);
  }
  block_sums(sums, shared.sums, shared.totals);
  if (threadIdx.x == 0) result.add_sced(shared.totals[0], shared.totals[1], exponents);
}

// One block per split of each row.  A block that has the whole row also writes its results.
template <typename Kind>
__global__ void __launch_bounds__(kMaxThreads, (kForwardBlocks<T, Kind>))
    row_kernel(const RowParams params, const Splits splits, double* partials) {
  CAREF_DYNAMIC_SHARED(memory);
  const RowMemory<Kind> shared(memory);
  const BlockIndex block(splits, params.columns);
  const Target target = target_of(params, block.row);
  const bool has_row = splits.count == 1;
  if (!target.is_valid || is_outside(target, params.columns)) {
    const double value = target.is_valid ? kNan : 0.0;
    if (threadIdx.x == 0 && has_row) RowResult<T>(value).write(params, block.row);
    return;
  }
  const Element* logits =
      static_cast<const Element*>(params.logits) + params.logits_offset(block.row);
  const RowChunk<S> chunk(logits + block.begin, block.columns);
  const Top<T> own = fetch(chunk, shared.row);
  const Top<T> top = block_top(own, shared.top_values, shared.top_vectors);
  const bool has_top = top.value > -kInfinity;
  if (has_top && threadIdx.x == top.vector % blockDim.x) exclude_argmax(top, shared);
  const T reference = reference_of(top.value);
  ThreadSums<Kind> sums;
  for (int i = threadIdx.x; i < chunk.vectors(); i += blockDim.x) {
    const Vector vector = shared.row[i];
    const auto z = S::unpack(vector);
    CAREF_UNROLL
    for (int k = 0; k < S::kWidth; ++k) sums.add(z.at[k] - reference);
  }
  block_sums(sums.sum, shared.sums, shared.totals);
  const bool writes = threadIdx.x == 0;
  const int argmax = writes && has_top ? shared.flags[0] : 0;
  if (!has_row) {
    if (!writes) return;
    double* partial = partials + (block.row * splits.count + block.split) * kPartialSize<Kind>;
    partial[0] = top.value;
    partial[1] = block.begin + argmax;
    for (int k = 0; k < kSums<Kind>; ++k) partial[kPartialHead + k] = shared.totals[k];
    return;
  }
  RowResult<T> result(0.0);
  if (writes) {
    const T label_logit = target.has_label ? S::widen(logits[target.label]) : T(0);
    result = row_result<Kind>(params, target, shared.totals, top.value, argmax, label_logit);
  }
  if constexpr (Kind::kSced && !Kind::kOnePass) {
    add_second_pass(params, shared, chunk.vectors(), reference, result);
  }
  if (writes) result.write(params, block.row);
}

// One warp per row, for rows that several blocks share: combines their partial results.
template <typename Kind>
__global__ void __launch_bounds__(kWarp)
    combine_kernel(const RowParams params, const Splits splits, const double* partials) {
  const int64_t row = splits.first_row + blockIdx.x;
  const int lane = threadIdx.x;
  const Target target = target_of(params, row);
  if (!target.is_valid || is_outside(target, params.columns)) {
    if (lane == 0) RowResult<T>(target.is_valid ? kNan : 0.0).write(params, row);
    return;
  }
  const double* const parts = partials + row * splits.count * kPartialSize<Kind>;
  Top<double> top{-kInfinity, splits.count};
  for (int i = lane; i < splits.count; i += kWarp) top.combine(parts[i * kPartialSize<Kind>], i);
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double value = __shfl_xor_sync(kAllLanes, top.value, step);
    const int split = __shfl_xor_sync(kAllLanes, top.vector, step);
    top.combine(value, split);
  }
  double sums[kSums<Kind>] = {};
  for (int i = lane; i < splits.count; i += kWarp) {
    const double* const part = parts + i * kPartialSize<Kind>;
    PartialSums<Kind> own;
    own.residual = part[kPartialHead];
    own.first_moment = part[kPartialHead + 1];
    if constexpr (Kind::kOnePass) {
      CAREF_UNROLL
      for (int k = 0; k < Kind::kMoments; ++k) own.moments.sum[k] = part[kPartialHead + 2 + k];
    }
    // The arg-max of the row is the one of the first split with the maximum, and stays excluded.
    // Every other split has excluded a column that must be readmitted, unless it has only -inf.
    if (i != top.vector && part[0] > -kInfinity) own.raise(part[0] - top.value);
    sums[0] += own.residual;
    sums[1] += own.first_moment;
    if constexpr (Kind::kOnePass) {
      CAREF_UNROLL
      for (int k = 0; k < Kind::kMoments; ++k) sums[2 + k] += own.moments.sum[k];
    }
  }
  CAREF_UNROLL
  for (int k = 0; k < kSums<Kind>; ++k) {
    CAREF_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2)
      sums[k] += __shfl_xor_sync(kAllLanes, sums[k], step);
  }
  if (lane != 0) return;
  const Element* logits = static_cast<const Element*>(params.logits) + params.logits_offset(row);
  const double label_logit = target.has_label ? S::widen(logits[target.label]) : 0.0;
  const auto argmax = static_cast<int64_t>(parts[top.vector * kPartialSize<Kind> + 1]);
  row_result<Kind>(params, target, sums, top.value, argmax, label_logit).write(params, row);
}

// One block per split of each row: the second pass over its columns, from the statistics that
// combine_kernel has written.
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>)
    second_kernel(const RowParams params, const Splits splits, double* sced_partials) {
  CAREF_DYNAMIC_SHARED(memory);
  const SharedArray<double> scratch(memory, 0);
  const SharedArray<double> totals(memory, kMaxWarps * kScedSums * sizeof(double));
  const BlockIndex block(splits, params.columns);
  const Target target = target_of(params, block.row);
  const SavedRow<T> saved(params, block.row);
  if (!target.is_valid || !saved.needs_sced(params.columns)) return;
  const Exponents exponents(params.alpha, params.beta);
  const RowConstants<T> constants(saved.residual, static_cast<double>(params.vocab_size));
  const T inverse_d = static_cast<T>(constants.p_top), c = static_cast<T>(constants.c);
  const RowChunk<S> chunk(
      static_cast<const Element*>(params.logits) + params.logits_offset(block.row) + block.begin,
      block.columns);
  const int top = static_cast<int>(saved.argmax) - block.begin;
  T sums[kScedSums] = {};
  for_each_vector<1>(chunk, [&](const Vector& vector, int index) {
    add_sced(vector, top - index * S::kWidth, saved.maximum, inverse_d, c, exponents, sums);
  });
  block_sums(sums, scratch, totals);
  if (threadIdx.x != 0) return;
  double* out = sced_partials + (block.row * splits.count + block.split) * kScedSums;
  out[0] = totals[0];
  out[1] = totals[1];
}

// One thread per row: combines the sums of the second pass.
__global__ void __launch_bounds__(kMaxThreads)
    combine_sced_kernel(const RowParams params, const Splits splits, const double* sced_partials) {
  const int64_t row =
      splits.first_row + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= params.rows() || !target_of(params, row).is_valid) return;
  const SavedRow<T> saved(params, row);
  if (!saved.needs_sced(params.columns)) return;
  double density = 0.0, slope = 0.0;
  for (int i = 0; i < splits.count; ++i) {
    density += sced_partials[(row * splits.count + i) * kScedSums];
    slope += sced_partials[(row * splits.count + i) * kScedSums + 1];
  }
  const RowConstants<T> constants(saved.residual, static_cast<double>(params.vocab_size));
  const double top = sced_density(constants.p_top, -constants.c, constants.q_top,
                                  Exponents(params.alpha, params.beta));
  static_cast<T*>(params.terms)[row * kNumTerms + kSced] = static_cast<T>(density + top);
  static_cast<T*>(params.stats)[row * kNumStatistics + kSlopeSum] = static_cast<T>(slope);
}

template <typename Kind>
Status forward_rows(const RowParams& params, const LaunchConfig& config,
                    const Resources& resources) {
  const int row_bytes = RowMemory<Kind>::kRow + config.chunk_bytes(sizeof(Element));
  auto* const partials = static_cast<double*>(resources.workspace);
  const int64_t rows = params.rows();
  Launches launches(resources.stream, config);
  launches.each_split("row_kernel", row_kernel<Kind>, row_bytes, params, partials);
  if (config.splits == 1) return launches.status();
  launches.each_row("combine_kernel", combine_kernel<Kind>, kWarp, 1, params,
                    const_cast<const double*>(partials));
  if (Kind::kSced && !Kind::kOnePass) {
    double* const sced = partials + rows * config.splits * kPartialSize<Kind>;
    launches.each_split("second_kernel", second_kernel, kSecondBytes, params, sced);
    launches.each_row("combine_sced_kernel", combine_sced_kernel, kMaxThreads, kMaxThreads, params,
                      const_cast<const double*>(sced));
  }
  return launches.status();
}

// Calls visitor(kind) with the kind of the first pass: with a top-k mask it leaves SCED out.
template <typename Visitor>
void visit_sums(const RowParams& params, Visitor visitor) {
  if (uses_topk_mask(params)) return visitor(NoSced{});
  visit_kinds<S>(params, visitor);
}

}  // namespace

template <>
Status forward_of<S>(const RowParams& params, const LaunchConfig& config,
                     const Resources& resources) {
  Status status;
  visit_sums(params,
             [&](auto kind) { status = forward_rows<decltype(kind)>(params, config, resources); });
  return status;
}

template <>
int64_t forward_workspace_of<S>(const RowParams& params, const LaunchConfig& config) {
  int64_t doubles = 0;
  visit_sums(params, [&](auto kind) {
    using Kind = decltype(kind);
    const bool second = Kind::kSced && !Kind::kOnePass;
    doubles = kPartialSize<Kind> + (second ? kScedSums : 0);
  });
  return config.splits == 1 ? 0 : params.rows() * config.splits * doubles * int64_t{sizeof(double)};
}

}  // namespace caref::cuda
