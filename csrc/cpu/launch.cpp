// The choice of the instruction set at run time, the label check, and the OpenMP loop over rows.
#include <omp.h>

#include <cstring>
#include <memory>

#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace caref::cpu {
namespace {

const KernelSet kKernelSets[] = {
#if defined(__x86_64__)
    {"x86-64-v4", x86_64_v4::forward, x86_64_v4::backward},
    {"x86-64-v3", x86_64_v3::forward, x86_64_v3::backward},
#endif
    {"baseline", baseline::forward, baseline::backward},
};

bool runs_here(const char* instruction_set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(instruction_set, "x86-64-v4")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && runs_here("x86-64-v3");
  }
  if (!strcmp(instruction_set, "x86-64-v3")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  }
#endif
  return !strcmp(instruction_set, "baseline");
}

// Powers of small probabilities are denormal in float32.  Arithmetic on denormals is a hundred
// times slower, and at the accuracy of the sums they equal 0.  Setting the mode here also makes the
// result independent of the caller's floating-point environment.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// About a hundred microseconds of work.  With less, starting a thread costs more than it saves.
constexpr int64_t kMinElementsPerThread = 32768;

}  // namespace

const KernelSet& select_kernels(const char* name) {
  const KernelSet* chosen = nullptr;
  for (const KernelSet& set : kKernelSets) {
    const bool wanted = *name ? !strcmp(name, set.instruction_set) : true;
    if (!chosen && wanted && runs_here(set.instruction_set)) chosen = &set;
  }
  return chosen ? *chosen : kKernelSets[sizeof(kKernelSets) / sizeof(kKernelSets[0]) - 1];
}

BadLabel find_bad_label(const RowParams& params) {
  if (params.targets_dtype != DType::kInt32 && params.targets_dtype != DType::kInt64)
    return {-1, 0};
  const bool narrow = params.targets_dtype == DType::kInt32;
  for (int64_t row = 0; row < params.rows(); ++row) {
    const int64_t label = narrow ? static_cast<const int32_t*>(params.targets)[row]
                                 : static_cast<const int64_t*>(params.targets)[row];
    if ((label < 0 || label >= params.columns) && label != params.ignore_index) return {row, label};
  }
  return {-1, 0};
}

int64_t forward_workspace(const RowParams& params) {
  if (!params.has_topk_mask()) return 0;
  // A key is as wide as the arithmetic type.  The additional 128 keys are needed because lists are
  // padded to a whole register.
  return (params.columns + 128) * (params.logits_dtype == DType::kFloat64 ? 8 : 4);
}

void run(RowRangeKernel kernel, const RowParams& params, int64_t workspace_bytes) {
  const int64_t rows = params.rows();
  if (rows == 0) return;
  const int64_t useful = rows * params.columns / kMinElementsPerThread + 1;
  const int threads = static_cast<int>(params.threads < useful ? params.threads : useful);
  // Scheduling is dynamic because ignored rows cost almost nothing, so equal numbers of rows are
  // not equal amounts of work.
  const int64_t wanted = kMinElementsPerThread / params.columns + 1;
  const int64_t chunk = wanted < rows ? wanted : rows;
  // The allocation precedes the parallel region, where std::bad_alloc can still be reported.
  const std::unique_ptr<char[]> workspaces(new char[threads * workspace_bytes]);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushDenormals flush;
    void* workspace = workspaces.get() + omp_get_thread_num() * workspace_bytes;
#pragma omp for schedule(dynamic, 1)
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      kernel(params, begin, begin + chunk < rows ? begin + chunk : rows, workspace);
    }
  }
}

}  // namespace caref::cpu
