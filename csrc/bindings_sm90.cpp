// torch <-> resfuse.h for the convolutions of csrc/cuda/sm90; the schema is in resfuse/backends/sm90.py.
#include "bindings_conv.h"

namespace resfuse {
namespace {

void conv_forward(const Tensor& input, const Tensor& conv_weight, OptionalTensor conv_bias, OptionalTensor running_mean,
                  OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                  bool relu, double eps, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                  int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t tile_n, int64_t blocks,
                  int64_t tiles_per_part, OptionalTensor parts, Tensor output) {
  const Convolution conv = convolution(
      input, conv_weight, output, {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups}, false);
  STD_TORCH_CHECK(conv.dtype != DType::float32, "input must be bfloat16 or float16");
  STD_TORCH_CHECK(groups == 1 && conv.channels % 8 == 0 && conv.filters % 8 == 0,
                  "groups must be 1, and channels and filters multiples of 8");
  STD_TORCH_CHECK(blocks > 0, "blocks must be positive");
  STD_TORCH_CHECK(parts.has_value() == (tiles_per_part > 0), "parts and tiles_per_part belong together");
  const Activation shape{conv.batch, conv.filters, conv.out_height * conv.out_width, true, conv.dtype};
  const auto vector = [&](const OptionalTensor& tensor, const char* name) {
    return channel_vector(tensor, name, shape, input);
  };
  float* moments = nullptr;
  if (parts) {
    STD_TORCH_CHECK(!running_var && !weight && !bias && !residual && !relu,
                    "in training the convolution and its statistics are all that is computed");
    const int64_t part = tiles_per_part * 128, needed = (shape.batch * shape.pixels + part - 1) / part;
    check_same_device(*parts, "parts", input, "input");
    STD_TORCH_CHECK(parts->scalar_type() == ScalarType::Float && parts->is_contiguous() &&
                        parts->numel() >= 2 * needed * shape.channels,
                    "parts must be contiguous and float32, with a mean and an M2 of each channel for ", needed,
                    " parts");
    moments = static_cast<float*>(parts->data_ptr());
  }
  const Place place(input);
  sm90::conv_forward(
      {conv, static_cast<int32_t>(tile_n), static_cast<int32_t>(blocks), static_cast<int32_t>(tiles_per_part),
       input.data_ptr(), conv_weight.data_ptr(), operand_like_output(residual, "residual", input, output),
       output.data_ptr(), vector(conv_bias, "conv_bias"), vector(running_mean, "running_mean"),
       vector(running_var, "running_var"), vector(weight, "weight"), vector(bias, "bias"), eps, relu, moments},
      place.stream);
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_sm90, RESFUSE_DISPATCH_KEY, m) {
  m.impl("conv_forward", TORCH_BOX(&resfuse::conv_forward));
}
