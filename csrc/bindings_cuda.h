// Shared by the bindings of the CUDA kernels: checks that name the argument, device and stream. Compiled against the
// emulator (RESFUSE_CUDA_EMULATOR) the same bindings register the same operators for CPU tensors; all differences are
// in this header.
#pragma once
#ifndef RESFUSE_CUDA_EMULATOR
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>

#include "resfuse.h"

namespace resfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef RESFUSE_CUDA_EMULATOR

#define RESFUSE_DISPATCH_KEY CPU

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline void check_device(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
}

inline void* current_stream(int32_t) { return nullptr; }

// Fresh memory is NaN: what no kernel writes cannot pass for zeros.
inline Tensor fresh(Tensor tensor) {
  std::memset(tensor.data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  return tensor;
}

#else

#define RESFUSE_DISPATCH_KEY CUDA

using torch::stable::accelerator::DeviceGuard;

inline void check_device(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be a CUDA tensor");
}

inline Tensor fresh(Tensor tensor) { return tensor; }

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

#endif

// Makes the device of `tensor` current for its lifetime, and holds torch's current stream there.
struct Place {
  DeviceGuard guard;
  void* stream;

  explicit Place(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
};

// Uninitialised memory on the device of another tensor.
template <size_t kRank>
Tensor empty(const Tensor& like, const std::array<int64_t, kRank>& size, const std::array<int64_t, kRank>& stride,
             ScalarType dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kRank, size.data(), stride.data(), static_cast<int32_t>(dtype),
                                                  device_type, like.get_device_index(), &handle));
  return fresh(Tensor(handle));
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? DType::float32 : type == ScalarType::BFloat16 ? DType::bfloat16 : DType::float16;
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check_device(tensor, name);
  STD_TORCH_CHECK(tensor.get_device_index() == other.get_device_index(), name, " must be on the device of ",
                  other_name);
}

// Same device, dtype, shape and element order, so that a kernel can index two tensors alike. The stride of a dimension
// of size 1 addresses nothing and may differ.
inline void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check_same_device(tensor, name, other, other_name);
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name);
  STD_TORCH_CHECK(tensor.dim() == other.dim(), name, " must have the shape of ", other_name);
  const auto size = tensor.sizes(), other_size = other.sizes();
  const auto stride = tensor.strides(), other_stride = other.strides();
  for (size_t d = 0; d < size.size(); ++d) {
    STD_TORCH_CHECK(size[d] == other_size[d], name, " must have the shape of ", other_name);
    STD_TORCH_CHECK(size[d] <= 1 || stride[d] == other_stride[d], name, " must have the strides of ", other_name);
  }
}

// The memory of a tensor with the layout of another, or null.
inline void* data_like(const OptionalTensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  if (!tensor) return nullptr;
  check_like(*tensor, name, other, other_name);
  return tensor->data_ptr();
}

// A dense (N, C, H, W) tensor of either memory format. Where the two coincide (one channel, one pixel) strides are
// ignored.
inline Activation activation(const Tensor& tensor, const char* name) {
  check_device(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions");
  const auto size = tensor.sizes(), stride = tensor.strides();
  const int64_t channels = size[1], pixels = size[2] * size[3];
  const bool images_dense = size[0] == 1 || stride[0] == pixels * channels;
  const bool nhwc = images_dense && (size[3] == 1 || stride[3] == channels) &&
                    (size[2] == 1 || stride[2] == size[3] * channels) && (channels == 1 || stride[1] == 1);
  const bool nchw = images_dense && (size[3] == 1 || stride[3] == 1) && (size[2] == 1 || stride[2] == size[3]) &&
                    (channels == 1 || stride[1] == pixels);
  STD_TORCH_CHECK(nhwc || nchw, name, " must be dense, in NHWC or NCHW order");
  STD_TORCH_CHECK(tensor.numel() > 0, name, " must not be empty");
  STD_TORCH_CHECK(channels < 1 << 30 && pixels < 1 << 30, name, " must have less than 2^30 channels and 2^30 pixels");
  return {size[0], channels, pixels, nhwc, dtype_of(tensor, name)};
}

// Contiguous values per channel, in float32 or in the dtype of the activations.
inline ChannelVector channel_vector(const Tensor& tensor, const char* name, const Activation& shape,
                                    const Tensor& activations) {
  check_same_device(tensor, name, activations, "the activations");
  const DType dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype == DType::float32 || dtype == shape.dtype, name,
                  " must be float32 or have the dtype of the activations");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == shape.channels, name, " must have one element per channel");
  STD_TORCH_CHECK(shape.channels == 1 || tensor.stride(0) == 1, name, " must be contiguous");
  return {tensor.data_ptr(), dtype};
}

inline ChannelVector channel_vector(const OptionalTensor& tensor, const char* name, const Activation& shape,
                                    const Tensor& activations) {
  return tensor ? channel_vector(*tensor, name, shape, activations) : ChannelVector{nullptr, DType::float32};
}

// The same in float32 only: vectors that a kernel computes.
inline float* float_vector(const Tensor& tensor, const char* name, const Activation& shape, const Tensor& activations) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  return static_cast<float*>(channel_vector(tensor, name, shape, activations).data);
}

}  // namespace resfuse
