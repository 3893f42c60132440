// Terms and statistics of rows.  The row is processed in blocks that fit the first-level cache:
// each block is searched for a new maximum and then summed.  For the one-pass exponents the row is
// read once; other exponents and top-k masks read it a second time.
#include <type_traits>

#include "kernels.h"
#include "rows.h"
#include "topk_sums.h"

namespace caref::cpu::CAREF_ISA {
namespace {

// The sums of one row relative to the maximum of the blocks that have been read so far.
template <typename T, typename Kind>
struct LaneSums : PartialSums<Kind> {
  T maximum = -std::numeric_limits<T>::infinity();
  int64_t argmax = 0;
  bool is_nan = false;
  T pivot = -std::numeric_limits<T>::infinity();  // the first maximum
  double total = 0.0;                             // of x - pivot, if it is wanted
  WideSum<T> wide_residual, wide_first_moment;
  WideSum<T> wide_moments[Kind::kMoments + 1];  // one more, because C++ has no empty arrays
};

// Adds one block, whose maximum does not exceed the row's, to the lane sums.
template <typename S, typename T, typename Kind>
CAREF_HD void add_block(const BlockReader<S>& block, LaneSums<T, Kind>& sums) {
  using V = Vec<T>;
  const V maximum = splat<T>(sums.maximum);
  V residual = {}, first_moment = {};
  if constexpr (Kind::kOnePass) {
    using M = typename Kind::Sums;
    V moments[M::kCount] = {};
    block.for_each([&](V x) CAREF_INLINE {
      const V y = clamp_shift<T>(x - maximum);
      const V e = exponential<T>(y);
      residual += e;
      first_moment += e * y;
      V e_power = e;
#pragma GCC unroll 8
      for (int k = 1; k < M::kAlpha; ++k) e_power *= e;
#pragma GCC unroll 8
      for (int b = 0; b <= M::kBeta; ++b) {
        V y_power = y;
        moments[b * M::kPowers] += e_power;
#pragma GCC unroll 8
        for (int j = 1; j <= M::kAlpha; ++j) {
          moments[b * M::kPowers + j] += e_power * y_power;
          y_power *= y;
        }
        e_power *= e;
      }
    });
#pragma GCC unroll 16
    for (int i = 0; i < M::kCount; ++i) sums.wide_moments[i].add(moments[i]);
  } else {
    block.for_each([&](V x) CAREF_INLINE {
      const V y = clamp_shift<T>(x - maximum);
      const V e = exponential<T>(y);
      residual += e;
      first_moment += e * y;
    });
  }
  sums.wide_residual.add(residual);
  sums.wide_first_moment.add(first_moment);
}

template <typename T, typename Kind>
void take_wide(LaneSums<T, Kind>& sums) {
  sums.residual += sums.wide_residual.take();
  sums.first_moment += sums.wide_first_moment.take();
  if constexpr (Kind::kOnePass) {
    for (int i = 0; i < Kind::Sums::kCount; ++i) sums.moments.sum[i] += sums.wide_moments[i].take();
  }
}

template <typename T, typename Kind>
void raise_maximum(LaneSums<T, Kind>& sums, T maximum, int64_t argmax) {
  take_wide(sums);
  // Before the first maximum this is -inf, and raise() then leaves the sums, which are 0, at 0.
  sums.raise(static_cast<double>(sums.maximum) - static_cast<double>(maximum));
  sums.maximum = maximum;
  sums.argmax = argmax;
}

template <typename S, typename T, typename Kind>
void sum_row(BlockReader<S>& block, LaneSums<T, Kind>& sums, bool with_total) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  while (block.next()) {
    const T block_maximum = block.maximum();
    if (with_total) {
      if (sums.pivot == kLowest) sums.pivot = block_maximum;
      // Blocks before the first maximum have only -inf, as has the sum then.
      sums.total += sums.pivot == kLowest ? static_cast<double>(kLowest) : block.total(sums.pivot);
    }
    if (block_maximum > sums.maximum) {
      const int64_t argmax = block.find(block_maximum);
      raise_maximum(sums, block_maximum, argmax);
      block.exclude(argmax);
    } else if (sums.maximum == kLowest) {
      // So far the row has only -inf and NaN, so there is no maximum to sum relative to.
      sums.is_nan |= block.any_nan();
      continue;
    }
    add_block(block, sums);
  }
  take_wide(sums);
}

// The second pass: sum f and sum p f' over the columns other than the arg-max.
template <typename S, typename T>
ScedSums sum_sced(BlockReader<S>& block, T maximum, int64_t argmax, const RowConstants<T>& row,
                  const Exponents& exponents) {
  using V = Vec<T>;
  const T inverse_d = static_cast<T>(row.p_top), c = static_cast<T>(row.c);
  WideSum<T> wide_density, wide_slope;
  block.rewind();
  while (block.next()) {
    if (block.contains(argmax)) block.exclude(argmax);
    V density = {}, slope = {};
    block.for_each([&](V x) {
      const V y = clamp_shift<T>(x - maximum);
      const V p = exponential<T>(y) * inverse_d;
      const V log_ratio = y - c;
      const V q = 1 - p;
      density += sced_density(p, log_ratio, q, exponents);
      slope += p * sced_slope<T>(p, log_ratio, q, exponents) / q;
    });
    wide_density.add(density);
    wide_slope.add(slope);
  }
  return {wide_density.take(), wide_slope.take()};
}

template <typename T>
void write_topk_mask(const RowParams& params, int64_t row, const TopKMask<T>& mask) {
  T* stats = static_cast<T*>(params.stats) + row * params.num_statistics();
  stats[kNumKept] = static_cast<T>(mask.num_kept);
  stats[kThreshold] = value_of<T>(mask.selection.threshold);
  stats[kTieWeight] = static_cast<T>(mask.tie_weight);
}

template <typename S, typename Kind>
void forward_row(const RowParams& params, const Exponents& exponents, int64_t row,
                 const Target& target, void* workspace) {
  using T = typename Storage<S>::Arithmetic;
  const S* logits = static_cast<const S*>(params.logits) + params.logits_offset(row);
  BlockReader<S> block(logits, params.columns);
  // The k of a top-k mask depends on the row's entropy, so SCED needs a second pass over the row.
  LaneSums<T, std::conditional_t<kIsTopKMasked<Kind>, NoSced, Kind>> sums;
  sum_row(block, sums, params.with_mean_of_shifts);
  const double residual = sums.is_nan ? kNan : sums.residual;
  const double maximum = static_cast<double>(sums.maximum);
  const double mean_of_shifts = sums.total / static_cast<double>(params.columns) +
                                (static_cast<double>(sums.pivot) - maximum);
  const RowSums totals{maximum, sums.argmax, residual, sums.first_moment, mean_of_shifts};
  const double label_logit = target.has_label ? load_one(logits + target.label) : 0.0;
  RowResult<T> result(params, target, exponents, totals, label_logit);
  if constexpr (kIsTopKMasked<Kind>) {
    if (result.is_nan()) return result.write(params, row);
    const TopKMask<T> mask =
        select_mask<S>(params, logits, sums.argmax, result.entropy(), workspace);
    if (result.needs_sced()) {
      const ScedSums sced =
          sum_topk<S, Kind>(block, mask, sums.maximum, sums.argmax, result.constants(), exponents);
      result.add_sced(sced.density, sced.slope, exponents, mask.weight(mask.top));
    }
    result.write(params, row);
    return write_topk_mask(params, row, mask);
  } else if constexpr (Kind::kSced) {
    if (result.needs_sced()) {
      if constexpr (Kind::kOnePass) {
        result.add_sced(sums.moments, exponents);
      } else {
        const ScedSums sced =
            sum_sced<S, T>(block, sums.maximum, sums.argmax, result.constants(), exponents);
        result.add_sced(sced.density, sced.slope, exponents);
      }
    }
  }
  result.write(params, row);
}

template <typename S, typename Kind>
void forward_rows(const RowParams& params, int64_t begin, int64_t end, void* workspace) {
  const Exponents exponents(params.alpha, params.beta);
  for (int64_t row = begin; row < end; ++row) {
    const Target target = target_of(params, row);
    if (target.is_valid) {
      forward_row<S, Kind>(params, exponents, row, target, workspace);
    } else {
      RowResult<typename Storage<S>::Arithmetic>(0.0).write(params, row);
    }
  }
}

}  // namespace

void forward(const RowParams& params, int64_t begin, int64_t end, void* workspace) {
  visit_storage(params.logits_dtype, [&](auto storage) {
    visit_kind(params, [&](auto kind) {
      forward_rows<decltype(storage), decltype(kind)>(params, begin, end, workspace);
    });
  });
}

}  // namespace caref::cpu::CAREF_ISA
