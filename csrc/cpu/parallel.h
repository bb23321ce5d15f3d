// Threads come from PyTorch's own pool (at::parallel_for through the stable ABI), so that torch.set_num_threads holds.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace resfuse::cpu {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// Elements below which a second thread costs more than it gains.
constexpr int64_t kGrain = 16384;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace resfuse::cpu
