// A stack of its own to run on: every CUDA thread is one. Switching is explicit, so nothing here is concurrent.
#pragma once
#include <cstddef>

namespace emu {

struct Fiber {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;  // of the stack; of an OS thread's, known once it was left
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;        // TSan's
};

// Makes `fiber` run entry() on a stack of its own when it is first switched to. `entry` calls entered() first and
// never returns: its last switch is final.
void create(Fiber& fiber, void (*entry)());
void entered();
// The stack of the OS thread that calls this.
void adopt_thread(Fiber& fiber);
// Leaves `from`, which is the one that runs. No memory is ordered by it: for TSan, fibers are threads.
void switch_to(Fiber& from, Fiber& to, bool final = false);
void destroy(Fiber& fiber);
// What was destroyed can serve again from now on. In the same launch it can not: one TSan thread that runs as threads
// of two blocks, one after the other, would hide their races.
void begin_launch();

// What TSan is told of barriers: whatever happened before release(object) happens before what follows acquire(object).
#ifdef EMU_TSAN
void release(void* object);
void acquire(void* object);
// What the emulator does is no access of the CUDA thread on whose stack it runs: its own code TSan does not
// see, but calls of memmove, malloc and free.
struct Unseen {
  Unseen();
  ~Unseen();
  Unseen(const Unseen&) = delete;
};
#else
inline void release(void*) {}
inline void acquire(void*) {}
struct Unseen {
  Unseen() {}
};
#endif

}  // namespace emu
