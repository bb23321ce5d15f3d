// Scratch memory of convolutions and the threads that share one.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace resfuse::cpu {

// Multiplications below which a second thread costs more than it gains.
constexpr int64_t kSmallestShare = 1 << 18;

// Memory of at least `bytes`, aligned to a page, which the calling thread keeps until it ends or asks again.
char* conv_scratch(int64_t bytes);

// The size of a core's L2 cache.
int64_t l2_cache_bytes();

// f(thread) for each thread of 0 .. threads - 1, at the same time where PyTorch has as many.
template <class F>
void run_threads(int64_t threads, const F& f) {
  if (threads == 1) return f(0);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) f(thread);
  });
}

}  // namespace resfuse::cpu
