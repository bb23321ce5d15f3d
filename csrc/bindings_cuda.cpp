// torch <-> resfuse.h for CUDA tensors, on torch's stable ABI: no Python.h, no ATen, one binary for many torch
// versions. The schemas are in resfuse/backends/cuda.py.
#include <vector>

#include "bindings_conv.h"

namespace resfuse {
namespace {

void add_relu_forward(const Tensor& input, const Tensor& residual, Tensor output) {
  check_device(input, "input");
  check_like(residual, "residual", input, "input");
  check_like(output, "output", input, "input");
  const Place place(input);
  cuda::add_relu_forward(
      {input.data_ptr(), residual.data_ptr(), output.data_ptr(), input.numel(), dtype_of(input, "input")},
      place.stream);
}

void add_relu_backward(const Tensor& grad_output, const Tensor& output, Tensor grad_input) {
  check_device(output, "output");
  check_like(grad_output, "grad_output", output, "output");
  check_like(grad_input, "grad_input", output, "output");
  const Place place(output);
  cuda::add_relu_backward(
      {grad_output.data_ptr(), output.data_ptr(), grad_input.data_ptr(), output.numel(), dtype_of(output, "output")},
      place.stream);
}

int64_t bn_workspace_size(const Tensor& input) {
  const Activation shape = activation(input, "input");
  const Place place(input);
  return cuda::bn_workspace_size(shape.channels);
}

// Requires the device of `input` to be current.
float* checked_workspace(const Tensor& workspace, const Tensor& input, const Activation& shape) {
  check_same_device(workspace, "workspace", input, "input");
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Float && workspace.dim() == 1 && workspace.stride(0) == 1,
                  "workspace must be a contiguous float32 vector");
  const int64_t needed = cuda::bn_workspace_size(shape.channels);
  STD_TORCH_CHECK(workspace.size(0) >= needed, "workspace must have at least ", needed, " elements");
  return static_cast<float*>(workspace.data_ptr());
}

// Those that a convolution has computed, of so many parts.
float* known_moments(const Tensor& workspace, const Tensor& input, const Activation& shape, int64_t parts) {
  STD_TORCH_CHECK(shape.channels_last && workspace.numel() >= 2 * parts * shape.channels,
                  "known_part takes NHWC memory, and a workspace with the moments of ", parts, " parts");
  check_same_device(workspace, "workspace", input, "input");
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Float && workspace.is_contiguous(),
                  "workspace must be contiguous and float32");
  return static_cast<float*>(workspace.data_ptr());
}

int32_t checked_launches(int64_t launches) {
  STD_TORCH_CHECK(launches >= 0 && launches <= 2, "launches must be 1, 2 or 0 (as few as possible)");
  return static_cast<int32_t>(launches);
}

void bn_statistics(const Tensor& input, Tensor mean, Tensor m2, Tensor workspace, int64_t launches) {
  const Activation shape = activation(input, "input");
  const Place place(input);
  cuda::bn_statistics(
      {shape, input.data_ptr(), float_vector(mean, "mean", shape, input), float_vector(m2, "m2", shape, input),
       checked_workspace(workspace, input, shape), checked_launches(launches)},
      place.stream);
}

void bn_train_forward(const Tensor& input, OptionalTensor residual, OptionalTensor running_mean,
                      OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias, bool relu,
                      double momentum, double eps, Tensor output, Tensor mean, Tensor invstd, Tensor workspace,
                      int64_t launches, int64_t known_part) {
  const Activation shape = activation(input, "input");
  STD_TORCH_CHECK(shape.batch * shape.pixels > 1, "input must have more than one value per channel");
  check_like(output, "output", input, "input");
  const int64_t parts = known_part > 0 ? (shape.batch * shape.pixels + known_part - 1) / known_part : 0;
  const Place place(input);
  cuda::bn_train_forward(
      {shape, input.data_ptr(), data_like(residual, "residual", input, "input"),
       channel_vector(weight, "weight", shape, input), channel_vector(bias, "bias", shape, input),
       channel_vector(running_mean, "running_mean", shape, input),
       channel_vector(running_var, "running_var", shape, input), momentum, eps, relu, output.data_ptr(),
       float_vector(mean, "mean", shape, input), float_vector(invstd, "invstd", shape, input),
       parts > 0 ? known_moments(workspace, input, shape, parts) : checked_workspace(workspace, input, shape),
       checked_launches(launches), static_cast<int32_t>(parts), known_part},
      place.stream);
}

void bn_apply(const Tensor& input, OptionalTensor residual, const Tensor& mean, const Tensor& spread,
              OptionalTensor weight, OptionalTensor bias, bool relu, bool spread_is_variance, double eps,
              Tensor output) {
  const Activation shape = activation(input, "input");
  check_like(output, "output", input, "input");
  const Place place(input);
  cuda::bn_apply({shape, input.data_ptr(), data_like(residual, "residual", input, "input"),
                  channel_vector(weight, "weight", shape, input), channel_vector(bias, "bias", shape, input),
                  channel_vector(mean, "mean", shape, input), channel_vector(spread, "spread", shape, input),
                  spread_is_variance, eps, relu, output.data_ptr()},
                 place.stream);
}

