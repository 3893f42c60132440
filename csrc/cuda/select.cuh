// The k largest logits of a row: their threshold and the counts above and at it, exactly, without a
// sort and without indices.  Digits of the keys, from the top: a histogram in shared memory counts
// the keys with each value of a digit, and the one that holds rank k is searched further.  Counts
// are integers, so the order of the atomic additions does not show.
#pragma once

#include "keys.cuh"
#include "launch.cuh"
#include "row_sums.cuh"

namespace caref::cuda {
namespace {

using Bits = BitsOf<Element>;
using Key = KeyOf<Element>;

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaskWarps = kMaskThreads / kWarp;
constexpr Key kLowestKey = kZeroKey<Element> - (S::kInfinityBits - 1);  // of a finite number

// What thread 0 finds out for its block.
enum MaskFlag : int { kTopColumn = 0, kHasMask = 1, kBudget = 2, kNumMaskFlags = 3 };
enum MaskConstant : int { kInverseD = 0, kOffset = 1, kTopValue = 2, kNumMaskConstants = 3 };
enum Found : int { kBin = 0, kAboveBin = 1, kInBin = 2, kNumFound = 3 };

// Shared memory of mask_kernel: small arrays, the histogram, then the row or lists of keys.
struct MaskMemory {
  static constexpr int kTotals = kMaskWarps * kScedSums * sizeof(double);
  static constexpr int kTopValues = kTotals + kScedSums * sizeof(double);
  static constexpr int kMaxima = kTopValues + kMaskWarps * sizeof(T);
  static constexpr int kConstants = kMaxima + 2 * kMaskWarps * sizeof(T);
  static constexpr int kTopVectors = kConstants + kNumMaskConstants * sizeof(T);
  static constexpr int kFlags = kTopVectors + kMaskWarps * sizeof(int);
  static constexpr int kCounts = kFlags + kNumMaskFlags * sizeof(int);
  static constexpr int kFoundBin = kCounts + kMaskWarps * sizeof(int);
  static constexpr int kHistogram = kFoundBin + kNumFound * sizeof(int);
  static constexpr int kOverflow = kHistogram + kBins * sizeof(int);
  static constexpr int kRow = (kOverflow + static_cast<int>(sizeof(int)) + 15) / 16 * 16;
  static_assert(kRow <= kMaskBytes, "the plan counts on it");

  SharedArray<double> sums;    // an element per warp and sum
  SharedArray<double> totals;  // an element per sum
  SharedArray<T> top_values;
  SharedArray<T> maxima;  // per warp: the least of its threads' maxima, and its own
  SharedArray<T> constants;
  SharedArray<int> top_vectors;
  SharedArray<int> flags;
  SharedArray<int> counts;  // keys in the bins of a warp
  SharedArray<int> found;
  SharedArray<int> histogram;
  SharedArray<int> overflow;  // threads whose list has no room
  SharedArray<Vector> row;
  SharedArray<Element> columns;  // the same memory as `row`
  SharedArray<Bits> lists;       // and this

  __device__ explicit MaskMemory(unsigned char* memory)
      : sums(memory, 0),
        totals(memory, kTotals),
        top_values(memory, kTopValues),
        maxima(memory, kMaxima),
        constants(memory, kConstants),
        top_vectors(memory, kTopVectors),
        flags(memory, kFlags),
        counts(memory, kCounts),
        found(memory, kFoundBin),
        histogram(memory, kHistogram),
        overflow(memory, kOverflow),
        row(memory, kRow),
        columns(memory, kRow),
        lists(memory, kRow) {}
};

struct VectorBits {
  Bits at[S::kWidth];
};
__device__ __forceinline__ Key key_at(const VectorBits& bits, int i) {
  return key_of(bits_as<Element>(bits.at[i]));
}

// A row in shared memory, without its arg-max column.  visit() calls body(key) for those of this
// thread's columns whose key is at least `least`, in order.
class KeptRow {
 public:
  __device__ KeptRow(const MaskMemory& shared, int vectors) : row_(shared.row), vectors_(vectors) {}

