// torch <-> resfuse.h for the convolutions of csrc/cuda; the schemas are in resfuse/backends/cuda_conv.py.
#include "bindings_cuda.h"

namespace resfuse {
namespace {

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
};

void check_nhwc(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions");
  const int64_t expected[4] = {tensor.size(1) * tensor.size(2) * tensor.size(3), 1, tensor.size(3) * tensor.size(1),
                               tensor.size(1)};
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size(d) <= 1 || tensor.numel() == 0 || tensor.stride(d) == expected[d], name,
                    " must be dense in channels_last memory format");
}

// A dense NHWC tensor of the input's device and dtype.
void check_operand(const Tensor& tensor, const char* name, const Tensor& input) {
  check_same_device(tensor, name, input, "input");
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  check_nhwc(tensor, name);
}

Convolution convolution(const Tensor& input, const Tensor& weight, const Tensor& output, const Geometry& g, bool tf32) {
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
void* operand_like_output(const OptionalTensor& tensor, const char* name, const Tensor& input, const Tensor& output) {
  if (!tensor) return nullptr;
  check_operand(*tensor, name, input);
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor->size(d) == output.size(d), name, " must have the shape of output");
  return tensor->data_ptr();
}

ConvConfig config_of(int64_t block_m, int64_t block_n, int64_t splits, int64_t launches) {
  STD_TORCH_CHECK(splits > 0 && splits <= 1024, "splits must be in 1 .. 1024");
  STD_TORCH_CHECK(launches >= 0 && launches <= 2, "launches must be 0, 1 or 2");
  return {static_cast<int32_t>(block_m), static_cast<int32_t>(block_n), static_cast<int32_t>(splits),
          static_cast<int32_t>(launches)};
}

struct Workspace {
  void* data;
  int64_t size;
};

Workspace workspace_of(const OptionalTensor& tensor, const Tensor& input) {
  if (!tensor) return {nullptr, 0};
  check_same_device(*tensor, "workspace", input, "input");
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                  "workspace must be contiguous and float32");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 == 0, "workspace must be aligned to 16 bytes");
  return {tensor->data_ptr(), tensor->numel()};
}

void conv_inference_forward(const Tensor& input, const Tensor& conv_weight, OptionalTensor conv_bias,
                            OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                            OptionalTensor bias, OptionalTensor residual, bool relu, double eps, int64_t stride_h,
                            int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                            int64_t dilation_w, int64_t groups, bool tf32, int64_t block_m, int64_t block_n,
                            int64_t splits, int64_t launches, OptionalTensor workspace, Tensor output) {
  const Convolution conv = convolution(
      input, conv_weight, output, {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups}, tf32);
  const Activation shape{conv.batch, conv.filters, conv.out_height * conv.out_width, true, conv.dtype};
  const auto vector = [&](const OptionalTensor& tensor, const char* name) {
    return channel_vector(tensor, name, shape, input);
  };
  const Workspace scratch = workspace_of(workspace, input);
  const Place place(input);
  cuda::conv_inference_forward(
      {conv, config_of(block_m, block_n, splits, launches), input.data_ptr(), conv_weight.data_ptr(),
       operand_like_output(residual, "residual", input, output), output.data_ptr(), vector(conv_bias, "conv_bias"),
       vector(running_mean, "running_mean"), vector(running_var, "running_var"), vector(weight, "weight"),
       vector(bias, "bias"), eps, relu, scratch.data, scratch.size},
      place.stream);
}

void conv_train_forward(const Tensor& input, const Tensor& conv_weight, OptionalTensor conv_bias,
                        OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                        OptionalTensor bias, OptionalTensor residual, bool relu, double momentum, double eps,
                        int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                        int64_t dilation_w, int64_t groups, bool tf32, int64_t block_m, int64_t block_n,
                        int64_t launches, Tensor workspace, Tensor z, Tensor output, Tensor mean, Tensor invstd) {
  const Convolution conv = convolution(
      input, conv_weight, output, {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups}, tf32);
  const Activation shape{conv.batch, conv.filters, conv.out_height * conv.out_width, true, conv.dtype};
  const auto vector = [&](const OptionalTensor& tensor, const char* name) {
    return channel_vector(tensor, name, shape, input);
  };
  const Workspace scratch = workspace_of(workspace, input);
  const Place place(input);
  cuda::conv_train_forward(
      {conv, config_of(block_m, block_n, 1, launches), input.data_ptr(), conv_weight.data_ptr(),
       operand_like_output(residual, "residual", input, output), operand_like_output(z, "z", input, output),
       output.data_ptr(), vector(conv_bias, "conv_bias"), vector(running_mean, "running_mean"),
       vector(running_var, "running_var"), vector(weight, "weight"), vector(bias, "bias"),
       float_vector(mean, "mean", shape, input), float_vector(invstd, "invstd", shape, input), momentum, eps, relu,
       scratch.data, scratch.size},
      place.stream);
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_cuda, RESFUSE_DISPATCH_KEY, m) {
  m.impl("conv_inference_forward", TORCH_BOX(&resfuse::conv_inference_forward));
  m.impl("conv_train_forward", TORCH_BOX(&resfuse::conv_train_forward));
}
