// The entry points of the CPU kernels, which are compiled once per instruction set, and the
// functions that select and run them.
#pragma once

#include <cstdint>

#include "../row_layout.h"

namespace caref::cpu {

// Computes terms and statistics, or the gradient, of the rows [begin, end).  `workspace` is memory
// that only the calling thread uses.
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

// The set called `name`, or the baseline set if that one does not run on this machine; the best set
// for this machine if `name` is empty.
const KernelSet& select_kernels(const char* name = "");

// The first label outside [0, columns) that is not ignore_index; `row` is -1 if there is none.
struct BadLabel {
  int64_t row;
  int64_t value;
};
BadLabel find_bad_label(const RowParams& params);

// Runs a kernel over all rows with params.threads threads, each with `workspace_bytes` of its own.
// The result does not depend on the number of threads.
void run(RowRangeKernel kernel, const RowParams& params, int64_t workspace_bytes = 0);

// Workspace bytes per thread that the forward needs: the integer keys of one row, from which the
// top-k mask is selected.
int64_t forward_workspace(const RowParams& params);

}  // namespace caref::cpu
