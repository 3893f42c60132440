// The launch configuration of a call, and the choice of the kernels by storage type.
#include "launch.cuh"

namespace caref::cuda {
namespace {

// Shared memory of a block besides the row: its small arrays, and the kilobyte that the hardware
// reserves.
constexpr int kReservedBytes = 3 * 1024;
// A split of fewer columns costs more, in its block and in the combination, than it saves.
constexpr int kMinSplitColumns = 4096;
// A thread sums at most this many columns in float32, to bound the rounding error.
constexpr int kMaxThreadColumns = 256;
// If a thread would have fewer vectors, a smaller block is used.
constexpr int kMinThreadVectors = 4;
// Longer lists would not be filled, because the bracket leaves fewer keys to a thread.
constexpr int kMaxDepth = 64;
// With fewer threads in a block, searching the histogram would take longer than counting the row.
constexpr int kMinTopKThreads = 128;
// Bytes of a split in the backward: sixteen vectors per thread amortise the dozen float64 divisions
// in the set-up of a block.
constexpr int kBackwardSplitBytes = 64 * 1024;

int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

int64_t ceiling(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Splits of at most `max_columns` columns, and at least `blocks` of them in total if the rows are
// long enough.
LaunchConfig config_of(const RowParams& params, const Device& device, int64_t max_columns,
                       int64_t blocks) {
  const int width = kVectorBytes / element_bytes(params.logits_dtype);
  int64_t splits = ceiling(params.columns, max_columns);
  if (params.rows() * splits < blocks) {
    const int64_t wanted = ceiling(blocks, params.rows());
    const int64_t sensible = ceiling(params.columns, kMinSplitColumns);
    const int64_t more = wanted < sensible ? wanted : sensible;
    if (more > splits) splits = more;
  }
  const int64_t columns = ceiling(ceiling(params.columns, splits), width) * width;
  LaunchConfig config;
  config.columns = static_cast<int>(columns);
  config.splits = static_cast<int>(ceiling(params.columns, columns));
  config.threads = kWarp;
  while (config.threads < kMaxThreads && config.threads * width * kMinThreadVectors < columns) {
    config.threads *= 2;
  }
  config.max_blocks = device.max_blocks;
  return config;
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
  get(&device.max_blocks, cudaDevAttrMaxGridDimX);
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

int Device::chunk_bytes(int blocks) const {
  const int fair = shared_per_multiprocessor / blocks;
  const int bytes = (fair < shared_per_block ? fair : shared_per_block) - kReservedBytes;
  return bytes / kVectorBytes * kVectorBytes;
}

LaunchConfig forward_config(const RowParams& params, const Device& device) {
  const int bytes = element_bytes(params.logits_dtype);
  const int blocks = bytes == 8 ? kBlocks<double> : kBlocks<float>;
  int64_t most = device.chunk_bytes(blocks) / bytes;
  if (most > kMaxThreads * kMaxThreadColumns) most = kMaxThreads * kMaxThreadColumns;
  return config_of(params, device, most, int64_t{blocks} * device.multiprocessors);
}

LaunchConfig backward_config(const RowParams& params, const Device& device) {
  const int bytes = element_bytes(params.logits_dtype);
  const int blocks = bytes == 8 ? kBlocks<double> : kBlocks<float>;
  return config_of(params, device, kBackwardSplitBytes / bytes,
                   int64_t{blocks} * device.multiprocessors);
}

TopKLaunchConfig topk_config(const RowParams& params, const Device& device) {
  const int bytes = element_bytes(params.logits_dtype), width = kVectorBytes / bytes;
  const int64_t columns = ceiling(params.columns, width) * width;
  TopKLaunchConfig config;
  config.blocks.columns = static_cast<int>(columns);
  config.blocks.splits = 1;
  config.blocks.threads = kMinTopKThreads;
  while (config.blocks.threads < kTopKThreads &&
         config.blocks.threads * width * kMinThreadVectors < columns) {
    config.blocks.threads *= 2;
  }
  config.blocks.max_blocks = device.max_blocks;
  config.row_fits = columns * bytes <= device.chunk_bytes(1) - kTopKBytes &&
                    columns <= kTopKThreads * kMaxThreadColumns;
  using Default = EvenExponents<2, 1>;
  const int blocks = bytes == 8 ? kTopKBlocks<double, Default> : kTopKBlocks<float, Default>;
  const int depth = (device.chunk_bytes(blocks) - kTopKBytes) / (config.blocks.threads * bytes);
  config.depth = depth < 0 ? 0 : depth < kMaxDepth ? depth : kMaxDepth;
  return config;
}

Status forward_workspace(const RowParams& params, int64_t& bytes) {
  bytes = 0;
  if (params.rows() == 0) return {};
  Device device;
  const Status status = device_of_call(device);
  if (status.error) return status;
  if (uses_topk_mask(params) && topk_config(params, device).row_fits) return {};
  visit_storage(params.logits_dtype, [&](auto storage) {
    bytes = forward_workspace_of<decltype(storage)>(params, forward_config(params, device));
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
    const TopKLaunchConfig topk = topk_config(params, device);
    if (!uses_topk_mask(params) || !topk.row_fits) {
      status = forward_of<S>(params, forward_config(params, device), resources);
    }
    if (uses_topk_mask(params) && !status.error) status = topk_of<S>(params, topk, resources);
  });
  return status;
}

Status backward(const RowParams& params, const Resources& resources) {
  if (params.rows() == 0) return {};
  Device device;
  Status status = device_of_call(device);
  if (status.error) return status;
  visit_storage(params.logits_dtype, [&](auto storage) {
    status = backward_of<decltype(storage)>(params, backward_config(params, device), resources);
  });
  return status;
}

}  // namespace caref::cuda
