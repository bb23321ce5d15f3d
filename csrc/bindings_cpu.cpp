// torch <-> plain structs for the CPU kernels of batch norm, activations and pooling, on the stable ABI.  Schemas are
// in resfuse/backends/cpu_kernels.py. Results are allocated here, but for those of max pooling, whose size the caller
// knows.
#include <string>
#include <tuple>
#include <vector>

#include "bindings_cpu.h"

namespace {

using namespace resfuse::cpu::bindings;
using resfuse::Activation;
using resfuse::DType;

// Same dtype, shape and order in memory: what lets a kernel walk two tensors with one index.
void check_like(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": its dtype is not that of the input");
  STD_TORCH_CHECK(tensor.dim() == like.dim(), name, ": its rank is not that of the input");
  for (int64_t i = 0; i < like.dim(); ++i) {
    STD_TORCH_CHECK(tensor.size(i) == like.size(i), name, ": its shape is not that of the input");
    STD_TORCH_CHECK(like.size(i) <= 1 || tensor.stride(i) == like.stride(i), name,
                    ": its strides are not those of the input");
  }
}

// NHWC and NCHW are the same memory order for one channel or one pixel, whatever the strides say.
Activation activation(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected 4 dimensions, got ", tensor.dim());
  const auto size = tensor.sizes();
  const auto stride = tensor.strides();
  const int64_t channels = size[1], pixels = size[2] * size[3];
  const bool nhwc = (size[3] == 1 || stride[3] == channels) && (size[2] == 1 || stride[2] == size[3] * channels) &&
                    (channels == 1 || stride[1] == 1) && (size[0] == 1 || stride[0] == pixels * channels);
  const bool nchw = (size[3] == 1 || stride[3] == 1) && (size[2] == 1 || stride[2] == size[3]) &&
                    (channels == 1 || stride[1] == pixels) && (size[0] == 1 || stride[0] == pixels * channels);
  STD_TORCH_CHECK(nhwc || nchw, name, ": expected a dense tensor in NHWC or NCHW order");
  return {size[0], channels, pixels, nhwc, dtype_of(tensor, name)};
}

float* vector(const Tensor& tensor, int64_t channels, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == channels && tensor.is_contiguous(),
                  name, ": expected a contiguous float32 vector with one element per channel");
  return static_cast<float*>(tensor.data_ptr());
}

float* vector(const OptionalTensor& tensor, int64_t channels, const char* name) {
  return tensor ? vector(*tensor, channels, name) : nullptr;
}

const void* data(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor) return nullptr;
  check_like(*tensor, like, name);
  return tensor->data_ptr();
}

// A result in the shape and order of a tensor without gaps.
Tensor empty_as(const Tensor& tensor, Memory memory) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  return empty(tensor.dim(), size.data(), stride.data(), dtype_of(tensor, "input"), memory);
}

