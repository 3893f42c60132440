// The entry points that are compiled once per instruction set, and what runs around them.
#pragma once

#include <cstdint>

#include "../row_layout.h"

namespace caref::cpu {

// Terms and statistics, or the gradient, of the rows [begin, end), with `workspace_bytes` of memory
// of this thread's own.
using RowRangeKernel = void (*)(const RowParams&, int64_t begin, int64_t end, void* workspace);

struct KernelSet {
  const char* instruction_set;
  RowRangeKernel forward;
  RowRangeKernel backward;
};

#define CAREF_DECLARE_KERNELS(isa)                                    \
  namespace isa {                                                     \
  void forward(const RowParams&, int64_t begin, int64_t end, void*);  \
  void backward(const RowParams&, int64_t begin, int64_t end, void*); \
  }

#if defined(__x86_64__)
CAREF_DECLARE_KERNELS(x86_64_v4)
CAREF_DECLARE_KERNELS(x86_64_v3)
#endif
CAREF_DECLARE_KERNELS(baseline)
#undef CAREF_DECLARE_KERNELS

// The best set for this machine, or the one called `name` ("" for the best).
const KernelSet& select_kernels(const char* name = "");

// A label outside [0, columns) that is not ignore_index; row is -1 if there is none.
struct BadLabel {
  int64_t row;
  int64_t value;
};
BadLabel find_bad_label(const RowParams& params);

// Run a kernel over all rows with params.threads threads.  The result does not depend on their
// number.
void run(RowRangeKernel kernel, const RowParams& params, int64_t workspace_bytes = 0);

// What the forward needs: the keys of a row, for the selection of a mask.
int64_t forward_workspace(const RowParams& params);

}  // namespace caref::cpu
