// The entry points of the CUDA kernels for bindings.cpp; including this file needs no CUDA header.
#pragma once

#include <cstdint>

#include "../row_layout.h"

namespace caref::cuda {

// The outcome of a call: the name of the kernel whose launch failed, or of the runtime function
// that failed, and the runtime's description of the error.  Both are null after a success. Launches
// are asynchronous, so an error inside a kernel is reported by a later call.
struct Status {
  const char* kernel = nullptr;
  const char* error = nullptr;
};

// The stream of a call and its memory besides the tensors.
struct Resources {
  void* stream = nullptr;     // of the current device
  void* workspace = nullptr;  // of forward_workspace() bytes, 8-byte aligned
};

// Bytes of device memory that forward() needs for the partial results of rows that several blocks
// share; usually 0.
Status forward_workspace(const RowParams& params, int64_t& bytes);

// Launch the kernels for the terms and statistics, or for the gradient, of every row.
Status forward(const RowParams& params, const Resources& resources);
Status backward(const RowParams& params, const Resources& resources);

}  // namespace caref::cuda