Tensor empty_vector(int64_t size) {
  const int64_t stride = 1;
  return empty(1, &size, &stride, aoti_torch_dtype_float32());
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

Tensor add_relu_forward(Tensor input, Tensor residual) {
  check_like(residual, input, "residual");
  const Tensor output = empty_as(input, Memory::pytorch);
  resfuse::cpu::add_relu_forward(
      {input.data_ptr(), residual.data_ptr(), written(output), input.numel(), dtype_of(input, "input")});
  return output;
}

Tensor add_relu_backward(Tensor grad_output, Tensor output) {
  check_like(grad_output, output, "grad_output");
  const Tensor grad_input = empty_as(output, Memory::pool);
  resfuse::cpu::add_relu_backward(
      {grad_output.data_ptr(), output.data_ptr(), written(grad_input), output.numel(), dtype_of(output, "output")});
  return grad_input;
}

std::tuple<Tensor, Tensor> bn_statistics(Tensor input) {
  const Activation shape = activation(input, "input");
  const Tensor mean = empty_vector(shape.channels), m2 = empty_vector(shape.channels);
  resfuse::cpu::bn_statistics({shape, input.data_ptr(), floats(mean), floats(m2)});
  return {mean, m2};
}

resfuse::BnApply apply_args(const Tensor& input, const OptionalTensor& residual, const Tensor& mean,
                            const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias, bool relu,
                            const Tensor& output) {
  const Activation shape = activation(input, "input");
  const int64_t channels = shape.channels;
  return {shape,
          input.data_ptr(),
          data(residual, input, "residual"),
          vector(mean, channels, "mean"),
          vector(invstd, channels, "invstd"),
          vector(weight, channels, "weight"),
          vector(bias, channels, "bias"),
          relu,
          written(output)};
}

Tensor bn_apply(Tensor input, OptionalTensor residual, Tensor mean, Tensor invstd, OptionalTensor weight,
                OptionalTensor bias, bool relu, bool pooled) {
  const Tensor output = empty_as(input, pooled ? Memory::pool : Memory::pytorch);
  resfuse::cpu::bn_apply(apply_args(input, residual, mean, invstd, weight, bias, relu, output));
  return output;
}

Tensor bn_eval_forward(Tensor input, OptionalTensor residual, Tensor running_mean, Tensor running_var,
                       OptionalTensor weight, OptionalTensor bias, double eps, bool relu) {
  const Tensor output = empty_as(input, Memory::pytorch);
  const auto apply = apply_args(input, residual, running_mean, running_var, weight, bias, relu, output);
  resfuse::cpu::bn_eval_forward({apply, apply.invstd, eps});
  return output;
}

std::tuple<Tensor, Tensor, Tensor> bn_train_forward(Tensor input, OptionalTensor residual, OptionalTensor weight,
                                                    OptionalTensor bias, OptionalTensor running_mean,
                                                    OptionalTensor running_var, OptionalTensor statistics,
                                                    double momentum, double eps, bool relu, bool pooled) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected 4 dimensions, got ", input.dim());
  const int64_t channels = input.size(1);
  const Tensor output = empty_as(input, pooled ? Memory::pool : Memory::pytorch);
  const Tensor mean = empty_vector(channels), invstd = empty_vector(channels);
  const resfuse::BnApply apply = apply_args(input, residual, mean, invstd, weight, bias, relu, output);
  const double* known = nullptr;
  if (statistics) {
    STD_TORCH_CHECK(statistics->scalar_type() == ScalarType::Double && statistics->is_contiguous() &&
                        statistics->numel() == 2 * channels,
                    "statistics: expected the mean and M2 of each channel in float64");
    known = static_cast<const double*>(statistics->data_ptr());
  }
  resfuse::cpu::bn_train_forward({apply, known, floats(mean), floats(invstd),
                                  vector(running_mean, channels, "running_mean"),
                                  vector(running_var, channels, "running_var"), momentum, eps});
  return {output, mean, invstd};
}

resfuse::BnMask mask_args(const Tensor& grad_output, const Tensor& input, const OptionalTensor& output,
                          const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                          const Tensor& invstd, bool relu) {
  const int64_t channels = input.size(1);
  return {data(grad_output, input, "grad_output"),
          data(output, input, "output"),
          vector(mean, channels, "mean"),
          vector(invstd, channels, "invstd"),
          vector(weight, channels, "weight"),
          vector(bias, channels, "bias"),
          relu};
}

Tensor bn_backward_apply(Tensor grad_output, Tensor input, OptionalTensor output, OptionalTensor weight,
                         OptionalTensor bias, Tensor mean, Tensor invstd, bool relu, Tensor sum_g, Tensor sum_g_xhat,
                         double count) {
  const Activation shape = activation(input, "input");
  const int64_t channels = shape.channels;
  const Tensor grad_input = empty_as(input, Memory::pool);
  resfuse::cpu::bn_backward_apply(
      {shape, input.data_ptr(), mask_args(grad_output, input, output, weight, bias, mean, invstd, relu),
       vector(sum_g, channels, "sum_g"), vector(sum_g_xhat, channels, "sum_g_xhat"), count, written(grad_input)});
  return grad_input;
}

