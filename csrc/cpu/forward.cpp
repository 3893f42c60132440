// Terms and statistics of rows.  One read of the row for even exponents: the row is taken in blocks
// that fit the first-level cache; each block is looked at for a new maximum and then summed.  Other
// exponents read the row a second time.
#include <type_traits>

#include "kernels.h"
#include "masked.h"
#include "rows.h"

namespace caref::cpu::CAREF_ISA {
namespace {

// The sums of one row relative to its maximum so far, the arg-max column excluded.
template <typename T, typename Kind>
struct RowSums {
  T maximum = -std::numeric_limits<T>::infinity();
  int64_t argmax = 0;
  double residual = 0.0;      // sum e^y
  double first_moment = 0.0;  // sum e^y y
  bool is_nan = false;
  WideSum<T> wide_residual, wide_first_moment;
};

template <typename T, int A, int B>
struct RowSums<T, EvenExponents<A, B>> : RowSums<T, NoSced> {
  Moments<A, B> moments = {};
  WideSum<T> wide_moments[Moments<A, B>::kCount];
};

// Adds one block, whose maximum is not above the row's, to the lane sums.
template <typename S, typename T, typename Kind>
CAREF_HD void add_block(const BlockReader<S>& block, RowSums<T, Kind>& sums) {
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
void take_wide(RowSums<T, Kind>& sums) {
  sums.residual += sums.wide_residual.take();
  sums.first_moment += sums.wide_first_moment.take();
  if constexpr (Kind::kOnePass) {
    for (int i = 0; i < Kind::Sums::kCount; ++i) sums.moments.sum[i] += sums.wide_moments[i].take();
  }
}

// The maximum rises: everything so far is seen from the new one, and the old maximum joins the
// sums.
template <typename T, typename Kind>
void raise_maximum(RowSums<T, Kind>& sums, T maximum, int64_t argmax) {
  take_wide(sums);
  const double delta = static_cast<double>(sums.maximum) - static_cast<double>(maximum);
  if (delta > -700.0) {
    const double scale = exp(delta);
    sums.first_moment = scale * (sums.first_moment + delta * sums.residual + delta);
    sums.residual = scale * (sums.residual + 1.0);
    if constexpr (Kind::kOnePass) {
      sums.moments.shift(delta);
      sums.moments.add(delta);
    }
  } else {  // nothing before, or nothing left of it: no product of 0 with a huge power of delta
    const bool was_nan = sums.residual != sums.residual;
    sums.residual = was_nan ? sums.residual : 0.0;
    sums.first_moment = 0.0;
    if constexpr (Kind::kOnePass) sums.moments.clear();
  }
  sums.maximum = maximum;
  sums.argmax = argmax;
}

template <typename S, typename T, typename Kind>
void sum_row(BlockReader<S>& block, RowSums<T, Kind>& sums) {
  while (block.next()) {
    const T block_maximum = block.maximum();
    if (block_maximum > sums.maximum) {
      const int64_t argmax = block.find(block_maximum);
      raise_maximum(sums, block_maximum, argmax);
      block.exclude(argmax);
    } else if (sums.maximum == -std::numeric_limits<T>::infinity()) {
      // Nothing but -inf and NaN so far, so there is no maximum to sum against.
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
void write_row(const RowParams& params, int64_t row, const double (&terms)[kNumTerms],
               const double (&stats)[kNumStatistics]) {
  T* terms_out = static_cast<T*>(params.terms) + row * kNumTerms;
  T* stats_out = static_cast<T*>(params.stats) + row * params.num_statistics();
  for (int i = 0; i < kNumTerms; ++i) terms_out[i] = static_cast<T>(terms[i]);
  for (int i = 0; i < kNumStatistics; ++i) stats_out[i] = static_cast<T>(stats[i]);
  // Of rows without a mask of their own: 0 or NaN, as the rest.
  for (int i = kNumStatistics; i < params.num_statistics(); ++i)
    stats_out[i] = stats_out[kResidual];
}

template <typename T>
void write_mask(const RowParams& params, int64_t row, const RowMask<T>& mask) {
  T* stats = static_cast<T*>(params.stats) + row * params.num_statistics();
  stats[kSupport] = static_cast<T>(mask.support);
  stats[kThreshold] = value_of<T>(mask.selection.threshold);
  stats[kTieWeight] = static_cast<T>(mask.tie_weight);
}

// A row without a softmax.
template <typename T>
void write_nan_row(const RowParams& params, int64_t row, const Target& target,
                   double (&stats)[kNumStatistics]) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  stats[kResidual] = stats[kMeanShift] = stats[kSlopeSum] = nan;
  write_row<T>(params, row, {target.has_label ? nan : 0.0, params.with_sced ? nan : 0.0, nan},
               stats);
}

template <typename S, typename Kind, typename T = typename Storage<S>::Arithmetic>
ScedSums second_pass(BlockReader<S>& block, const RowMask<T>& mask, T maximum, int64_t argmax,
                     const RowConstants<T>& row, const Exponents& exponents) {
  if constexpr (kIsMasked<Kind>) {
    return sum_masked<S, Kind>(block, mask, maximum, argmax, row, exponents);
  } else {
    return sum_sced<S, T>(block, maximum, argmax, row, exponents);
  }
}

template <typename S, typename Kind>
void forward_row(const RowParams& params, const Exponents& exponents, int64_t row,
                 const Target& target, void* workspace) {
  using T = typename Storage<S>::Arithmetic;
  const S* logits = static_cast<const S*>(params.logits) + params.logits_offset(row);
  BlockReader<S> block(logits, params.columns);
  // The budget of a mask depends on the entropy, so SCED takes a second look at the row.
  RowSums<T, std::conditional_t<kIsMasked<Kind>, NoSced, Kind>> sums;
  sum_row(block, sums);
  double terms[kNumTerms] = {}, stats[kNumStatistics] = {};
  stats[kMaximum] = sums.maximum;
  stats[kArgmax] = static_cast<double>(sums.argmax);
  if (!std::isfinite(sums.maximum) || sums.is_nan || std::isnan(sums.residual)) {
    return write_nan_row<T>(params, row, target, stats);
  }
  const double vocab_size = static_cast<double>(params.vocab_size), d = 1.0 + sums.residual;
  const double c = log_ratio_offset(sums.residual, vocab_size);
  const double mean_shift = sums.first_moment / d;
  stats[kResidual] = sums.residual;
  stats[kMeanShift] = mean_shift;
  terms[kKl] = mean_shift - c;
  if (target.has_label) {
    const double y =
        static_cast<double>(load_one(logits + target.label)) - static_cast<double>(sums.maximum);
    terms[kCe] = log1p(sums.residual) - y;
  }
  const T residual = static_cast<T>(sums.residual);
  [[maybe_unused]] const auto mask = select_mask<S, Kind>(
      params, logits, sums.argmax, entropy(sums.residual, mean_shift), workspace);
  if constexpr (Kind::kSced) {
    if (is_one_hot(residual)) {
      terms[kSced] = params.beta == 0.0 ? power(std::fabs(c), exponents.alpha) : 0.0;
    } else {
      const RowConstants<T> constants(residual, vocab_size);
      double rest, top = sced_density(1.0 / d, -c, sums.residual / d, exponents);
      if constexpr (Kind::kOnePass && !kIsMasked<Kind>) {
        rest = sums.moments.sced(c, d);
        stats[kSlopeSum] = sums.moments.slope_sum(constants.c, constants.d);
      } else {
        const ScedSums sced =
            second_pass<S, Kind>(block, mask, sums.maximum, sums.argmax, constants, exponents);
        rest = sced.density;
        stats[kSlopeSum] = sced.slope;
        if constexpr (kIsMasked<Kind>) top *= mask.weight(mask.top);
      }
      terms[kSced] = rest + top;
    }
  }
  write_row<T>(params, row, terms, stats);
  if constexpr (kIsMasked<Kind>) write_mask<T>(params, row, mask);
}

template <typename S, typename Kind>
void forward_rows(const RowParams& params, int64_t begin, int64_t end, void* workspace) {
  const Exponents exponents(params.alpha, params.beta);
  for (int64_t row = begin; row < end; ++row) {
    const Target target = target_of(params, row);
    if (target.counts) {
      forward_row<S, Kind>(params, exponents, row, target, workspace);
    } else {
      write_row<typename Storage<S>::Arithmetic>(params, row, {}, {});
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
