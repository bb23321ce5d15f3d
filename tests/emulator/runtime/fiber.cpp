// Compiled without a sanitizer, as is all of the emulator: it tells the sanitizers of the kernels what stacks there are
// (EMU_ASAN, EMU_TSAN).
#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// swapcontext would do, but makes a system call for the signal mask at every switch.
extern "C" void emu_switch(void** save, void* load);
asm(R"(.text
.local emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // a multiple of every page size

// A stack and TSan's thread, both kept: TSan takes a millisecond to make one.
struct Spare {
  char* stack;
  void* tsan;
};
std::vector<Spare> spares;
#ifdef EMU_TSAN
std::vector<Spare> used_in_this_launch;
constexpr size_t kMostSpares = 4096;  // TSan has room for 8000 threads
#endif
#ifdef EMU_ASAN
Fiber* left;  // from which the running one was switched to
#endif

Spare make_spare() {
  Spare spare{};
  void* memory =
      mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  spare.stack = static_cast<char*>(memory) + kGuardBytes;
  if (memory == MAP_FAILED || mprotect(spare.stack, kStackBytes, PROT_READ | PROT_WRITE) != 0) {
    std::perror("emulator: no memory for a stack");
    std::abort();
  }
#ifdef EMU_TSAN
  spare.tsan = __tsan_create_fiber(0);
#endif
  return spare;
}

}  // namespace

void create(Fiber& fiber, void (*entry)()) {
  if (spares.empty()) spares.push_back(make_spare());
  char* stack = spares.back().stack;
  fiber.bottom = stack;
  fiber.size = kStackBytes;
  fiber.tsan = spares.back().tsan;
  spares.pop_back();
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the return address of entry: none, and the end of a backtrace
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

void entered() {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &left->bottom, &left->size);
#endif
}

void adopt_thread([[maybe_unused]] Fiber& fiber) {
#ifdef EMU_TSAN
  fiber.tsan = __tsan_get_current_fiber();
#endif
}

void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool final) {
#ifdef EMU_ASAN
  left = &from;
  __sanitizer_start_switch_fiber(final ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emu_switch(&from.stack_pointer, to.stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void destroy(Fiber& fiber) {
  const Spare spare{static_cast<char*>(const_cast<void*>(fiber.bottom)), fiber.tsan};
#ifdef EMU_TSAN
  if (used_in_this_launch.size() < kMostSpares) {
    used_in_this_launch.push_back(spare);
  } else {
    __tsan_destroy_fiber(spare.tsan);
    munmap(spare.stack - kGuardBytes, kGuardBytes + kStackBytes);
  }
#else
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(spare.stack, kStackBytes);  // an abandoned fiber leaves its redzones
#endif
  spares.push_back(spare);
#endif
}

void begin_launch() {
#ifdef EMU_TSAN
  spares.insert(spares.end(), used_in_this_launch.begin(), used_in_this_launch.end());
  used_in_this_launch.clear();
#endif
}

#ifdef EMU_TSAN
void release(void* object) { __tsan_release(object); }
void acquire(void* object) { __tsan_acquire(object); }
Unseen::Unseen() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unseen::~Unseen() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#endif

}  // namespace emu