// (grad_input, sum g xhat, sum g, g); the first and the last only where they are needed.
std::tuple<OptionalTensor, Tensor, Tensor, OptionalTensor> bn_backward(Tensor grad_output, Tensor input,
                                                                       OptionalTensor output, OptionalTensor weight,
                                                                       OptionalTensor bias, Tensor mean, Tensor invstd,
                                                                       bool relu, bool training, bool needs_input_grad,
                                                                       bool needs_masked) {
  const Activation shape = activation(input, "input");
  const Tensor sum_g = empty_vector(shape.channels), sum_g_xhat = empty_vector(shape.channels);
  OptionalTensor grad_input, masked;
  if (needs_masked) masked = empty_as(input, Memory::pool);
  resfuse::cpu::bn_backward_reduce({shape, input.data_ptr(),
                                    mask_args(grad_output, input, output, weight, bias, mean, invstd, relu),
                                    floats(sum_g), floats(sum_g_xhat), needs_masked ? written(*masked) : nullptr});
  const double count = training ? static_cast<double>(shape.batch * shape.pixels) : 0;
  if (needs_input_grad && needs_masked)
    grad_input = bn_backward_apply(*masked, input, {}, weight, {}, mean, invstd, false, sum_g, sum_g_xhat, count);
  else if (needs_input_grad)
    grad_input =
        bn_backward_apply(grad_output, input, output, weight, bias, mean, invstd, relu, sum_g, sum_g_xhat, count);
  return {grad_input, sum_g_xhat, sum_g, masked};
}

// Height and width of input and output come from the tensors, the rest from `settings`: kernel, stride, padding,
// dilation (vertical, horizontal).
resfuse::Pooling pool_args(const Tensor& input, const Tensor& output, const Tensor& positions,
                           const std::vector<int64_t>& settings) {
  STD_TORCH_CHECK(settings.size() == 8, "settings: expected 8 numbers, got ", settings.size());
  STD_TORCH_CHECK(settings[0] * settings[1] <= 256, "settings: expected at most 256 elements in a window");
  for (const Tensor* tensor : {&input, &output, &positions})
    STD_TORCH_CHECK(tensor->dim() == 4 && is_dense_nhwc(*tensor), "expected dense NHWC tensors");
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Byte, "positions: expected uint8");
  STD_TORCH_CHECK(input.scalar_type() == output.scalar_type(), "output: its dtype is not that of the input");
  const auto in = input.sizes(), out = output.sizes(), of = positions.sizes();
  STD_TORCH_CHECK(in[0] == out[0] && in[1] == out[1], "output: its shape does not fit the input");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(out[i] == of[i], "positions: not the shape of the output");
  const auto axis = [&](int64_t i) {
    return resfuse::PoolAxis{in[2 + i], out[2 + i], settings[i], settings[2 + i], settings[4 + i], settings[6 + i]};
  };
  return {in[0], in[1], axis(0), axis(1), dtype_of(input, "input")};
}

void max_pool_forward(Tensor input, std::vector<int64_t> settings, Tensor output, Tensor positions) {
  resfuse::cpu::max_pool_forward({pool_args(input, output, positions, settings), input.data_ptr(), written(output),
                                  static_cast<uint8_t*>(written(positions))});
}

void max_pool_backward(Tensor grad_output, Tensor positions, std::vector<int64_t> settings, Tensor grad_input) {
  resfuse::cpu::max_pool_backward({pool_args(grad_input, grad_output, positions, settings), grad_output.data_ptr(),
                                   static_cast<const uint8_t*>(positions.data_ptr()), written(grad_input)});
}

std::string bfloat16_products() {
  return resfuse::cpu::bfloat16_products() == resfuse::BFloat16Products::pairs ? "pairs" : "widened";
}

std::string instruction_set() { return resfuse::cpu::instruction_set(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resfuse_cpu, CPU, m) {
  m.impl("add_relu_forward", TORCH_BOX(&add_relu_forward));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
  m.impl("bn_statistics", TORCH_BOX(&bn_statistics));
  m.impl("bn_apply", TORCH_BOX(&bn_apply));
  m.impl("bn_eval_forward", TORCH_BOX(&bn_eval_forward));
  m.impl("bn_train_forward", TORCH_BOX(&bn_train_forward));
  m.impl("bn_backward", TORCH_BOX(&bn_backward));
  m.impl("bn_backward_apply", TORCH_BOX(&bn_backward_apply));
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
}

STABLE_TORCH_LIBRARY_IMPL(resfuse_cpu, CompositeExplicitAutograd, m) {
  m.impl("bfloat16_products", TORCH_BOX(&bfloat16_products));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
