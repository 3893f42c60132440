// The launch configuration of a call (threads per block, splits per row), and launches that keep
// the first error with the name of its kernel.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "splits.cuh"

namespace caref::cuda {

// Blocks that are resident on a multiprocessor at a time; this limits their registers
// (__launch_bounds__) and shared memory (Device::chunk_bytes).  A block of the forward first loads
// its chunk and then sums it, so the arithmetic of one block hides the memory latency of another.
// Three blocks leave 80 registers to a thread; float64, and the 17 sums of alpha = 4, beta = 2,
// need more.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;
template <typename T, typename Kind>
constexpr int kForwardBlocks = Kind::kMoments > 12 ? 2 : kBlocks<T>;

// The same for topk_kernel, which has one block for a whole row and therefore more threads and
// fewer blocks.  Fractional powers and float64 need more than 64 registers per thread, so one
// block.
constexpr int kTopKThreads = 512;
template <typename T, typename Kind>
constexpr int kTopKBlocks = sizeof(T) == 8 || !Kind::kOnePass ? 1 : 2;
// An upper bound of its shared memory besides the row: the histogram and small arrays.
constexpr int kTopKBytes = 9 * 1024;

// The properties of a device that the launch configuration depends on.
struct Device {
  int multiprocessors = 0;
  int shared_per_multiprocessor = 0;  // bytes
  int shared_per_block = 0;           // bytes; the most that one block may request
  int max_blocks = 0;                 // of a launch

  // Bytes of shared memory for a block's chunk of a row, if `blocks` blocks are resident on a
  // multiprocessor.
  int chunk_bytes(int blocks) const;
};

struct LaunchConfig {
  int threads = 0;     // of a block, a multiple of kWarp
  int splits = 0;      // of a row
  int columns = 0;     // of a split, a multiple of the columns of a vector
  int max_blocks = 0;  // of a launch

  int chunk_bytes(int element_bytes) const { return columns * element_bytes; }
};

// A row is split if it does not fit into shared memory, or if there are too few rows to give every
// multiprocessor its blocks.
LaunchConfig forward_config(const RowParams& params, const Device& device);
// The backward keeps nothing in shared memory; its splits are long enough to amortise the set-up of
// a block.
LaunchConfig backward_config(const RowParams& params, const Device& device);

// One block per row.
struct TopKLaunchConfig {
  LaunchConfig blocks;
  bool row_fits = false;  // whether a row fits into shared memory
  int depth = 0;          // otherwise: the capacity of each thread's list of keys
};
TopKLaunchConfig topk_config(const RowParams& params, const Device& device);

// Whether SCED has a top-k mask.  The dense kernels then leave SCED out.
inline bool uses_topk_mask(const RowParams& params) {
  return params.has_topk_mask() && params.with_sced;
}

// The kernels of one storage type: forward.cu, select.cu and backward.cu, compiled for each.
template <typename S>
Status forward_of(const RowParams& params, const LaunchConfig& config, const Resources& resources);
template <typename S>
int64_t forward_workspace_of(const RowParams& params, const LaunchConfig& config);
// Computes the top-k mask and SCED, and the other terms and statistics too if the row fits into
// shared memory.
template <typename S>
Status topk_of(const RowParams& params, const TopKLaunchConfig& config, const Resources& resources);
template <typename S>
Status backward_of(const RowParams& params, const LaunchConfig& config, const Resources& resources);

// As visit_exponents(), but float64, which is used for verification, has the one-pass kernel of the
// default exponents only and takes two passes for the others.
template <typename S, typename Visitor>
void visit_kinds(const RowParams& params, Visitor visitor) {
  visit_exponents(params, [&](auto kind) {
    if constexpr (sizeof(typename S::Element) == 8 && decltype(kind)::kOnePass &&
                  !std::is_same_v<decltype(kind), EvenExponents<2, 1>>) {
      visitor(AnyExponents{});
    } else {
      visitor(kind);
    }
  });
}

// With a top-k mask only the columns in it are summed, so the cost of SCED matters little and only
// the default exponents have kernels of their own.
template <typename Visitor>
void visit_topk_kinds(const RowParams& params, Visitor visitor) {
  if (params.alpha == 2.0 && params.beta == 1.0) return visitor(TopKMasked<EvenExponents<2, 1>>{});
  visitor(TopKMasked<AnyExponents>{});
}

// A sequence of launches on one stream; after the first error the remaining ones are skipped.
class Launches {
 public:
  Launches(void* stream, const LaunchConfig& config)
      : stream_(static_cast<cudaStream_t>(stream)), config_(config) {}

  Status status() const { return status_; }

  // Launches one block per split of each row.
  template <typename... Parameters, typename... Arguments>
  void each_split(const char* name, void (*kernel)(Parameters...), int shared_bytes,
                  const RowParams& params, Arguments... arguments) {
    const int64_t max_rows = config_.max_blocks / config_.splits;
    for (int64_t first = 0; first < params.rows() && !status_.error; first += max_rows) {
      const int64_t left = params.rows() - first;
      const int64_t rows = left < max_rows ? left : max_rows;
      launch(name, kernel, static_cast<unsigned>(rows * config_.splits), config_.threads,
             shared_bytes, params, splits_from(first), arguments...);
    }
  }

  // Launches one thread (rows_per_block = threads) or one block (rows_per_block = 1) per row.
  template <typename... Parameters, typename... Arguments>
  void each_row(const char* name, void (*kernel)(Parameters...), int threads, int rows_per_block,
                const RowParams& params, Arguments... arguments) {
    const int64_t max_rows = static_cast<int64_t>(config_.max_blocks) * rows_per_block;
    for (int64_t first = 0; first < params.rows() && !status_.error; first += max_rows) {
      const int64_t left = params.rows() - first;
      const int64_t rows = left < max_rows ? left : max_rows;
      launch(name, kernel, static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block),
             threads, 0, params, splits_from(first), arguments...);
    }
  }

 private:
  Splits splits_from(int64_t first_row) const {
    return {first_row, config_.splits, config_.columns};
  }

  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, int threads,
              int shared_bytes, Arguments... arguments) {
    // A launch may use more than this only after the kernel's attribute has been set.  It is set at
    // every launch, because it belongs to the device that is current.
    constexpr int kUsualSharedBytes = 48 * 1024;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kUsualSharedBytes) {
      error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    if (error == cudaSuccess) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(blocks);
      config.blockDim = dim3(threads);
      config.dynamicSmemBytes = shared_bytes;
      config.stream = stream_;
      error = cudaLaunchKernelEx(&config, kernel, arguments...);
    }
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that the next call does not report it again
    status_ = {name, cudaGetErrorString(error)};
  }

  cudaStream_t stream_;
  LaunchConfig config_;
  Status status_;
};

}  // namespace caref::cuda
