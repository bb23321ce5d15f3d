// cp.async. What was copied arrives only at wait_group; until then the target holds NaN, so that a wait that is too lax
// and a slot that is refilled too early both give wrong numbers.
#pragma once
#include <cstring>

#include "runtime.h"

namespace emu {

struct AsyncCopy {
  unsigned char data[16];
  unsigned char* target;
  unsigned bytes;
  unsigned group;
};
void enqueue(const AsyncCopy& copy);  // of the running thread
bool dequeue(AsyncCopy& copy, unsigned pending_groups);
void cp_async_commit();

// `valid` of the `bytes` are read from `source`; the rest is zero.
inline void cp_async(void* target, const void* source, unsigned bytes, unsigned valid) {
  check_shared(target, bytes, "cp.async");
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async copies 4, 8 or 16 bytes, not %u", bytes);
  if (valid > bytes) fail("cp.async: %u of %u bytes", valid, bytes);
  if (reinterpret_cast<uintptr_t>(source) % bytes) fail("cp.async: %p is not aligned to %u bytes", source, bytes);
  AsyncCopy copy{{}, static_cast<unsigned char*>(target), bytes, 0};
  std::memcpy(copy.data, source, valid);
  std::memset(target, 0xFF, bytes);
  enqueue(copy);
}

inline void cp_async_wait(unsigned pending_groups) {
  AsyncCopy copy;
  while (dequeue(copy, pending_groups)) std::memcpy(copy.target, copy.data, copy.bytes);
}

}  // namespace emu
