// The implementation of cuda_runtime.h.  It runs the threads of a block as fibers, warp after warp,
// from one barrier to the next, and checks accesses to shared memory.  One kernel runs at a time.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "denormals.h"
#include "fibers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulation {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kUsualSharedBytes = 48 * 1024;

// The properties of the emulated device; tests change them.
struct Device {
  int multiprocessors = 16;
  int shared_per_multiprocessor = 100 * 1024;
  int shared_per_block = 99 * 1024;
  int most_blocks = 2147483647;
};
Device device;
int failing_launch = 0;  // counts launches down; the one that reaches 0 fails
cudaError_t failure = cudaSuccess;
std::map<const void*, int> allowed_shared;
std::mutex mutex;
thread_local std::string message;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Thread {
  Fiber fiber;
  State state = State::kDone;
  Site site{"", "", 0};
  unsigned mask = 0;
  bool orders_memory = false;
  int slots = 0;  // index of the warp's set of slots (0 or 1) that is next
};

// The last accesses to a byte of shared memory.  The phase is incremented at every barrier of the
// block, the clock at every __syncwarp of the warp.
struct Byte {
  uint32_t written_phase = 0, written_clock = 0;
  uint32_t read_phase = 0, read_clock = 0;
  uint16_t writer = 0, reader = 0;
  bool is_sum = false;  // only atomic additions have written since the last barrier of the block
};
enum class Access { kRead, kWrite, kAdd };
constexpr uint16_t kWarpOf = 0x4000;   // several readers of the warp `reader & 0x3fff`
constexpr uint16_t kSeveral = 0x7fff;  // several adders, or readers of several warps

struct alignas(16) Slots {
  unsigned char lane[kWarp][16];
};

class Machine {
 public:
  bool run_block(const cudaLaunchConfig_t& config, void (*body)(void*), void* arguments,
                 bool reversed);
  void wait(State state, unsigned mask, const Site& site, bool orders_memory);
  void finish();
  void begin() { self().fiber.arrived(&scheduler_); }
  void call() { body_(arguments_); }
  void* slot(int lane) { return slots_[current_ / kWarp * 2 + self().slots].lane[lane]; }
  void next_slots() { self().slots ^= 1; }
  void* touch(std::ptrdiff_t offset, std::size_t bytes, Access access);

 private:
  Thread& self() { return threads_[current_]; }
  [[noreturn]] void fail(const std::string& text);
  void resume(int index);
  bool run_warp(int warp);
  bool release_block();
  void check_order(const Byte& byte, std::ptrdiff_t offset, Access access);
  bool is_ordered(int other_warp, uint32_t clock) const {
    return other_warp == current_ / kWarp && clock < clocks_[current_ / kWarp];
  }

  std::unique_ptr<Thread[]> threads_{new Thread[kMostThreads]};
  Fiber scheduler_;
  std::vector<Slots> slots_{2 * kMostThreads / kWarp};
  int count_ = 0;
  int current_ = 0;
  bool failed_ = false;
  void (*body_)(void*) = nullptr;
  void* arguments_ = nullptr;
  std::unique_ptr<unsigned char[]> shared_;  // of the exact size, so a sanitizer detects overflows
  std::ptrdiff_t shared_bytes_ = 0;
  std::vector<Byte> bytes_;
  uint32_t phase_ = 0, first_phase_ = 0;
  uint32_t clocks_[kMostThreads / kWarp] = {};
};

Machine machine;

std::string place(const Site& site) {
  const std::string file = site.file;
  return std::string(site.what) + " at " + file.substr(file.find_last_of('/') + 1) + ":" +
         std::to_string(site.line);
}

bool is_same(const Site& a, const Site& b) { return a.line == b.line && !strcmp(a.file, b.file); }

void enter() {
  machine.begin();
  machine.call();
  machine.finish();
}

void Machine::fail(const std::string& text) {
  message = "thread " + std::to_string(current_) + " of block " + std::to_string(blockIdx.x) +
            ": " + text;
  failed_ = true;
  Fiber::change(self().fiber, scheduler_);
  std::abort();  // no thread is resumed after a failure
}

void Machine::resume(int index) {
  current_ = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  Fiber::change(scheduler_, threads_[index].fiber);
}

void Machine::wait(State state, unsigned mask, const Site& site, bool orders_memory) {
  Thread& thread = self();
  thread.state = state;
  thread.mask = mask;
  thread.site = site;
  thread.orders_memory = orders_memory;
  Fiber::change(thread.fiber, scheduler_);
}

void Machine::finish() {
  self().state = State::kDone;
  Fiber::change(self().fiber, scheduler_);
  std::abort();
}

