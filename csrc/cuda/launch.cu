// The plan of a call, and the choice of the kernels by storage type.
#include "launch.cuh"

namespace caref::cuda {
namespace {

// A block's own use of shared memory, and the kilobyte that the hardware takes.
constexpr int kReservedBytes = 3 * 1024;
// Columns below which a slice is not worth a block and its place in the merge.
constexpr int kLeastSliceColumns = 4096;
// Columns that a thread may sum in float32.
constexpr int kMostThreadColumns = 256;
// Vectors of a thread below which a smaller block wastes less.
constexpr int kLeastThreadVectors = 4;
// Longer lists of a thread would hold keys that the bracket leaves out.
constexpr int kMostDepth = 64;
// Threads of a block below which a histogram takes longer to search than a row to count.
constexpr int kLeastMaskThreads = 128;
// Bytes of a backward slice: sixteen vectors of a thread repay the dozen divisions of its block.
constexpr int kBackwardSliceBytes = 64 * 1024;

int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

int64_t ceiling(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// At most `most_columns` to a slice, and `blocks` slices in all if the rows are long enough.
Plan plan_of(const RowParams& params, const Device& device, int64_t most_columns, int64_t blocks) {
  const int width = kVectorBytes / element_bytes(params.logits_dtype);
  int64_t slices = ceiling(params.columns, most_columns);
  if (params.rows() * slices < blocks) {
    const int64_t wanted = ceiling(blocks, params.rows());
    const int64_t sensible = ceiling(params.columns, kLeastSliceColumns);
    const int64_t more = wanted < sensible ? wanted : sensible;
    if (more > slices) slices = more;
  }
  const int64_t columns = ceiling(ceiling(params.columns, slices), width) * width;
  Plan plan;
  plan.columns = static_cast<int>(columns);
  plan.slices = static_cast<int>(ceiling(params.columns, columns));
  plan.threads = kWarp;
  while (plan.threads < kMostThreads && plan.threads * width * kLeastThreadVectors < columns) {
    plan.threads *= 2;
  }
  plan.most_blocks = device.most_blocks;
  return plan;
}

Status device_of_call(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  get(&device.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&device.most_blocks, cudaDevAttrMaxGridDimX);
  if (error == cudaSuccess) return {};
  return {"cudaDeviceGetAttribute", cudaGetErrorString(error)};
}

// Calls visitor(storage) with a value of the type that describes how the logits are stored.
template <typename Visitor>
void visit_storage(DType dtype, Visitor visitor) {
  switch (dtype) {
    case DType::kFloat64:
      return visitor(Float64{});
    case DType::kBFloat16:
      return visitor(BFloat16{});
    case DType::kFloat16:
      return visitor(Float16{});
    default:
      return visitor(Float32{});
  }
}

}  // namespace

int Device::share_bytes(int blocks) const {
  const int fair = shared_per_multiprocessor / blocks;
  const int bytes = (fair < shared_per_block ? fair : shared_per_block) - kReservedBytes;
  return bytes / kVectorBytes * kVectorBytes;
}

Plan forward_plan(const RowParams& params, const Device& device) {
  const int bytes = element_bytes(params.logits_dtype);
  const int blocks = bytes == 8 ? kBlocks<double> : kBlocks<float>;
  int64_t most = device.share_bytes(blocks) / bytes;
  if (most > kMostThreads * kMostThreadColumns) most = kMostThreads * kMostThreadColumns;
  return plan_of(params, device, most, int64_t{blocks} * device.multiprocessors);
}

Plan backward_plan(const RowParams& params, const Device& device) {
  const int bytes = element_bytes(params.logits_dtype);
  const int blocks = bytes == 8 ? kBlocks<double> : kBlocks<float>;
  return plan_of(params, device, kBackwardSliceBytes / bytes,
                 int64_t{blocks} * device.multiprocessors);
}

MaskPlan mask_plan(const RowParams& params, const Device& device) {
  const int bytes = element_bytes(params.logits_dtype), width = kVectorBytes / bytes;
  const int64_t columns = ceiling(params.columns, width) * width;
  MaskPlan plan;
  plan.blocks.columns = static_cast<int>(columns);
  plan.blocks.slices = 1;
  plan.blocks.threads = kLeastMaskThreads;
  while (plan.blocks.threads < kMaskThreads &&
         plan.blocks.threads * width * kLeastThreadVectors < columns) {
    plan.blocks.threads *= 2;
  }
  plan.blocks.most_blocks = device.most_blocks;
  plan.row_fits = columns * bytes <= device.share_bytes(1) - kMaskBytes &&
                  columns <= kMaskThreads * kMostThreadColumns;
  using Default = EvenExponents<2, 1>;
  const int blocks = bytes == 8 ? kMaskBlocks<double, Default> : kMaskBlocks<float, Default>;
  const int depth = (device.share_bytes(blocks) - kMaskBytes) / (plan.blocks.threads * bytes);
  plan.depth = depth < 0 ? 0 : depth < kMostDepth ? depth : kMostDepth;
  return plan;
}

Status forward_workspace(const RowParams& params, int64_t& bytes) {
  bytes = 0;
  if (params.rows() == 0) return {};
  Device device;
  const Status status = device_of_call(device);
  if (status.error) return status;
  if (has_mask(params) && mask_plan(params, device).row_fits) return {};
  visit_storage(params.logits_dtype, [&](auto storage) {
    bytes = forward_workspace_of<decltype(storage)>(params, forward_plan(params, device));
  });
  return {};
}

Status forward(const RowParams& params, const Resources& resources) {
  if (params.rows() == 0) return {};
  Device device;
  Status status = device_of_call(device);
  if (status.error) return status;
  visit_storage(params.logits_dtype, [&](auto storage) {
    using S = decltype(storage);
    const MaskPlan mask = mask_plan(params, device);
    if (!has_mask(params) || !mask.row_fits) {
      status = forward_of<S>(params, forward_plan(params, device), resources);
    }
    if (has_mask(params) && !status.error) status = mask_of<S>(params, mask, resources);
  });
  return status;
}

Status backward(const RowParams& params, const Resources& resources) {
  if (params.rows() == 0) return {};
  Device device;
  Status status = device_of_call(device);
  if (status.error) return status;
  visit_storage(params.logits_dtype, [&](auto storage) {
    status = backward_of<decltype(storage)>(params, backward_plan(params, device), resources);
  });
  return status;
}

}  // namespace caref::cuda
