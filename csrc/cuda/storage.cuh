// Loads and stores of columns, 16 bytes at a time, which is the widest load of a thread, and their
// conversion to the arithmetic type.  16-bit floats are widened exactly and rounded once, to
// nearest even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "../row_results.h"

namespace caref::cuda {

constexpr int kVectorBytes = 16;
using Vector = uint4;

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// float and double are stored as they are computed with.
template <typename T>
struct PlainStorage {
  using Element = T;
  using Arithmetic = T;
  static constexpr int kWidth = kVectorBytes / sizeof(T);  // columns of a vector

  struct Numbers {
    T at[kWidth];
  };
  static __device__ __forceinline__ Numbers unpack(const Vector& vector) {
    return bits_as<Numbers>(vector);
  }
  static __device__ __forceinline__ Vector pack(const Numbers& numbers) {
    return bits_as<Vector>(numbers);
  }
  static __device__ __forceinline__ T widen(T element) { return element; }
  static __device__ __forceinline__ T narrow(double value) { return static_cast<T>(value); }

  // The largest column.  A NaN is never the maximum; it makes the row NaN through the sums.
  static __device__ __forceinline__ T maximum(const Vector& vector) {
    const Numbers z = unpack(vector);
    T largest = z.at[0];
    CAREF_UNROLL
    for (int i = 1; i < kWidth; ++i) largest = larger(largest, z.at[i]);
    return largest;
  }
};

// Two 16-bit floats in a 32-bit word, which the GPU compares and rounds with one instruction.
template <typename Derived>
struct PairedStorage {
  using Element = uint16_t;
  using Arithmetic = float;
  static constexpr int kWidth = 8;

  struct Numbers {
    float at[kWidth];
  };
  static __device__ __forceinline__ Numbers unpack(const Vector& vector) {
    Numbers numbers;
    Derived::widen_pair(vector.x, numbers.at[0], numbers.at[1]);
    Derived::widen_pair(vector.y, numbers.at[2], numbers.at[3]);
    Derived::widen_pair(vector.z, numbers.at[4], numbers.at[5]);
    Derived::widen_pair(vector.w, numbers.at[6], numbers.at[7]);
    return numbers;
  }
  static __device__ __forceinline__ Vector pack(const Numbers& numbers) {
    return {Derived::narrow_pair(numbers.at[0], numbers.at[1]),
            Derived::narrow_pair(numbers.at[2], numbers.at[3]),
            Derived::narrow_pair(numbers.at[4], numbers.at[5]),
            Derived::narrow_pair(numbers.at[6], numbers.at[7])};
  }
  static __device__ __forceinline__ float widen(uint16_t element) {
    float low, high;
    Derived::widen_pair(element, low, high);
    return low;
  }
  static __device__ __forceinline__ uint16_t narrow(double value) {
    return static_cast<uint16_t>(Derived::narrow_pair(static_cast<float>(value), 0.0f));
  }
  static __device__ __forceinline__ float maximum(const Vector& vector) {
    using Pair = typename Derived::Pair;
    const Pair left = __hmax2(bits_as<Pair>(vector.x), bits_as<Pair>(vector.y));
    const Pair right = __hmax2(bits_as<Pair>(vector.z), bits_as<Pair>(vector.w));
    float low, high;
    Derived::widen_pair(bits_as<uint32_t>(__hmax2(left, right)), low, high);
    return fmaxf(low, high);
  }
};

struct BFloat16 : PairedStorage<BFloat16> {
  static constexpr uint32_t kInfinityBits = 0x7f80;
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ void widen_pair(uint32_t word, float& low, float& high) {
    low = bits_as<float>(word << 16);
    high = bits_as<float>(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  }
};

struct Float16 : PairedStorage<Float16> {
  static constexpr uint32_t kInfinityBits = 0x7c00;
  using Pair = __half2;
  static __device__ __forceinline__ void widen_pair(uint32_t word, float& low, float& high) {
    const float2 both = __half22float2(bits_as<__half2>(word));
    low = both.x;
    high = both.y;
  }
  static __device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  }
};

struct Float32 : PlainStorage<float> {
  static constexpr uint32_t kInfinityBits = 0x7f800000;
};
struct Float64 : PlainStorage<double> {
  static constexpr uint64_t kInfinityBits = 0x7ff0000000000000;
};

// One block's chunk of a row: columns [0, columns) from `data`, as vectors.  Every thread takes the
// same columns whether or not the chunk starts at a multiple of 16 bytes, so the results of a row
// are bitwise identical for every alignment.
template <typename S>
class RowChunk {
 public:
  using Element = typename S::Element;

  __device__ RowChunk(const Element* data, int columns)
      : data_(data),
        columns_(columns),
        whole_(reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 ? columns / S::kWidth : 0) {}

  __device__ __forceinline__ int vectors() const { return (columns_ + S::kWidth - 1) / S::kWidth; }
  // The number of vectors that one load fetches: 0 if the chunk is misaligned.
  __device__ __forceinline__ int whole() const { return whole_; }

  __device__ __forceinline__ Vector load_whole(int index) const {
    return reinterpret_cast<const Vector*>(data_)[index];
  }

  // Loads any vector column by column.  Columns past the end are -inf, which adds 0 to every sum.
  __device__ __forceinline__ Vector load(int index) const {
    struct {
      Element at[S::kWidth];
    } elements;
    CAREF_UNROLL
    for (int i = 0; i < S::kWidth; ++i) {
      const int column = index * S::kWidth + i;
      elements.at[i] = column < columns_ ? data_[column] : S::narrow(-kInfinity);
    }
    return bits_as<Vector>(elements);
  }

 private:
  const Element* data_;
  int columns_;
  int whole_;
};

// Calls body(vector, index) for the vectors of a chunk that belong to this thread, in order, with
// kBatch whole vectors in flight at a time.
template <int kBatch, typename S, typename Body>
__device__ __forceinline__ void for_each_vector(const RowChunk<S>& chunk, Body body) {
  const int threads = blockDim.x, whole = chunk.whole();
  int next = threadIdx.x;
  for (; next < whole; next += kBatch * threads) {
    Vector batch[kBatch];
    CAREF_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (next + i * threads < whole) batch[i] = chunk.load_whole(next + i * threads);
    }
    CAREF_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (next + i * threads < whole) body(batch[i], next + i * threads);
    }
  }
  // The last batch may have advanced too far: go back to this thread's first vector that is not
  // whole.
  while (next - threads >= whole) next -= threads;
  for (; next < chunk.vectors(); next += threads) body(chunk.load(next), next);
}

// The columns of a chunk for writing.
template <typename S>
class OutputChunk {
 public:
  using Element = typename S::Element;

  __device__ OutputChunk(Element* data, int columns)
      : data_(data),
        columns_(columns),
        whole_(reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 ? columns / S::kWidth : 0) {}

  __device__ __forceinline__ void store(int index, const Vector& vector) const {
    if (index < whole_) {
      reinterpret_cast<Vector*>(data_)[index] = vector;
      return;
    }
    struct Elements {
      Element at[S::kWidth];
    };
    const Elements elements = bits_as<Elements>(vector);
    CAREF_UNROLL
    for (int i = 0; i < S::kWidth; ++i) {
      const int column = index * S::kWidth + i;
      if (column < columns_) data_[column] = elements.at[i];
    }
  }

  __device__ __forceinline__ void store_one(int column, double value) const {
    data_[column] = S::narrow(value);
  }

 private:
  Element* data_;
  int columns_;
  int whole_;
};

}  // namespace caref::cuda