// Runs a warp until each of its lanes is at a barrier of the block or done; false after a failure.
bool Machine::run_warp(int warp) {
  const int first = warp * kWarp;
  for (;;) {
    for (int i = first; i < first + kWarp; ++i) {
      if (threads_[i].state == State::kReady) resume(i);
      if (failed_) return false;
    }
    int waiting = first;
    while (waiting < first + kWarp && threads_[waiting].state != State::kAtWarpBarrier) ++waiting;
    if (waiting == first + kWarp) return true;
    const Thread& one = threads_[waiting];
    for (int i = first; i < first + kWarp; ++i) {
      if (!(one.mask >> (i - first) & 1)) continue;
      const Thread& other = threads_[i];
      if (other.state == State::kAtWarpBarrier && is_same(other.site, one.site)) continue;
      message = "divergent warp: thread " + std::to_string(waiting) + " waits at " +
                place(one.site) + ", thread " + std::to_string(i) +
                (other.state == State::kDone ? " has ended" : " waits at " + place(other.site));
      failed_ = true;
      return false;
    }
    if (one.orders_memory) ++clocks_[warp];
    const unsigned mask = one.mask;
    for (int i = first; i < first + kWarp; ++i) {
      if (mask >> (i - first) & 1) threads_[i].state = State::kReady;
    }
  }
}

// All threads are at a barrier of the block or done.  Releases them if they are all at the same
// barrier; false otherwise.
bool Machine::release_block() {
  for (int i = 1; i < count_; ++i) {
    const Thread &one = threads_[0], &other = threads_[i];
    if (one.state == other.state && is_same(one.site, other.site)) continue;
    const auto describe = [](const Thread& thread) {
      return thread.state == State::kDone ? "has ended" : "waits at " + place(thread.site);
    };
    message = "divergent barrier: thread 0 " + describe(one) + ", thread " + std::to_string(i) +
              " " + describe(other);
    failed_ = true;
    return false;
  }
  ++phase_;
  for (int i = 0; i < count_; ++i) threads_[i].state = State::kReady;
  return true;
}

bool Machine::run_block(const cudaLaunchConfig_t& config, void (*body)(void*), void* arguments,
                        bool reversed) {
  count_ = static_cast<int>(config.blockDim.x);
  body_ = body;
  arguments_ = arguments;
  failed_ = false;
  shared_bytes_ = static_cast<std::ptrdiff_t>(config.dynamicSmemBytes);
  shared_.reset(new unsigned char[config.dynamicSmemBytes]);
  memset(shared_.get(), 0xff, config.dynamicSmemBytes);
  if (bytes_.size() < config.dynamicSmemBytes) bytes_.resize(config.dynamicSmemBytes);
  first_phase_ = ++phase_;
  for (int i = 0; i < count_; ++i) {
    threads_[i].fiber.start(enter);
    threads_[i].state = State::kReady;
    threads_[i].site = {"", "", 0};
    threads_[i].slots = 0;
  }
  const int warps = count_ / kWarp;
  for (;;) {
    // Blocks run their warps in alternating order, to reveal results that depend on the order.
    for (int i = 0; i < warps; ++i) {
      if (!run_warp(reversed ? warps - 1 - i : i)) return false;
    }
    const auto is_done = [](const Thread& thread) { return thread.state == State::kDone; };
    if (std::all_of(threads_.get(), threads_.get() + count_, is_done)) return true;
    if (!release_block()) return false;
  }
}

void Machine::check_order(const Byte& byte, std::ptrdiff_t offset, Access access) {
  const bool writes = access != Access::kRead;
  const auto where = " byte " + std::to_string(offset) + " of shared memory";
  const bool both_add = access == Access::kAdd && byte.is_sum;
  if (byte.written_phase == phase_ && byte.writer != current_ && !both_add &&
      !is_ordered(byte.writer / kWarp, byte.written_clock)) {
    const bool several = byte.writer == kSeveral;
    fail(std::string(writes ? "writes" : "reads") + where + ", which " +
         (several ? "several threads have" : "thread " + std::to_string(byte.writer) + " has") +
         " written since the last barrier");
  }
  if (!writes || byte.read_phase != phase_ || byte.reader == current_) return;
  const int reader_warp = byte.reader & kWarpOf ? byte.reader & ~kWarpOf : byte.reader / kWarp;
  if (byte.reader == kSeveral || !is_ordered(reader_warp, byte.read_clock)) {
    fail("writes" + where + ", which another thread has read since the last barrier");
  }
}

