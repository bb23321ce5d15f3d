// torch <-> plain structs for the CPU kernels, on the stable ABI.  Schemas are in resfuse/backends/cpu.py, which also
// allocates every tensor that is written here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "resfuse.h"

namespace {

using resfuse::Activation;
using resfuse::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  ": expected float32 or bfloat16 on the CPU");
  return type == ScalarType::Float ? DType::float32 : DType::bfloat16;
}

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

void* data(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor) return nullptr;
  check_like(*tensor, like, name);
  return tensor->data_ptr();
}

void add_relu_forward(Tensor input, Tensor residual, Tensor output) {
  check_like(residual, input, "residual");
  check_like(output, input, "output");
  resfuse::cpu::add_relu_forward(
      {input.data_ptr(), residual.data_ptr(), output.data_ptr(), input.numel(), dtype_of(input, "input")});
}

void add_relu_backward(Tensor grad_output, Tensor output, Tensor grad_input) {
  check_like(grad_output, output, "grad_output");
  check_like(grad_input, output, "grad_input");
  resfuse::cpu::add_relu_backward(
      {grad_output.data_ptr(), output.data_ptr(), grad_input.data_ptr(), output.numel(), dtype_of(output, "output")});
}

void bn_statistics(Tensor input, Tensor mean, Tensor m2) {
  const Activation shape = activation(input, "input");
  resfuse::cpu::bn_statistics(
      {shape, input.data_ptr(), vector(mean, shape.channels, "mean"), vector(m2, shape.channels, "m2")});
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
          nullptr,
          relu,
          data(output, input, "output")};
}

void bn_apply(Tensor input, OptionalTensor residual, Tensor mean, Tensor invstd, OptionalTensor weight,
              OptionalTensor bias, bool relu, Tensor output) {
  resfuse::cpu::bn_apply(apply_args(input, residual, mean, invstd, weight, bias, relu, output));
}

void bn_eval_forward(Tensor input, OptionalTensor residual, Tensor running_mean, Tensor running_var,
                     OptionalTensor weight, OptionalTensor bias, double eps, bool relu, Tensor output) {
  const auto apply = apply_args(input, residual, running_mean, running_var, weight, bias, relu, output);
  resfuse::cpu::bn_eval_forward({apply, apply.invstd, eps});
}

void bn_train_forward(Tensor input, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                      OptionalTensor running_mean, OptionalTensor running_var, double momentum, double eps, bool relu,
                      Tensor output, Tensor mean, Tensor invstd) {
  const resfuse::BnApply apply = apply_args(input, residual, mean, invstd, weight, bias, relu, output);
  const int64_t channels = apply.shape.channels;
  resfuse::cpu::bn_train_forward({apply, vector(mean, channels, "mean"), vector(invstd, channels, "invstd"),
                                  vector(running_mean, channels, "running_mean"),
                                  vector(running_var, channels, "running_var"), momentum, eps});
}

void bn_backward_reduce(Tensor grad_output, Tensor input, OptionalTensor output, Tensor mean, Tensor invstd,
                        Tensor sum_g, Tensor sum_g_xhat, OptionalTensor masked) {
  const Activation shape = activation(input, "input");
  const int64_t channels = shape.channels;
  resfuse::cpu::bn_backward_reduce({shape, data(grad_output, input, "grad_output"), input.data_ptr(),
                                    data(output, input, "output"), vector(mean, channels, "mean"),
                                    vector(invstd, channels, "invstd"), vector(sum_g, channels, "sum_g"),
                                    vector(sum_g_xhat, channels, "sum_g_xhat"), data(masked, input, "masked")});
}

void bn_backward_apply(Tensor grad_output, Tensor input, OptionalTensor output, OptionalTensor weight, Tensor mean,
                       Tensor invstd, Tensor sum_g, Tensor sum_g_xhat, double count, Tensor grad_input) {
  const Activation shape = activation(input, "input");
  const int64_t channels = shape.channels;
  resfuse::cpu::bn_backward_apply({shape, data(grad_output, input, "grad_output"), input.data_ptr(),
                                   data(output, input, "output"), vector(mean, channels, "mean"),
                                   vector(invstd, channels, "invstd"), vector(weight, channels, "weight"),
                                   vector(sum_g, channels, "sum_g"), vector(sum_g_xhat, channels, "sum_g_xhat"), count,
                                   data(grad_input, input, "grad_input")});
}

