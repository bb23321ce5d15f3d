// What the code of kernels calls: the border between what a sanitizer instruments (kernels and these headers) and the
// emulator itself, which is never instrumented, for its state is shared by all CUDA threads without locks.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace emu {

// A mistake of the running CUDA thread: abandons the launch, which throws this message with the kernel's source lines.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs body(closure) as every thread of the grid, and returns when all are done. Throws std::runtime_error.
void launch(void (*body)(const void* closure), const void* closure, dim3 grid, dim3 block, size_t shared_bytes,
            bool cooperative);
template <class Body>
void launch(const Body& body, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative) {
  launch([](const void* closure) { (*static_cast<const Body*>(closure))(); }, &body, grid, block, shared_bytes,
         cooperative);
}
// What cudaOccupancyMaxActiveBlocksPerMultiprocessor times the number of multiprocessors is on the emulated device.
int resident_blocks(int threads, size_t shared_bytes);
// False where every cooperative launch is refused, whatever the device is said to hold; and whether one has been.
bool cooperates();
bool has_refused();

// ---- the running thread ----
unsigned lane();
unsigned char* dynamic_shared();
// Fails unless [address, address + bytes) is aligned to `bytes` and lies in the block's shared memory.
void check_shared(const void* address, size_t bytes, const char* instruction);

// Waits for all threads of the block; returns how many of them gave a predicate that is true.
int barrier(bool predicate, const char* file, int line);
void grid_barrier();
void fence();

// Waits for all live lanes of `mask`; then `perform` runs once, on the operands of all of them (null for the others).
using Perform = void(void* const* operands, unsigned lanes);
void collective(unsigned mask, Perform* perform, void* operand, bool orders_memory = false);

}  // namespace emu