  template <typename Body>
  __device__ __forceinline__ void visit(Key least, Body body) {
    for (int i = threadIdx.x; i < vectors_; i += blockDim.x) {
      const Vector vector = row_[i];
      const auto bits = bits_as<VectorBits>(vector);
      CAREF_UNROLL
      for (int k = 0; k < S::kWidth; ++k) {
        const Key key = key_at(bits, k);
        if (key >= least) body(key);
      }
    }
  }

  // Before and after the barrier that follows a visit.
  __device__ void report(const MaskMemory&) const {}
  __device__ void settle(const MaskMemory&) {}

 private:
  SharedArray<Vector> row_;
  int vectors_;
};

// A row that does not fit.  A visit of it lists the keys that it finds, for each thread its own, so
// that their order is the row's; if no list overflows the next visits, which ask for no smaller
// keys, go there.
class ListedRow {
 public:
  __device__ ListedRow(const MaskMemory& shared, const Share<S>& share, int argmax, int depth)
      : share_(share), lists_(shared.lists), argmax_(argmax), depth_(depth) {}

  template <typename Body>
  __device__ __forceinline__ void visit(Key least, Body body) {
    if (is_listed_) {
      for (int i = 0; i < used_; ++i) {
        const Key key = static_cast<Bits>(lists_[i * blockDim.x + threadIdx.x]);
        if (key >= least) body(key);
      }
      return;
    }
    used_ = 0;
    // Two in flight: with more, the sums and keys beside them no longer fit into 64 registers.
    for_each_vector<2>(share_, [&](const Vector& vector, int index) {
      const auto bits = bits_as<VectorBits>(vector);
      CAREF_UNROLL
      for (int k = 0; k < S::kWidth; ++k) {
        const Key key = key_at(bits, k);
        if (key < least || index * S::kWidth + k == argmax_) continue;
        if (used_ < depth_) lists_[used_ * blockDim.x + threadIdx.x] = static_cast<Bits>(key);
        ++used_;
        body(key);
      }
    });
  }

  __device__ void report(const MaskMemory& shared) const {
    if (!is_listed_ && used_ > depth_) atomicAdd(&shared.overflow[0], 1);
  }
  __device__ void settle(const MaskMemory& shared) {
    if (!is_listed_) is_listed_ = shared.overflow[0] == 0;
  }

 private:
  Share<S> share_;
  SharedArray<Bits> lists_;
  int argmax_, depth_;
  int used_ = 0;
  bool is_listed_ = false;
};

// A maximum as the bound of a bracket.  One that is read as 0 may be any number below the smallest
// normal one (-ftz).
constexpr T kLeastNormal =
    static_cast<T>(sizeof(T) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38);
__device__ __forceinline__ Key key_of_bound(T value, T subnormal) {
  return key_of(S::narrow(static_cast<double>(fabs(value) < kLeastNormal ? subnormal : value)));
}

// Leaves each warp's largest number, and the least of what its threads have as theirs.
__device__ __forceinline__ void note_maxima(T largest, const MaskMemory& shared) {
  T least = largest;
  CAREF_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other_least = __shfl_xor_sync(kAllLanes, least, step);
    const T other_largest = __shfl_xor_sync(kAllLanes, largest, step);
    least = other_least < least ? other_least : least;
    largest = larger(largest, other_largest);
  }
  if (threadIdx.x % kWarp != 0) return;
  shared.maxima[threadIdx.x / kWarp * 2] = least;
  shared.maxima[threadIdx.x / kWarp * 2 + 1] = largest;
}

// A key that at least k columns reach, for free: n parts of a row have n columns from the least of
// their maxima on.  The lowest finite one where k is larger.
__device__ __forceinline__ Key least_key(const MaskMemory& shared, int k) {
  const int warps = blockDim.x / kWarp, threads = blockDim.x;
  const int part = k <= warps ? 1 : 0;
  T least = static_cast<T>(kInfinity);
  for (int warp = 0; warp < warps; ++warp) {
    const T other = shared.maxima[warp * 2 + part];
    least = other < least ? other : least;
  }
  const Key key = key_of_bound(least, -kLeastNormal);
  return k <= threads && key > kLowestKey ? key : kLowestKey;
}

// Counts keys in the histogram; equal ones that follow one another in one addition.
class BinCounter {
 public:
  __device__ explicit BinCounter(const SharedArray<int>& histogram) : histogram_(histogram) {}

