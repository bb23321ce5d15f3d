// cp.async: asynchronous copies from global to shared memory that bypass registers (sm_80).
#pragma once
#include <cuda_runtime_api.h>

namespace resfuse::cuda {

#ifndef RESFUSE_CUDA_EMULATOR
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// 16 or 8 bytes, equally aligned at both ends.  Without `valid` it writes zeros and reads nothing, so `from` may be any
// address.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
#ifdef RESFUSE_CUDA_EMULATOR
  emu::cp_async(to, from, kBytes, valid ? kBytes : 0);
#else
  if constexpr (kBytes == 16) {
    // .cg bypasses L1; the hint makes L2 fetch the whole 128-byte line, whose other half the next step of K reads.
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

// Commits a group: all copies that this thread has issued since the last commit.
__device__ __forceinline__ void copy_async_commit() {
#ifdef RESFUSE_CUDA_EMULATOR
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the `kPending` latest groups of this thread are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef RESFUSE_CUDA_EMULATOR
  emu::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace resfuse::cuda