void* Machine::touch(std::ptrdiff_t offset, std::size_t size, Access access) {
  const auto bytes = static_cast<std::ptrdiff_t>(size);
  const bool is_aligned = bytes > 16 || offset % bytes == 0;  // a structure is read in parts
  if (offset < 0 || offset + bytes > shared_bytes_ || !is_aligned) {
    fail("bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) +
         " are not aligned in the " + std::to_string(shared_bytes_) + " of shared memory");
  }
  const int warp = current_ / kWarp;
  for (std::ptrdiff_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = bytes_[static_cast<std::size_t>(i)];
    if (access != Access::kWrite && byte.written_phase < first_phase_) {
      fail("reads byte " + std::to_string(i) + " of shared memory, which nothing has written");
    }
    check_order(byte, i, access);
    if (access != Access::kRead) {
      const bool is_again = byte.written_phase == phase_;
      const bool is_further_sum = access == Access::kAdd && byte.is_sum && is_again;
      // If a thread adds to a byte that it has just written, the earlier write remains a write.
      byte.is_sum = access == Access::kAdd && (byte.is_sum || !is_again);
      byte.written_phase = phase_;
      byte.written_clock = clocks_[warp];
      byte.writer =
          is_further_sum && byte.writer != current_ ? kSeveral : static_cast<uint16_t>(current_);
      continue;
    }
    const bool is_new = byte.read_phase != phase_ || byte.reader == current_;
    const int reader_warp = byte.reader & kWarpOf ? byte.reader & ~kWarpOf : byte.reader / kWarp;
    byte.reader =
        static_cast<uint16_t>(is_new                                           ? current_
                              : byte.reader != kSeveral && reader_warp == warp ? kWarpOf | warp
                                                                               : kSeveral);
    byte.read_phase = phase_;
    byte.read_clock = clocks_[warp];
  }
  return shared_.get() + offset;
}

}  // namespace

void block_barrier(const Site& site) { machine.wait(State::kAtBlockBarrier, 0, site, true); }
void warp_barrier(unsigned mask, const Site& site, bool orders_memory) {
  machine.wait(State::kAtWarpBarrier, mask, site, orders_memory);
}
void* warp_slot(int lane) { return machine.slot(lane); }
void next_warp_slots() { machine.next_slots(); }
int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
void* shared_for_reading(std::ptrdiff_t offset, std::size_t bytes) {
  return machine.touch(offset, bytes, Access::kRead);
}
void* shared_for_writing(std::ptrdiff_t offset, std::size_t bytes) {
  return machine.touch(offset, bytes, Access::kWrite);
}
void* shared_for_adding(std::ptrdiff_t offset, std::size_t bytes) {
  return machine.touch(offset, bytes, Access::kAdd);
}

unsigned ballot(unsigned mask, bool predicate, const Site& site) {
  memcpy(warp_slot(lane()), &predicate, sizeof(predicate));
  warp_barrier(mask, site, false);
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) {
    bool vote = false;
    if (mask >> i & 1) memcpy(&vote, warp_slot(i), sizeof(vote));
    votes |= static_cast<unsigned>(vote) << i;
  }
  next_warp_slots();
  return votes;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (bytes > device.shared_per_block) return cudaErrorInvalidValue;
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                void* arguments) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (failing_launch > 0 && --failing_launch == 0) return failure;
  const auto allowed = allowed_shared.find(kernel);
  const int most_shared = allowed == allowed_shared.end() ? kUsualSharedBytes : allowed->second;
  const dim3 &blocks = config.gridDim, &threads = config.blockDim;
  if (blocks.x == 0 || blocks.x > static_cast<unsigned>(device.most_blocks) || threads.x == 0 ||
      threads.x > kMostThreads || threads.x % kWarp || blocks.y * blocks.z != 1 ||
      threads.y * threads.z != 1 || config.dynamicSmemBytes > static_cast<unsigned>(most_shared)) {
    return cudaErrorInvalidConfiguration;
  }
  const FlushDenormals flush;
  gridDim = blocks;
  blockDim = threads;
  for (unsigned block = 0; block < blocks.x; ++block) {
    blockIdx = {block, 0, 0};
    if (!machine.run_block(config, body, arguments, block % 2 == 1)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace cuda_emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return cuda_emulation::message.c_str();
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_emulation::Device& device = cuda_emulation::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_per_multiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_per_block;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = device.most_blocks;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// Functions that tests call through ctypes.
#define FOR_TESTS extern "C" __attribute__((visibility("default")))

FOR_TESTS void cuda_emulation_set_device(int multiprocessors, int shared_per_multiprocessor,
                                         int most_blocks) {
  const int block = std::min(shared_per_multiprocessor - 1024, 227 * 1024);
  cuda_emulation::device = {multiprocessors, shared_per_multiprocessor, block, most_blocks};
}

// The `launches`-th launch from now on fails with this error.
FOR_TESTS void cuda_emulation_fail(int launches, int error) {
  cuda_emulation::failing_launch = launches;
  cuda_emulation::failure = static_cast<cudaError_t>(error);
}
