// The Python module caref_kernels._C, and the only file that sees pybind11: a plain struct of raw
// pointers and sizes comes in, the GIL is released while kernels run, a C++ error goes out as an
// exception.  Tensors, their dtypes and their shapes are checked in Python.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
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

// What a caller could get wrong with raw sizes; Python has checked everything that has a tensor.
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
  check_labels(
      params);  // again: the labels may have changed since the forward, and they form addresses
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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of caref_kernels; see csrc/.";

  py::class_<RowParams> params(module, "RowParams");
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

  module.def("forward", &run_forward, "Terms and statistics of every row.");
  module.def("backward", &run_backward, "Gradient of every row.");
  module.def("instruction_set", [] { return std::string(kernels.instruction_set); });
  module.def("use_instruction_set", &use_instruction_set,
             "Choose the kernels by instruction set, '' for the best; for tests and benchmarks.");

  // Twins of objective.py, for the test that compares them on a grid.
  py::module_ twins = module.def_submodule("row_math", "The row formulas, in float64.");
  twins.def("log_ratio_offset", &caref::log_ratio_offset);
  twins.def("entropy", &caref::entropy);
  twins.def("row_support", &caref::row_support);
  twins.def("sced_density", [](double p, double log_ratio, double q, double alpha, double beta) {
    return caref::sced_density(p, log_ratio, q, caref::Exponents(alpha, beta));
  });
  twins.def("sced_slope", [](double p, double log_ratio, double q, double alpha, double beta) {
    return caref::sced_slope<double>(p, log_ratio, q, caref::Exponents(alpha, beta));
  });
}