bool rows_live(Tensor values) {
  const Activation shape = activation(values, "values");
  STD_TORCH_CHECK(shape.channels_last, "values: expected channels_last");
  return resfuse::cpu::rows_live({values.data_ptr(), shape.batch * shape.pixels, shape.channels, shape.dtype});
}

bool copy_finite(Tensor input, OptionalTensor output) {
  return resfuse::cpu::copy_finite(
      {input.data_ptr(), data(output, input, "output"), input.numel(), dtype_of(input, "input")});
}

// Whether the elements fill one block of the processor's memory that starts at data_ptr.
bool fills_a_block(const Tensor& tensor) {
  if (!tensor.is_cpu() || tensor.layout() != torch::headeronly::Layout::Strided) return false;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return tensor.numel() > 0 && last + 1 == tensor.numel();
}

resfuse::SnapshotSource snapshot_source(const Tensor& conv_weight, const Tensor& running_mean,
                                        const Tensor& running_var, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& conv_bias) {
  resfuse::SnapshotSource source{};
  auto add = [&, i = 0](const Tensor* tensor) mutable {
    if (tensor != nullptr) {
      const int64_t size = tensor->element_size();
      source.shapes[i] = tensor->numel() << 16 | tensor->dim() << 8 | size;
      source.vectors[i] = {tensor->data_ptr(), tensor->numel() * size};
    }
    ++i;
  };
  add(&running_mean);
  add(&running_var);
  for (const auto* tensor : {&weight, &bias, &conv_bias}) add(*tensor ? &**tensor : nullptr);
  source.element_size = conv_weight.element_size();
  source.weight = {conv_weight.data_ptr(), conv_weight.numel() * source.element_size};
  return source;
}

bool fill_blocks(const Tensor& conv_weight, const Tensor& running_mean, const Tensor& running_var,
                 const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& conv_bias) {
  for (const auto* tensor : {&conv_weight, &running_mean, &running_var})
    if (!fills_a_block(*tensor)) return false;
  for (const auto* tensor : {&weight, &bias, &conv_bias})
    if (*tensor && !fills_a_block(**tensor)) return false;
  return true;
}

bool snapshot(Tensor conv_weight, Tensor running_mean, Tensor running_var, OptionalTensor weight, OptionalTensor bias,
              OptionalTensor conv_bias, Tensor into) {
  if (!fill_blocks(conv_weight, running_mean, running_var, weight, bias, conv_bias)) return false;
  const auto source = snapshot_source(conv_weight, running_mean, running_var, weight, bias, conv_bias);
  STD_TORCH_CHECK(into.numel() == resfuse::cpu::snapshot_size(source), "into: expected ",
                  resfuse::cpu::snapshot_size(source), " bytes, got ", into.numel());
  resfuse::cpu::snapshot(source, static_cast<uint8_t*>(into.data_ptr()));
  return true;
}

bool snapshot_matches(Tensor conv_weight, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                      OptionalTensor bias, OptionalTensor conv_bias, Tensor taken) {
  return fill_blocks(conv_weight, running_mean, running_var, weight, bias, conv_bias) &&
         resfuse::cpu::snapshot_matches(
             snapshot_source(conv_weight, running_mean, running_var, weight, bias, conv_bias),
             static_cast<const uint8_t*>(taken.data_ptr()), taken.numel());
}

int64_t snapshot_size(Tensor conv_weight, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                      OptionalTensor bias, OptionalTensor conv_bias) {
  return resfuse::cpu::snapshot_size(snapshot_source(conv_weight, running_mean, running_var, weight, bias, conv_bias));
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
  m.impl("bn_backward_reduce", TORCH_BOX(&bn_backward_reduce));
  m.impl("bn_backward_apply", TORCH_BOX(&bn_backward_apply));
  m.impl("rows_live", TORCH_BOX(&rows_live));
  m.impl("copy_finite", TORCH_BOX(&copy_finite));
  m.impl("snapshot", TORCH_BOX(&snapshot));
  m.impl("snapshot_size", TORCH_BOX(&snapshot_size));
}

STABLE_TORCH_LIBRARY_IMPL(resfuse_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("snapshot_matches", TORCH_BOX(&snapshot_matches));  // false for tensors of another device
}
