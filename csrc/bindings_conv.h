// Shared by the bindings of the convolutions of csrc/cuda and csrc/cuda/sm90: checks of their operands.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <array>

#include "bindings_cuda.h"

namespace resfuse {

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
};

// The numbers of a convolution, in one tensor of float64 on the CPU: PyTorch takes half a microsecond for each of an
// operator's. Those that come last are the backend's.
struct Settings {
  Geometry geometry;
  double eps;
  bool relu, overwrite_residual;
  const double* others;

  Settings(const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() &&
                        tensor.numel() == 10 + count,
                    "settings must be ", 10 + count, " numbers in float64 on the CPU");
    const double* at = static_cast<const double*>(tensor.data_ptr());
    const auto next = [&] { return static_cast<int64_t>(*at++); };
    geometry = {next(), next(), next(), next(), next(), next(), next()};
    eps = *at++;
    relu = next() != 0;
    overwrite_residual = next() != 0;
    others = at;
  }
};

using Size4 = std::array<int64_t, 4>;

inline Size4 nhwc_strides(const Size4& size) { return {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]}; }

inline bool is_nhwc(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions");
  const Size4 expected = nhwc_strides({tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)});
  for (int64_t d = 0; d < 4; ++d)
    if (tensor.size(d) > 1 && tensor.numel() > 0 && tensor.stride(d) != expected[d]) return false;
  return true;
}

inline void check_nhwc(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_nhwc(tensor, name), name, " must be dense in channels_last memory format");
}

// The tensor itself where it is dense in NHWC order, at a multiple of `alignment` bytes; else a copy that is.
inline Tensor to_nhwc(const Tensor& tensor, const char* name, int64_t alignment = 1) {
  if (!is_nhwc(tensor, name)) return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0 ? tensor : torch::stable::clone(tensor);
}

inline OptionalTensor to_nhwc(const OptionalTensor& tensor, const char* name, int64_t alignment = 1) {
  return tensor ? OptionalTensor(to_nhwc(*tensor, name, alignment)) : std::nullopt;
}

// As resfuse.layout.is_channels_last: strides decide, where both orders are the same memory.
inline bool is_channels_last(const Tensor& tensor) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  return stride[1] == 1 && stride[3] >= size[1] && (stride[3] > 1 || stride[2] > 1);
}

// The convolution's result is channels_last if its input or weight is: PyTorch's own rule.
inline Tensor in_result_format(const Tensor& output, const Tensor& input, const Tensor& weight) {
  return is_channels_last(input) || is_channels_last(weight) ? output : torch::stable::contiguous(output);
}

// A dense NHWC tensor of the input's device and dtype.
inline void check_operand(const Tensor& tensor, const char* name, const Tensor& input) {
  check_same_device(tensor, name, input, "input");
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  check_nhwc(tensor, name);
}

// A convolution of operands that kernels can read.
inline Convolution convolution(const Tensor& input, const Tensor& weight, const Geometry& g, bool tf32) {
  check_device(input, "input");
  const DType dtype = dtype_of(input, "input");
  check_nhwc(input, "input");
  check_operand(weight, "conv_weight", input);
  STD_TORCH_CHECK(g.stride_h > 0 && g.stride_w > 0, "stride must be positive");
  STD_TORCH_CHECK(g.padding_h >= 0 && g.padding_w >= 0, "padding must not be negative");
  STD_TORCH_CHECK(g.dilation_h > 0 && g.dilation_w > 0, "dilation must be positive");
  STD_TORCH_CHECK(g.groups > 0 && weight.size(0) % g.groups == 0, "groups must divide the filters of conv_weight");
  STD_TORCH_CHECK(weight.size(1) * g.groups == input.size(1), "conv_weight must have the channels of input / groups");
  STD_TORCH_CHECK(input.numel() > 0 && weight.numel() > 0, "input and conv_weight must not be empty");
  const auto out_size = [](int64_t size, int64_t padding, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t beyond = size + 2 * padding - dilation * (kernel - 1) - 1;
    STD_TORCH_CHECK(beyond >= 0, "input must not be smaller than the filter");
    return beyond / stride + 1;
  };
  return {input.size(0),
          input.size(2),
          input.size(3),
          input.size(1),
          weight.size(0),
          weight.size(2),
          weight.size(3),
          out_size(input.size(2), g.padding_h, g.dilation_h, weight.size(2), g.stride_h),
          out_size(input.size(3), g.padding_w, g.dilation_w, weight.size(3), g.stride_w),
          g.stride_h,
          g.stride_w,
          g.padding_h,
          g.padding_w,
          g.dilation_h,
          g.dilation_w,
          g.groups,
          dtype,
          tf32};
}

inline Activation output_shape(const Convolution& conv) {
  return {conv.batch, conv.filters, conv.out_height * conv.out_width, true, conv.dtype};
}

// The memory of a tensor with the shape of the convolution's result; null if absent.
inline void* operand_like_output(const OptionalTensor& tensor, const char* name, const Tensor& input,
                                 const Convolution& conv) {
  if (!tensor) return nullptr;
  check_operand(*tensor, name, input);
  STD_TORCH_CHECK(tensor->size(0) == conv.batch && tensor->size(1) == conv.filters &&
                      tensor->size(2) == conv.out_height && tensor->size(3) == conv.out_width,
                  name, " must have the shape of the convolution's result");
  return tensor->data_ptr();
}

// The result: fresh NHWC memory, or that of the residual.
inline Tensor output_of(const Tensor& input, const Convolution& conv, const OptionalTensor& residual,
                        bool overwrite_residual) {
  if (overwrite_residual && residual) return *residual;
  const Size4 size{conv.batch, conv.filters, conv.out_height, conv.out_width};
  return empty(input, size, nhwc_strides(size), input.scalar_type());
}

// A vector as kernels read it.
inline OptionalTensor unstrided(const OptionalTensor& vector) {
  return vector && vector->dim() == 1 && vector->stride(0) != 1 ? torch::stable::contiguous(*vector) : vector;
}

}  // namespace resfuse
