// Cooperative threads, each with its own stack and a switch that saves the registers that a call
// must preserve.  On x86-64 the switch is written in assembly, because ucontext makes two system
// calls. AddressSanitizer is informed of each switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

#if defined(__x86_64__)
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(
.text
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, . - cuda_emulation_switch
)");
#endif

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 128 * 1024;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(stack_ - guard_bytes(), kStackBytes + guard_bytes());
  }

  // The next switch to this fiber starts `entry`, which must never return.
  void start(void (*entry)()) {
    if (!stack_) allocate();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);  // frames of an abandoned run
    fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
    // Six saved registers, the return address, and one word for the stack alignment of a called
    // function.
    auto** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    context_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Called on the stack of `from`; returns when another fiber switches back to it.
  static void change(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_ ? to.stack_ : to.bottom_,
                                   to.stack_ ? kStackBytes : to.bytes_);
#endif
#if defined(__x86_64__)
    cuda_emulation_switch(&from.context_, to.context_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    from.arrived();
  }

  // Must be called first on a new stack, with the fiber that started it.
  void arrived(Fiber* starter = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    std::size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
    if (starter) {
      starter->bottom_ = bottom;
      starter->bytes_ = bytes;
    }
#else
    (void)starter;
#endif
  }

 private:
  static std::size_t guard_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

  void allocate() {
    void* memory = mmap(nullptr, kStackBytes + guard_bytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    // A guard page, so that a stack overflow faults instead of writing to another stack.
    if (memory == MAP_FAILED || mprotect(memory, guard_bytes(), PROT_NONE) != 0) std::abort();
    stack_ = static_cast<char*>(memory) + guard_bytes();
  }

  char* stack_ = nullptr;  // null for the scheduler, which runs on the thread's own stack
#if defined(__x86_64__)
  void* context_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  std::size_t bytes_ = 0;
#endif
};

}  // namespace cuda_emulation
