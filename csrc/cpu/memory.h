// Memory that kernels use, and what they need to know of the machine's.
#pragma once
#include <cstdint>

namespace resfuse::cpu {

// Scratch of at least `bytes`, aligned to a page, which the calling thread keeps until it ends or asks again.
// Throws std::runtime_error, with the size in its message, where there is not so much.
char* scratch_memory(int64_t bytes);
char* chain_memory(int64_t bytes);  // the same, beside that

// Memory for a large tensor of a training step, aligned to a page; null where the pool has none.
//
// PyTorch allocates by posix_memalign, and glibc gives the slack of the alignment to small allocations: the hole that a
// tensor leaves is too small for the next one of its size, and most of what recomputation saves stays in such holes. In
// the pool, whose blocks are whole pages, holes join, and are within a few percent of none at all.
constexpr int64_t kPooled = 64 << 10;
void* pooled_memory(int64_t bytes);
void return_to_pool(void* data, int64_t bytes);

// Asks for huge pages under a large result.  The system hands out fresh memory a fault at a time, zeroed: for 4 KB each
// that can cost more than the kernel that fills it (51 MB: 26 ms, 7 ms with huge pages, 4 ms in memory used before).
void prefer_huge_pages(void* data, int64_t bytes);

// The size of a core's L2 cache.
int64_t l2_cache_bytes();

}  // namespace resfuse::cpu
