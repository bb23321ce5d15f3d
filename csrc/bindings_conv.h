// Shared by the bindings of the convolutions of csrc/cuda and csrc/cuda/sm90: checks of their operands.
#pragma once
#include "bindings_cuda.h"

namespace resfuse {

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
};

inline void check_nhwc(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions");
  const int64_t expected[4] = {tensor.size(1) * tensor.size(2) * tensor.size(3), 1, tensor.size(3) * tensor.size(1),
                               tensor.size(1)};
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size(d) <= 1 || tensor.numel() == 0 || tensor.stride(d) == expected[d], name,
                    " must be dense in channels_last memory format");
}

// A dense NHWC tensor of the input's device and dtype.
inline void check_operand(const Tensor& tensor, const char* name, const Tensor& input) {
  check_same_device(tensor, name, input, "input");
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  check_nhwc(tensor, name);
}

inline Convolution convolution(const Tensor& input, const Tensor& weight, const Tensor& output, const Geometry& g,
                               bool tf32) {
  check_device(input, "input");
  const DType dtype = dtype_of(input, "input");
  check_nhwc(input, "input");
  check_operand(weight, "conv_weight", input);
  check_operand(output, "output", input);
  STD_TORCH_CHECK(g.stride_h > 0 && g.stride_w > 0, "stride must be positive");
  STD_TORCH_CHECK(g.padding_h >= 0 && g.padding_w >= 0, "padding must not be negative");
  STD_TORCH_CHECK(g.dilation_h > 0 && g.dilation_w > 0, "dilation must be positive");
  STD_TORCH_CHECK(g.groups > 0 && weight.size(0) % g.groups == 0, "groups must divide the filters of conv_weight");
  STD_TORCH_CHECK(weight.size(1) * g.groups == input.size(1), "conv_weight must have the channels of input / groups");
  const auto out_size = [](int64_t size, int64_t padding, int64_t dilation, int64_t kernel, int64_t stride) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  STD_TORCH_CHECK(
      output.size(0) == input.size(0) && output.size(1) == weight.size(0) &&
          output.size(2) == out_size(input.size(2), g.padding_h, g.dilation_h, weight.size(2), g.stride_h) &&
          output.size(3) == out_size(input.size(3), g.padding_w, g.dilation_w, weight.size(3), g.stride_w),
      "output must have the shape of the convolution's result");
  STD_TORCH_CHECK(output.numel() > 0 && weight.numel() > 0, "output must not be empty");
  return {input.size(0),  input.size(2),  input.size(3),  input.size(1), weight.size(0), weight.size(2),
          weight.size(3), output.size(2), output.size(3), g.stride_h,    g.stride_w,     g.padding_h,
          g.padding_w,    g.dilation_h,   g.dilation_w,   g.groups,      dtype,          tf32};
}

// A tensor with the output's shape; null if absent.
inline void* operand_like_output(const OptionalTensor& tensor, const char* name, const Tensor& input,
                                 const Tensor& output) {
  if (!tensor) return nullptr;
  check_operand(*tensor, name, input);
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor->size(d) == output.size(d), name, " must have the shape of output");
  return tensor->data_ptr();
}

}  // namespace resfuse