  __device__ __forceinline__ void add(int bin) {
    if (bin != bin_) flush();
    bin_ = bin;
    ++run_;
  }
  __device__ __forceinline__ void flush() {
    if (run_ > 0) atomicAdd(&histogram_[bin_], run_);
    run_ = 0;
  }

 private:
  SharedArray<int> histogram_;
  int bin_ = -1;
  int run_ = 0;
};

// Finds the bin with the key of this rank from the top, for shared.found; the rank becomes at most
// the number of keys.
__device__ __forceinline__ void find_bin(const MaskMemory& shared, int bins, int& rank) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int each = (bins + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int end = bins - static_cast<int>(threadIdx.x) * each;  // own bins: [end - each, end)
  int own = 0;
  for (int bin = end - 1; bin >= 0 && bin >= end - each; --bin) own += shared.histogram[bin];
  int upto = own;  // keys in the bins of this thread and of those before it
  CAREF_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == kWarp - 1) shared.counts[warp] = upto;
  __syncthreads();  // all warps have counted
  int total = 0;
  for (int i = 0; i < warps; ++i) {
    const int count = shared.counts[i];
    if (i < warp) upto += count;
    total += count;
  }
  rank = rank < total ? rank : total;
  int above = upto - own;
  if (above < rank && rank <= upto) {
    int bin = end - 1;
    for (int count; above + (count = shared.histogram[bin]) < rank; --bin) above += count;
    shared.found[kBin] = bin;
    shared.found[kAboveBin] = above;
    shared.found[kInBin] = shared.histogram[bin];
  }
  __syncthreads();  // the bin is there, and the histogram may be cleared
}

struct Selection {
  Key threshold;
  int support;  // k, or as many columns as are finite
  int above;    // columns with a larger key than the threshold
  int equal;    // columns with this key
};

// The k-th largest of the keys of `row` and `top`, all of them in [low, high] from the k-th on.
template <typename Row>
__device__ __forceinline__ Selection select_top(Row& row, const MaskMemory& shared, Key low,
                                                Key high, Key top, int k) {
  Selection selection{low, 0, 0, 0};
  int bits = 64 - __clzll(static_cast<long long>(high - low));
  int rank = k;
  do {
    const int shift = bits > kDigitBits ? bits - kDigitBits : 0, bins = 1 << (bits - shift);
    for (int i = threadIdx.x; i < bins; i += blockDim.x) shared.histogram[i] = 0;
    if (threadIdx.x == 0) shared.overflow[0] = 0;
    __syncthreads();  // the histogram is clear
    const Key base = selection.threshold;
    BinCounter counter(shared.histogram);
    const auto count = [&](Key key) {
      const Key bin = (key - base) >> shift;
      if (bin < static_cast<Key>(bins)) counter.add(static_cast<int>(bin));
    };
    row.visit(base, count);
    if (threadIdx.x == 0 && top >= base) count(top);
    counter.flush();
    row.report(shared);
    __syncthreads();  // the histogram is whole
    row.settle(shared);
    find_bin(shared, bins, rank);
    selection.threshold = base + (static_cast<Key>(shared.found[kBin]) << shift);
    selection.support = selection.above + rank;
    selection.above += shared.found[kAboveBin];
    selection.equal = shared.found[kInBin];
    rank -= shared.found[kAboveBin];
    bits = shift;
  } while (bits > 0);
  return selection;
}

}  // namespace
}  // namespace caref::cuda
