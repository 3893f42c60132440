// The entry points of the CUDA half, for bindings.cpp: no CUDA header is needed to include this.
#pragma once

#include <cstdint>

#include "../row_layout.h"

namespace caref::cuda {

// What became of a call: `kernel` is the name of the kernel whose launch failed, or of the runtime
// function that did, and `error` what the runtime says about it; both are null after a success.
// Launches are asynchronous: an error inside a kernel is reported by a later call.
struct Status {
  const char* kernel = nullptr;
  const char* error = nullptr;
};

// What one call may use besides its tensors.
struct Resources {
  void* stream = nullptr;     // of the current device
  void* workspace = nullptr;  // of forward_workspace() bytes, 8-byte aligned
};

// Bytes of device memory that forward() needs for rows that several blocks share; 0 is common.
Status forward_workspace(const RowParams& params, int64_t& bytes);

// Terms and statistics, or the gradient, of every row.
Status forward(const RowParams& params, const Resources& resources);
Status backward(const RowParams& params, const Resources& resources);

}  // namespace caref::cuda
