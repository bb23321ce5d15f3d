// What the bindings of the CUDA kernels share. Compiled against the emulator (RESFUSE_CUDA_EMULATOR) the same bindings
// register the same operators for CPU tensors: all that differs stands here.
#pragma once
#ifndef RESFUSE_CUDA_EMULATOR
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace resfuse {

#ifdef RESFUSE_CUDA_EMULATOR

#define RESFUSE_DISPATCH_KEY CPU

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline void check_device(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
}

inline void* current_stream(int32_t) { return nullptr; }

#else

#define RESFUSE_DISPATCH_KEY CUDA

using torch::stable::accelerator::DeviceGuard;

inline void check_device(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be a CUDA tensor");
}

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

#endif

}  // namespace resfuse
