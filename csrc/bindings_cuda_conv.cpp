// torch <-> resfuse.h for the convolutions of csrc/cuda; the schemas are in resfuse/backends/cuda_conv.py.
#include <algorithm>

#include "bindings_conv.h"

namespace resfuse {
namespace {

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

Tensor conv_inference_forward(const Tensor& input, const Tensor& conv_weight, OptionalTensor conv_bias,
                              OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                              OptionalTensor bias, OptionalTensor residual, const Tensor& settings) {
  const Settings given(settings, 6);
  const auto other = [&](int64_t i) { return static_cast<int64_t>(given.others[i]); };
  const Tensor x = to_nhwc(input, "input"), w = to_nhwc(conv_weight, "conv_weight");
  const Convolution conv = convolution(x, w, given.geometry, other(0) != 0);
  residual = to_nhwc(residual, "residual");
  for (OptionalTensor* vector : {&conv_bias, &running_mean, &running_var, &weight, &bias}) *vector = unstrided(*vector);
  const Activation shape = output_shape(conv);
  const auto vector = [&](const OptionalTensor& tensor, const char* name) {
    return channel_vector(tensor, name, shape, x);
  };
  void* added = operand_like_output(residual, "residual", x, conv);
  const Tensor output = output_of(x, conv, residual, given.overwrite_residual);
  OptionalTensor workspace;
  if (other(5) > 0) workspace = empty<1>(x, {other(5)}, {1}, ScalarType::Float);
  const Workspace scratch = workspace_of(workspace, x);
  const Place place(x);
  cuda::conv_inference_forward(
      {conv, config_of(other(1), other(2), other(3), other(4)), x.data_ptr(), w.data_ptr(), added, output.data_ptr(),
       vector(conv_bias, "conv_bias"), vector(running_mean, "running_mean"), vector(running_var, "running_var"),
       vector(weight, "weight"), vector(bias, "bias"), given.eps, given.relu, scratch.data, scratch.size},
      place.stream);
  return in_result_format(output, input, conv_weight);
}

void conv_train_forward(const Tensor& input, const Tensor& conv_weight, OptionalTensor conv_bias,
                        OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                        OptionalTensor bias, OptionalTensor residual, bool relu, double momentum, double eps,
                        int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                        int64_t dilation_w, int64_t groups, bool tf32, int64_t block_m, int64_t block_n,
                        int64_t launches, Tensor workspace, Tensor z, Tensor output, Tensor mean, Tensor invstd) {
  const Convolution conv =
      convolution(input, conv_weight, {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups}, tf32);
  const Activation shape = output_shape(conv);
  const auto vector = [&](const OptionalTensor& tensor, const char* name) {
    return channel_vector(tensor, name, shape, input);
  };
  const Workspace scratch = workspace_of(workspace, input);
  const Place place(input);
  cuda::conv_train_forward(
      {conv, config_of(block_m, block_n, 1, launches), input.data_ptr(), conv_weight.data_ptr(),
       operand_like_output(residual, "residual", input, conv), operand_like_output(z, "z", input, conv),
       operand_like_output(output, "output", input, conv), vector(conv_bias, "conv_bias"),
       vector(running_mean, "running_mean"), vector(running_var, "running_var"), vector(weight, "weight"),
       vector(bias, "bias"), float_vector(mean, "mean", shape, input), float_vector(invstd, "invstd", shape, input),
       momentum, eps, relu, scratch.data, scratch.size},
      place.stream);
}

Tensor pad_channels(const Tensor& input, int64_t channels, int64_t width, int64_t taps, int64_t stride, int64_t padding,
                    int64_t dilation) {
  check_device(input, "input");
  const DType dtype = dtype_of(input, "input");
  STD_TORCH_CHECK(input.dim() == 4 && input.numel() > 0, "input must have 4 dimensions and not be empty");
  const auto size = input.sizes(), strides = input.strides();
  STD_TORCH_CHECK(taps > 0 && width > 0 && stride >= 0 && padding >= 0 && dilation >= 0,
                  "taps and width must be positive; stride, padding and dilation must not be negative");
  const int64_t most = INT32_MAX;  // tested one by one, so that no product overflows
  STD_TORCH_CHECK(size[1] <= most && taps <= most && channels >= size[1] * taps && channels <= most / width,
                  "channels must be at least those of input by taps, and a row of them fit 31 bits");
  STD_TORCH_CHECK(std::max({size[3], stride, padding, dilation}) <= most && width * stride + taps * dilation <= most,
                  "a row of input, with its padding, must fit 31 bits");
  const Size4 out{size[0], channels, size[2], width};
  const Tensor output = empty(input, out, nhwc_strides(out), input.scalar_type());
  const Place place(input);
  PadChannels args{
      {}, {}, channels, width, taps, stride, padding, dilation, dtype, input.data_ptr(), output.data_ptr()};
  std::copy_n(size.begin(), 4, args.size);
  std::copy_n(strides.begin(), 4, args.strides);
  cuda::pad_channels(args, place.stream);
  return output;
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_cuda, RESFUSE_DISPATCH_KEY, m) {
  m.impl("conv_inference_forward", TORCH_BOX(&resfuse::conv_inference_forward));
  m.impl("conv_train_forward", TORCH_BOX(&resfuse::conv_train_forward));
  m.impl("pad_channels", TORCH_BOX(&resfuse::pad_channels));
}
