// cp.async: from global to shared memory, without a detour through registers and without waiting (sm_80).
#pragma once
#include <cuda_runtime_api.h>

namespace resfuse::cuda {

#ifndef RESFUSE_CUDA_EMULATOR
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// 16 bytes or 8, to and from multiples of as many.  Without `valid` it writes zeros and reads nothing, so `from` may
// point outside of everything.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
#ifdef RESFUSE_CUDA_EMULATOR
  emu::cp_async(to, from, kBytes, valid ? kBytes : 0);
#else
  if constexpr (kBytes == 16) {
    // .cg passes L1 by; the hint has L2 fetch the other half of a 128-byte line, which the next step of K wants.
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 8 : 0)
                 : "memory");
  }
#endif
}

// Closes a group: all copies that this thread has issued since the last one.
__device__ __forceinline__ void copy_async_commit() {
#ifdef RESFUSE_CUDA_EMULATOR
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef RESFUSE_CUDA_EMULATOR
  emu::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace resfuse::cuda