void bn_backward(const Tensor& grad_output, const Tensor& input, OptionalTensor output, OptionalTensor weight,
                 OptionalTensor bias, const Tensor& mean, const Tensor& invstd, bool relu, bool batch_statistics,
                 OptionalTensor grad_input, OptionalTensor grad_residual, Tensor sum_g, Tensor sum_g_xhat,
                 Tensor workspace, int64_t launches) {
  const Activation shape = activation(input, "input");
  check_like(grad_output, "grad_output", input, "input");
  const Place place(input);
  cuda::bn_backward({shape, grad_output.data_ptr(), input.data_ptr(), data_like(output, "output", input, "input"),
                     channel_vector(weight, "weight", shape, input), channel_vector(bias, "bias", shape, input),
                     channel_vector(mean, "mean", shape, input), channel_vector(invstd, "invstd", shape, input), relu,
                     batch_statistics, data_like(grad_input, "grad_input", input, "input"),
                     data_like(grad_residual, "grad_residual", input, "input"),
                     float_vector(sum_g, "sum_g", shape, input), float_vector(sum_g_xhat, "sum_g_xhat", shape, input),
                     checked_workspace(workspace, input, shape), checked_launches(launches)},
                    place.stream);
}

void bn_backward_apply(const Tensor& grad_output, const Tensor& input, OptionalTensor weight, const Tensor& mean,
                       const Tensor& invstd, const Tensor& sum_g, const Tensor& sum_g_xhat, double count,
                       Tensor grad_input) {
  const Activation shape = activation(input, "input");
  check_like(grad_output, "grad_output", input, "input");
  check_like(grad_input, "grad_input", input, "input");
  const Place place(input);
  cuda::bn_backward_apply({shape, grad_output.data_ptr(), input.data_ptr(),
                           channel_vector(weight, "weight", shape, input), channel_vector(mean, "mean", shape, input),
                           channel_vector(invstd, "invstd", shape, input), channel_vector(sum_g, "sum_g", shape, input),
                           channel_vector(sum_g_xhat, "sum_g_xhat", shape, input), count, grad_input.data_ptr()},
                          place.stream);
}

// Height and width of input and output come from the tensors, the rest from `settings`: kernel, stride, padding,
// dilation (vertical, horizontal).
Pooling pooling(const Tensor& input, const Tensor& output, const char* name, const Tensor& positions,
                const std::vector<int64_t>& settings) {
  check_device(input, "input");
  check_operand(output, name, input);
  check_nhwc(input, "input");
  check_same_device(positions, "positions", input, "input");
  check_nhwc(positions, "positions");
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Byte, "positions must be uint8");
  STD_TORCH_CHECK(settings.size() == 8, "settings must be 8 numbers");
  STD_TORCH_CHECK(settings[0] * settings[1] <= 256, "settings must have at most 256 elements in a window");
  STD_TORCH_CHECK(input.numel() > 0 && output.numel() > 0, "input and output must not be empty");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(d >= 2 || output.size(d) == input.size(d), name, " must have the images and channels of input");
    STD_TORCH_CHECK(positions.size(d) == output.size(d), "positions must have the shape of ", name);
  }
  for (const Tensor* tensor : {&input, &output})
    STD_TORCH_CHECK(
        tensor->size(0) * tensor->size(2) < int64_t{1} << 31 && tensor->size(3) * tensor->size(1) < int64_t{1} << 31,
        "rows of a batch, and values of a row, must be less than 2^31");
  const auto axis = [&](int64_t i) {
    return PoolAxis{input.size(2 + i), output.size(2 + i), settings[i],
                    settings[2 + i],   settings[4 + i],    settings[6 + i]};
  };
  return {input.size(0), input.size(1), axis(0), axis(1), dtype_of(input, "input")};
}

void max_pool_forward(const Tensor& input, std::vector<int64_t> settings, Tensor output, Tensor positions) {
  const Pooling pool = pooling(input, output, "output", positions, settings);
  const Place place(input);
  cuda::max_pool_forward({pool, input.data_ptr(), output.data_ptr(), static_cast<uint8_t*>(positions.data_ptr())},
                         place.stream);
}

void max_pool_backward(const Tensor& grad_output, const Tensor& positions, std::vector<int64_t> settings,
                       Tensor grad_input) {
  const Pooling pool = pooling(grad_input, grad_output, "grad_output", positions, settings);
  const Place place(grad_input);
  cuda::max_pool_backward(
      {pool, grad_output.data_ptr(), static_cast<const uint8_t*>(positions.data_ptr()), grad_input.data_ptr()},
      place.stream);
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_cuda, RESFUSE_DISPATCH_KEY, m) {
  m.impl("add_relu_forward", TORCH_BOX(&resfuse::add_relu_forward));
  m.impl("add_relu_backward", TORCH_BOX(&resfuse::add_relu_backward));
  m.impl("bn_workspace_size", TORCH_BOX(&resfuse::bn_workspace_size));
  m.impl("bn_statistics", TORCH_BOX(&resfuse::bn_statistics));
  m.impl("bn_train_forward", TORCH_BOX(&resfuse::bn_train_forward));
  m.impl("bn_apply", TORCH_BOX(&resfuse::bn_apply));
  m.impl("bn_backward", TORCH_BOX(&resfuse::bn_backward));
  m.impl("bn_backward_apply", TORCH_BOX(&resfuse::bn_backward_apply));
  m.impl("max_pool_forward", TORCH_BOX(&resfuse::max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&resfuse::max_pool_backward));
}
