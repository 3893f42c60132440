// How kernels are launched: the plan of a call (threads of a block, slices of a row), and launches
// whose error, if there is one, is kept with the kernel's name.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "slices.cuh"

namespace caref::cuda {

// Blocks that a multiprocessor holds at a time, in registers (__launch_bounds__) and in shared
// memory (Device::share_bytes).  The forward alternates between fetching a share and summing it, so
// one block's arithmetic hides the memory latency of another; three leave 80 registers to a thread.
// float64, and the 17 sums of alpha = 4, beta = 2, need more.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;
template <typename T, typename Kind>
constexpr int kForwardBlocks = Kind::kMoments > 12 ? 2 : kBlocks<T>;

// Of the forward with a mask, which has one block for a whole row: more threads, fewer blocks. Real
// powers and float64 take more than 64 registers.
constexpr int kMaskThreads = 512;
template <typename T, typename Kind>
constexpr int kMaskBlocks = sizeof(T) == 8 || !Kind::kOnePass ? 1 : 2;
// Its shared memory besides the row: the histogram and small arrays, at most.
constexpr int kMaskBytes = 9 * 1024;

// What the choice depends on besides the shape.
struct Device {
  int multiprocessors = 0;
  int shared_per_multiprocessor = 0;  // bytes
  int shared_per_block = 0;           // the most that one block may ask for
  int most_blocks = 0;                // of a launch

  // Shared memory for a block's share of a row, `blocks` of them on a multiprocessor.
  int share_bytes(int blocks) const;
};

struct Plan {
  int threads = 0;      // of a block, a multiple of kWarp
  int slices = 0;       // of a row
  int columns = 0;      // of a slice, a multiple of a vector's
  int most_blocks = 0;  // of a launch

  int share_bytes(int element_bytes) const { return columns * element_bytes; }
};

// A row is cut where it does not fit into shared memory, and where there are too few rows to give
// every multiprocessor its blocks.
Plan forward_plan(const RowParams& params, const Device& device);
// The backward keeps nothing: slices are as long as repays the set-up of a block.
Plan backward_plan(const RowParams& params, const Device& device);

// One slice to a row.
struct MaskPlan {
  Plan blocks;
  bool row_fits = false;  // into shared memory
  int depth = 0;          // if not: places in each thread's list of keys
};
MaskPlan mask_plan(const RowParams& params, const Device& device);

// Whether SCED is over the top k: then the sums of the dense kernels leave it out.
inline bool has_mask(const RowParams& params) { return params.is_masked() && params.with_sced; }

// The kernels of one storage type: forward.cu, select.cu and backward.cu, compiled for each.
template <typename S>
Status forward_of(const RowParams& params, const Plan& plan, const Resources& resources);
template <typename S>
int64_t forward_workspace_of(const RowParams& params, const Plan& plan);
// The mask and SCED, and everything else too if the row fits.
template <typename S>
Status mask_of(const RowParams& params, const MaskPlan& plan, const Resources& resources);
template <typename S>
Status backward_of(const RowParams& params, const Plan& plan, const Resources& resources);

// As visit_exponents().  float64 is for checks: of the expansions it has the default one alone, and
// takes two passes for the others.
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

// With a mask the columns outside of it take no part, so the default exponents alone have kernels
// of their own.
template <typename Visitor>
void visit_masked_kinds(const RowParams& params, Visitor visitor) {
  if (params.alpha == 2.0 && params.beta == 1.0) return visitor(Masked<EvenExponents<2, 1>>{});
  visitor(Masked<AnyExponents>{});
}

// A sequence of launches on one stream; after the first error the others are left out.
class Launches {
 public:
  Launches(void* stream, const Plan& plan)
      : stream_(static_cast<cudaStream_t>(stream)), plan_(plan) {}

  Status status() const { return status_; }

  // A block for each slice of each row.
  template <typename... Parameters, typename... Arguments>
  void each_slice(const char* name, void (*kernel)(Parameters...), int shared_bytes,
                  const RowParams& params, Arguments... arguments) {
    const int64_t most_rows = plan_.most_blocks / plan_.slices;
    for (int64_t first = 0; first < params.rows() && !status_.error; first += most_rows) {
      const int64_t left = params.rows() - first;
      const int64_t rows = left < most_rows ? left : most_rows;
      launch(name, kernel, static_cast<unsigned>(rows * plan_.slices), plan_.threads, shared_bytes,
             params, slices_from(first), arguments...);
    }
  }

  // A thread (rows_per_block = threads) or a block (1) for each row.
  template <typename... Parameters, typename... Arguments>
  void each_row(const char* name, void (*kernel)(Parameters...), int threads, int rows_per_block,
                const RowParams& params, Arguments... arguments) {
    const int64_t most_rows = static_cast<int64_t>(plan_.most_blocks) * rows_per_block;
    for (int64_t first = 0; first < params.rows() && !status_.error; first += most_rows) {
      const int64_t left = params.rows() - first;
      const int64_t rows = left < most_rows ? left : most_rows;
      launch(name, kernel, static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block),
             threads, 0, params, slices_from(first), arguments...);
    }
  }

 private:
  Slices slices_from(int64_t first_row) const { return {first_row, plan_.slices, plan_.columns}; }

  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, int threads,
              int shared_bytes, Arguments... arguments) {
    // Without this a launch may not ask for more; it is a property of the kernel, set again because
    // another device may be current than the last time.
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
    cudaGetLastError();  // takes the error back, so that the next call does not report it too
    status_ = {name, cudaGetErrorString(error)};
  }

  cudaStream_t stream_;
  Plan plan_;
  Status status_;
};

}  // namespace caref::cuda
