// torch <-> resfuse.h for the convolutions of csrc/cuda/sm90; the schema is in resfuse/backends/sm90.py.
#include "bindings_conv.h"

namespace resfuse {
namespace {

constexpr int64_t kAlignment = 16;  // of what TMA reads and writes

Tensor conv_forward(const Tensor& input, const Tensor& conv_weight, OptionalTensor conv_bias,
                    OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias,
                    OptionalTensor residual, OptionalTensor parts, const Tensor& settings) {
  const Settings given(settings, 3);
  const auto other = [&](int64_t i) { return static_cast<int32_t>(given.others[i]); };
  const int32_t tile_n = other(0), blocks = other(1), tiles_per_part = other(2);
  const Tensor x = to_nhwc(input, "input", kAlignment), w = to_nhwc(conv_weight, "conv_weight", kAlignment);
  const Convolution conv = convolution(x, w, given.geometry, true);
  const int64_t multiple = conv.dtype == DType::float32 ? kAlignment / 4 : kAlignment / 2;
  STD_TORCH_CHECK(conv.groups == 1 && conv.channels % multiple == 0 && conv.filters % multiple == 0,
                  "groups must be 1, and channels and filters multiples of ", multiple);
  STD_TORCH_CHECK(blocks > 0, "blocks must be positive");
  STD_TORCH_CHECK(parts.has_value() == (tiles_per_part > 0), "parts and tiles_per_part belong together");
  residual = to_nhwc(residual, "residual", kAlignment);
  for (OptionalTensor* vector : {&conv_bias, &running_mean, &running_var, &weight, &bias}) *vector = unstrided(*vector);
  const Activation shape = output_shape(conv);
  const auto vector = [&](const OptionalTensor& tensor, const char* name) {
    return channel_vector(tensor, name, shape, x);
  };
  float* moments = nullptr;
  if (parts) {
    STD_TORCH_CHECK(!running_var && !weight && !bias && !residual && !given.relu,
                    "in training the convolution and its statistics are all that is computed");
    const int64_t part = tiles_per_part * 128, needed = (shape.batch * shape.pixels + part - 1) / part;
    check_same_device(*parts, "parts", x, "input");
    STD_TORCH_CHECK(parts->scalar_type() == ScalarType::Float && parts->is_contiguous() &&
                        parts->numel() >= 2 * needed * shape.channels,
                    "parts must be contiguous and float32, with a mean and an M2 of each channel for ", needed,
                    " parts");
    moments = static_cast<float*>(parts->data_ptr());
  }
  void* added = operand_like_output(residual, "residual", x, conv);
  const Tensor output = output_of(x, conv, residual, given.overwrite_residual);
  const Place place(x);
  sm90::conv_forward(
      {conv, tile_n, blocks, tiles_per_part, x.data_ptr(), w.data_ptr(), added, output.data_ptr(),
       vector(conv_bias, "conv_bias"), vector(running_mean, "running_mean"), vector(running_var, "running_var"),
       vector(weight, "weight"), vector(bias, "bias"), given.eps, given.relu, moments},
      place.stream);
  return in_result_format(output, input, conv_weight);
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_sm90, RESFUSE_DISPATCH_KEY, m) {
  m.impl("conv_forward", TORCH_BOX(&resfuse::conv_forward));
}
