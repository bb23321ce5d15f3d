// torch <-> resfuse.h for the convolutions of csrc/cuda/sm100; the schema is in resfuse/backends/sm100.py.
#include "bindings_conv.h"

namespace resfuse {
namespace {

constexpr int64_t kAlignment = 16;  // of what TMA reads and writes

Tensor conv_forward(const Tensor& input, const Tensor& conv_weight, OptionalTensor conv_bias,
                    OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias,
                    OptionalTensor residual, const Tensor& settings) {
  const Settings given(settings, 1);
  const Tensor x = to_nhwc(input, "input", kAlignment), w = to_nhwc(conv_weight, "conv_weight", kAlignment);
  const Convolution conv = convolution(x, w, given.geometry, false);
  STD_TORCH_CHECK(conv.dtype != DType::float32, "input must be bfloat16 or float16");
  STD_TORCH_CHECK(conv.groups == 1 && conv.channels % 8 == 0 && conv.filters % 8 == 0,
                  "groups must be 1, and channels and filters multiples of 8");
  residual = to_nhwc(residual, "residual", kAlignment);
  for (OptionalTensor* vector : {&conv_bias, &running_mean, &running_var, &weight, &bias}) *vector = unstrided(*vector);
  const Activation shape = output_shape(conv);
  const auto vector = [&](const OptionalTensor& tensor, const char* name) {
    return channel_vector(tensor, name, shape, x);
  };
  void* added = operand_like_output(residual, "residual", x, conv);
  const Tensor output = output_of(x, conv, residual, given.overwrite_residual);
  const Place place(x);
  sm100::conv_forward(
      {conv, static_cast<int32_t>(given.others[0]), 0, 0, x.data_ptr(), w.data_ptr(), added, output.data_ptr(),
       vector(conv_bias, "conv_bias"), vector(running_mean, "running_mean"), vector(running_var, "running_var"),
       vector(weight, "weight"), vector(bias, "bias"), given.eps, given.relu, nullptr},
      place.stream);
  return in_result_format(output, input, conv_weight);
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_sm100, RESFUSE_DISPATCH_KEY, m) {
  m.impl("conv_forward", TORCH_BOX(&resfuse::conv_forward));
}
