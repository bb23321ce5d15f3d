// Shared by the bindings of csrc/cpu: dtypes, layouts and fresh memory.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/memory.h"
#include "resfuse.h"

// In torch from 2.11 on; the library also loads in 2.10, where this is null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t rank, const int64_t* size,
                                                                const int64_t* stride, int64_t offset, int32_t dtype,
                                                                int32_t device, int32_t device_index,
                                                                AtenTensorHandle* result, int32_t layout,
                                                                const uint8_t* metadata, int64_t metadata_size,
                                                                void (*free)(void* data, void* context), void* context);

namespace resfuse::cpu::bindings {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  ": expected float32 or bfloat16 on the CPU");
  return type == ScalarType::Float ? DType::float32 : DType::bfloat16;
}

// The memory of a result, fresh from the allocator.
inline void* written(const Tensor& tensor) {
  prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  return tensor.data_ptr();
}

inline Tensor empty(int64_t rank, const int64_t* size, const int64_t* stride, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, size, stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline int32_t number_of(DType dtype) {
  return dtype == DType::float32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
}

// Where a result lies: PyTorch's memory, where users could resize it, or, if it is large, the pool.
enum class Memory { pytorch, pool };

// A result without gaps.
inline Tensor empty(int64_t rank, const int64_t* size, const int64_t* stride, DType dtype, Memory memory) {
  int64_t bytes = dtype == DType::float32 ? 4 : 2;
  for (int64_t i = 0; i < rank; ++i) bytes *= size[i];
  const bool pooled = memory == Memory::pool && torch_from_blob != nullptr && bytes >= kPooled;
  void* data = pooled ? pooled_memory(bytes) : nullptr;
  if (data == nullptr) return empty(rank, size, stride, number_of(dtype));
  const auto free = [](void* data, void* bytes) { return_to_pool(data, reinterpret_cast<int64_t>(bytes)); };
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(data, rank, size, stride, 0, number_of(dtype), aoti_torch_device_type_cpu(),
                                         -1, &handle, aoti_torch_layout_strided(), nullptr, 0, free,
                                         reinterpret_cast<void*>(bytes)));
  return Tensor(handle);
}

inline bool is_dense_nhwc(const Tensor& tensor) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  return (size[3] == 1 || stride[3] == size[1]) && (size[2] == 1 || stride[2] == size[3] * size[1]) &&
         (size[1] == 1 || stride[1] == 1) && (size[0] == 1 || stride[0] == size[2] * size[3] * size[1]);
}

}  // namespace resfuse::cpu::bindings
