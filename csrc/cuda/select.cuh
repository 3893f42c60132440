// The k largest logits of a row: the threshold and the numbers of columns above it and equal to it,
// exactly, without a sort and without indices.  This is a radix select: for each digit of the keys,
// from the most significant one, a histogram in shared memory counts the keys with each value of
// the digit, and the search continues in the bin that holds rank k.  Counts are integers, so the
// result does not depend on the order of the atomic additions.
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
constexpr int kTopKWarps = kTopKThreads / kWarp;
constexpr Key kLowestKey = kZeroKey<Element> - (S::kInfinityBits - 1);  // key of the lowest finite

// Results of the set-up by thread 0, for its block.
enum TopKFlag : int { kTopColumn = 0, kHasTopKMask = 1, kNumWanted = 2, kNumTopKFlags = 3 };
enum TopKConstant : int { kInverseD = 0, kOffset = 1, kTopValue = 2, kNumTopKConstants = 3 };
enum Found : int { kBin = 0, kAboveBin = 1, kInBin = 2, kNumFound = 3 };

// Shared memory of topk_kernel: small arrays, the histogram, then the row or the lists of keys.
struct TopKMemory {
  static constexpr int kTotals = kTopKWarps * kScedSums * sizeof(double);
  static constexpr int kTopValues = kTotals + kScedSums * sizeof(double);
  static constexpr int kMaxima = kTopValues + kTopKWarps * sizeof(T);
  static constexpr int kConstants = kMaxima + 2 * kTopKWarps * sizeof(T);
  static constexpr int kTopVectors = kConstants + kNumTopKConstants * sizeof(T);
  static constexpr int kFlags = kTopVectors + kTopKWarps * sizeof(int);
  static constexpr int kCounts = kFlags + kNumTopKFlags * sizeof(int);
  static constexpr int kFoundBin = kCounts + kTopKWarps * sizeof(int);
  static constexpr int kHistogram = kFoundBin + kNumFound * sizeof(int);
  static constexpr int kOverflow = kHistogram + kBins * sizeof(int);
  static constexpr int kRow = (kOverflow + static_cast<int>(sizeof(int)) + 15) / 16 * 16;
  static_assert(kRow <= kTopKBytes, "topk_config() reserves kTopKBytes");

  SharedArray<double> sums;    // one element per warp and sum
  SharedArray<double> totals;  // one element per sum
  SharedArray<T> top_values;
  SharedArray<T> maxima;  // per warp: the least of its threads' maxima, and its own maximum
  SharedArray<T> constants;
  SharedArray<int> top_vectors;
  SharedArray<int> flags;
  SharedArray<int> counts;  // keys in the bins of a warp
  SharedArray<int> found;
  SharedArray<int> histogram;
  SharedArray<int> overflow;  // number of threads whose list has overflowed
  SharedArray<Vector> row;
  SharedArray<Element> columns;  // aliases `row`
  SharedArray<Bits> lists;       // aliases `row`

  __device__ explicit TopKMemory(unsigned char* memory)
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

// A row in shared memory, without its arg-max column.  visit() calls body(key), in order, for every
// column of this thread whose key is at least `least`.
class KeptRow {
 public:
  __device__ KeptRow(const TopKMemory& shared, int vectors) : row_(shared.row), vectors_(vectors) {}

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

  // Called before and after the barrier that follows a visit.
  __device__ void report(const TopKMemory&) const {}
  __device__ void settle(const TopKMemory&) {}

 private:
  SharedArray<Vector> row_;
  int vectors_;
};

// A row that does not fit into shared memory.  The first visit appends the keys that it finds to a
// list of the thread, in the order of the row.  Later visits never ask for smaller keys, so if no
// list has overflowed they read the lists instead of the row.
class ListedRow {
 public:
  __device__ ListedRow(const TopKMemory& shared, const RowChunk<S>& chunk, int argmax, int depth)
      : chunk_(chunk), lists_(shared.lists), argmax_(argmax), depth_(depth) {}

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
    // Two vectors in flight: with more, the sums and keys would not fit into 64 registers.
    for_each_vector<2>(chunk_, [&](const Vector& vector, int index) {
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

  __device__ void report(const TopKMemory& shared) const {
    if (!is_listed_ && used_ > depth_) atomicAdd(&shared.overflow[0], 1);
  }
  __device__ void settle(const TopKMemory& shared) {
    if (!is_listed_) is_listed_ = shared.overflow[0] == 0;
  }

 private:
  RowChunk<S> chunk_;
  SharedArray<Bits> lists_;
  int argmax_, depth_;
  int used_ = 0;
  bool is_listed_ = false;
};

// The key of a maximum that bounds a bracket.  With -ftz a maximum that reads as 0 may be any
// subnormal number, so the bound `subnormal` is used for it.
constexpr T kMinNormal =
    static_cast<T>(sizeof(T) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38);
__device__ __forceinline__ Key key_of_bound(T value, T subnormal) {
  return key_of(S::narrow(static_cast<double>(fabs(value) < kMinNormal ? subnormal : value)));
}

// Records each warp's maximum and the least of its threads' maxima.
__device__ __forceinline__ void note_maxima(T largest, const TopKMemory& shared) {
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

// A key that at least k columns reach: if a row has n >= k parts, then at least k columns are not
// below the least of the n maxima, which are known already.  For larger k it is the lowest finite
// key.
__device__ __forceinline__ Key least_key(const TopKMemory& shared, int k) {
  const int warps = blockDim.x / kWarp, threads = blockDim.x;
  const int part = k <= warps ? 1 : 0;
  T least = static_cast<T>(kInfinity);
  for (int warp = 0; warp < warps; ++warp) {
    const T other = shared.maxima[warp * 2 + part];
    least = other < least ? other : least;
  }
  const Key key = key_of_bound(least, -kMinNormal);
  return k <= threads && key > kLowestKey ? key : kLowestKey;
}

// Counts keys in the histogram; consecutive equal bins are counted with one atomic addition.
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

// Writes to shared.found the bin that holds the key of this rank, counted from the largest.  The
// rank is lowered to the number of keys if it is larger.
__device__ __forceinline__ void find_bin(const TopKMemory& shared, int bins, int& rank) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int each = (bins + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int end = bins - static_cast<int>(threadIdx.x) * each;  // own bins: [end - each, end)
  int own = 0;
  for (int bin = end - 1; bin >= 0 && bin >= end - each; --bin) own += shared.histogram[bin];
  int upto = own;  // keys in the bins of this thread and of the threads before it
  CAREF_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == kWarp - 1) shared.counts[warp] = upto;
  __syncthreads();  // the counts of all warps are written
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
  __syncthreads();  // the bin is written, and the histogram may be cleared
}

struct Selection {
  Key threshold;
  int num_kept;  // k, or the number of finite columns if it is smaller
  int above;     // columns with a larger key than the threshold
  int equal;     // columns with this key
};

// The k-th largest of the keys of `row` and of `top`.  It and all larger keys are in [low, high].
template <typename Row>
__device__ __forceinline__ Selection select_top(Row& row, const TopKMemory& shared, Key low,
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
    __syncthreads();  // the histogram is complete
    row.settle(shared);
    find_bin(shared, bins, rank);
    selection.threshold = base + (static_cast<Key>(shared.found[kBin]) << shift);
    selection.num_kept = selection.above + rank;
    selection.above += shared.found[kAboveBin];
    selection.equal = shared.found[kInBin];
    rank -= shared.found[kAboveBin];
    bits = shift;
  } while (bits > 0);
  return selection;
}

}  // namespace
}  // namespace caref::cuda
