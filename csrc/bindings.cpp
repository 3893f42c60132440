// The Python module caref_kernels._C; the only file that includes pybind11.  Python passes a plain
// struct of raw pointers and sizes.  The GIL is released while kernels run, and C++ errors become
// Python exceptions.  Python has checked the tensors, their dtypes and their shapes.
//
// setup.py defines CAREF_CUDA_ARCHITECTURES if it builds the CUDA kernels.  The tests build a
// module that has only the CUDA kernels and runs on the host; for that they define
// CAREF_WITHOUT_CPU.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#if !defined(CAREF_WITHOUT_CPU)
#include "cpu/kernels.h"
#endif
#if defined(CAREF_CUDA_ARCHITECTURES)
#include "cuda/kernels.h"
#endif
#include "row_layout.h"
#include "row_math.h"

namespace py = pybind11;
using caref::DType;
using caref::RowParams;

namespace {

const void* as_pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

template <typename P>
auto pointer_property(P RowParams::* field) {
  return std::make_pair(
      [field](const RowParams& params) { return reinterpret_cast<uintptr_t>(params.*field); },
      [field](RowParams& params, uintptr_t address) {
        params.*field = const_cast<P>(static_cast<const void*>(as_pointer(address)));
      });
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Checks the sizes and pointers of a call; Python has checked everything that concerns a tensor.
void check(const RowParams& params, bool is_backward) {
  require(params.outer_rows >= 0 && params.inner_rows >= 0, "rows must be >= 0");
  if (params.rows() == 0) return;
  require(params.columns > 0 && params.columns <= (int64_t{1} << 24),
          "columns must be in [1, 16777216]");
  require(params.vocab_size > 0, "vocab_size must be >= 1");
  require(params.k_min == 0 ||
              (params.k_min > 0 && params.k_min <= params.k_max && params.k_max <= params.columns),
          "k_min and k_max must be in [1, columns], or k_min 0");
  require(params.threads > 0, "threads must be >= 1");
  require(params.logits && params.stats, "logits and stats must not be null");
  require(params.logits_dtype >= DType::kFloat32 && params.logits_dtype <= DType::kFloat16,
          "logits: unknown dtype");
  require(params.targets_dtype == DType::kNone || params.targets_dtype >= DType::kInt32,
          "targets: unknown dtype");
  require(params.targets_dtype == DType::kNone || params.targets, "targets must not be null");
  require(is_backward ? params.grad_terms && params.grad_logits : params.terms != nullptr,
          "an output or gradient pointer is null");
}

#if !defined(CAREF_WITHOUT_CPU)

void check_labels(const RowParams& params) {
  const caref::cpu::BadLabel bad = caref::cpu::find_bad_label(params);
  if (bad.row < 0) return;
  throw std::out_of_range("labels: target " + std::to_string(bad.value) + " at row " +
                          std::to_string(bad.row) + " is out of range [0, " +
                          std::to_string(params.columns) +
                          ") and is not ignore_index=" + std::to_string(params.ignore_index));
}

caref::cpu::KernelSet kernels = caref::cpu::select_kernels();

void run_forward(const RowParams& params) {
  check(params, false);
  check_labels(params);
  const py::gil_scoped_release release;
  caref::cpu::run(kernels.forward, params, caref::cpu::forward_workspace(params));
}

void run_backward(const RowParams& params) {
  check(params, true);
  // The labels may have changed since the forward, and addresses are computed from them.
  check_labels(params);
  const py::gil_scoped_release release;
  caref::cpu::run(kernels.backward, params);
}

void use_instruction_set(const std::string& name) {
  const caref::cpu::KernelSet& chosen = caref::cpu::select_kernels(name.c_str());
  if (!name.empty() && name != chosen.instruction_set) {
    throw std::invalid_argument("instruction set '" + name + "' does not run on this machine");
  }
  kernels = chosen;
}

void bind_cpu(py::module_& module) {
  module.def("forward", &run_forward, "Terms and statistics of every row.");
  module.def("backward", &run_backward, "Gradient of every row.");
  module.def("instruction_set", [] { return std::string(kernels.instruction_set); });
  module.def("use_instruction_set", &use_instruction_set,
             "Select the kernels by instruction set ('' selects the best one); for tests and "
             "benchmarks.");
}

#else

void bind_cpu(py::module_&) {}

#endif

#if defined(CAREF_CUDA_ARCHITECTURES)

void raise_if_failed(const caref::cuda::Status& status) {
  if (!status.error) return;
  throw std::runtime_error(std::string("CUDA: ") + status.kernel + ": " + status.error);
}

int64_t cuda_forward_workspace(const RowParams& params) {
  int64_t bytes = 0;
  raise_if_failed(caref::cuda::forward_workspace(params, bytes));
  return bytes;
}

using CudaCall = caref::cuda::Status (*)(const RowParams&, const caref::cuda::Resources&);

void run_cuda(CudaCall call, bool is_backward, const RowParams& params, uintptr_t stream,
              uintptr_t workspace) {
  check(params, is_backward);
  caref::cuda::Status status;
  {
    const py::gil_scoped_release release;
    status = call(
        params, {const_cast<void*>(as_pointer(stream)), const_cast<void*>(as_pointer(workspace))});
  }
  raise_if_failed(status);
}

void bind_cuda(py::module_& module) {
  module.attr("CUDA_ARCHITECTURES") = CAREF_CUDA_ARCHITECTURES;
  module.def("cuda_forward_workspace", &cuda_forward_workspace,
             "Bytes of device memory that cuda_forward needs.");
  module.def("cuda_forward", [](const RowParams& params, uintptr_t stream, uintptr_t workspace) {
    run_cuda(&caref::cuda::forward, false, params, stream, workspace);
  });
  module.def("cuda_backward", [](const RowParams& params, uintptr_t stream) {
    run_cuda(&caref::cuda::backward, true, params, stream, 0);
  });
}

#else

void bind_cuda(py::module_& module) { module.attr("CUDA_ARCHITECTURES") = ""; }

#endif

void bind_params(py::module_& module) {
  py::class_<RowParams> params(module, "RowParams", py::module_local());
  params.def(py::init<>())
      .def_readwrite("outer_rows", &RowParams::outer_rows)
      .def_readwrite("inner_rows", &RowParams::inner_rows)
      .def_readwrite("outer_stride", &RowParams::outer_stride)
      .def_readwrite("inner_stride", &RowParams::inner_stride)
      .def_readwrite("columns", &RowParams::columns)
      .def_readwrite("ignore_index", &RowParams::ignore_index)
      .def_readwrite("alpha", &RowParams::alpha)
      .def_readwrite("beta", &RowParams::beta)
      .def_readwrite("vocab_size", &RowParams::vocab_size)
      .def_readwrite("with_sced", &RowParams::with_sced)
      .def_readwrite("k_scale", &RowParams::k_scale)
      .def_readwrite("k_min", &RowParams::k_min)
      .def_readwrite("k_max", &RowParams::k_max)
      .def_readwrite("grad_row_stride", &RowParams::grad_row_stride)
      .def_readwrite("grad_term_stride", &RowParams::grad_term_stride)
      .def_readwrite("with_mean_of_shifts", &RowParams::with_mean_of_shifts)
      .def_readwrite("has_column_grads", &RowParams::has_column_grads)
      .def_readwrite("out_outer_stride", &RowParams::out_outer_stride)
      .def_readwrite("out_inner_stride", &RowParams::out_inner_stride)
      .def_readwrite("threads", &RowParams::threads)
      .def_property(
          "logits_dtype", [](const RowParams& p) { return static_cast<int>(p.logits_dtype); },
          [](RowParams& p, int code) { p.logits_dtype = static_cast<DType>(code); })
      .def_property(
          "targets_dtype", [](const RowParams& p) { return static_cast<int>(p.targets_dtype); },
          [](RowParams& p, int code) { p.targets_dtype = static_cast<DType>(code); });
  const auto add_pointer = [&params](const char* name, auto field) {
    auto [get, set] = pointer_property(field);
    params.def_property(name, get, set);
  };
  add_pointer("logits", &RowParams::logits);
  add_pointer("targets", &RowParams::targets);
  add_pointer("terms", &RowParams::terms);
  add_pointer("stats", &RowParams::stats);
  add_pointer("grad_terms", &RowParams::grad_terms);
  add_pointer("grad_logits", &RowParams::grad_logits);

  py::dict dtypes;
  dtypes["torch.float32"] = static_cast<int>(DType::kFloat32);
  dtypes["torch.float64"] = static_cast<int>(DType::kFloat64);
  dtypes["torch.bfloat16"] = static_cast<int>(DType::kBFloat16);
  dtypes["torch.float16"] = static_cast<int>(DType::kFloat16);
  dtypes["torch.int32"] = static_cast<int>(DType::kInt32);
  dtypes["torch.int64"] = static_cast<int>(DType::kInt64);
  dtypes["torch.bool"] = static_cast<int>(DType::kBool);
  module.attr("DTYPES") = dtypes;
}

// The counterparts of objective.py, for the test that compares them on a grid.
void bind_formulas(py::module_& module) {
  py::module_ formulas = module.def_submodule("row_math", "The row formulas, in float64.");
  formulas.def("log_ratio_offset", &caref::log_ratio_offset);
  formulas.def("entropy", &caref::entropy);
  formulas.def("row_num_kept", &caref::row_num_kept);
  formulas.def("sced_density", [](double p, double log_ratio, double q, double alpha, double beta) {
    return caref::sced_density(p, log_ratio, q, caref::Exponents(alpha, beta));
  });
  formulas.def("sced_slope", [](double p, double log_ratio, double q, double alpha, double beta) {
    return caref::sced_slope<double>(p, log_ratio, q, caref::Exponents(alpha, beta));
  });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of caref_kernels; see csrc/.";
  bind_params(module);
  bind_cpu(module);
  bind_cuda(module);
  bind_formulas(module);
}
