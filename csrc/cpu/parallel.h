// Threads come from PyTorch's own pool (at::parallel_for through the stable ABI), so that torch.set_num_threads holds.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace resfuse::cpu {

using torch::stable::get_num_threads;
#ifndef __SANITIZE_THREAD__
using torch::stable::parallel_for;
#else
// PyTorch's pool is not instrumented: ThreadSanitizer would not see it synchronise.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t parts = std::min<int64_t>(end - begin, get_num_threads());
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i)
    threads.emplace_back([&, i] { f(begin + (end - begin) * i / parts, begin + (end - begin) * (i + 1) / parts); });
  for (std::thread& thread : threads) thread.join();
}
#endif

// Elements below which a second thread costs more than it gains.
constexpr int64_t kGrain = 16384;
// The same for multiplications of a convolution.
constexpr int64_t kSmallestShare = 1 << 18;

// f(thread) for each of 0 .. threads - 1, at the same time where PyTorch has as many.
template <class F>
void run_threads(int64_t threads, const F& f) {
  if (threads == 1) return f(0);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) f(thread);
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a part of `total` begins: the larger parts come first, so that threads that take one after another end
// together.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t part) {
  return total / parts * part + std::min(part, total % parts);
}

}  // namespace resfuse::cpu
