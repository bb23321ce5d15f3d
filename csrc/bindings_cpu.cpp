// torch <-> plain structs for the CPU kernels, on the stable ABI.  Schemas are in resfuse/backends/cpu_kernels.py.
// Results are allocated here, but for those of max pooling, whose size the caller knows.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "resfuse.h"

namespace {

using resfuse::Activation;
using resfuse::DType;
using torch::headeronly::MemoryFormat;
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

const void* data(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor) return nullptr;
  check_like(*tensor, like, name);
  return tensor->data_ptr();
}

// The memory of a result, fresh from the allocator.
void* written(const Tensor& tensor) {
  resfuse::cpu::prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  return tensor.data_ptr();
}

Tensor empty(int64_t rank, const int64_t* size, const int64_t* stride, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, size, stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int32_t number_of(DType dtype) {
  return dtype == DType::float32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
}

// A result in the shape and order of a tensor without gaps.
Tensor empty_as(const Tensor& tensor) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  return empty(tensor.dim(), size.data(), stride.data(), number_of(dtype_of(tensor, "input")));
}

Tensor empty_vector(int64_t size) {
  const int64_t stride = 1;
  return empty(1, &size, &stride, aoti_torch_dtype_float32());
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

Tensor add_relu_forward(Tensor input, Tensor residual) {
  check_like(residual, input, "residual");
  const Tensor output = empty_as(input);
  resfuse::cpu::add_relu_forward(
      {input.data_ptr(), residual.data_ptr(), written(output), input.numel(), dtype_of(input, "input")});
  return output;
}

Tensor add_relu_backward(Tensor grad_output, Tensor output) {
  check_like(grad_output, output, "grad_output");
  const Tensor grad_input = empty_as(output);
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
                OptionalTensor bias, bool relu) {
  const Tensor output = empty_as(input);
  resfuse::cpu::bn_apply(apply_args(input, residual, mean, invstd, weight, bias, relu, output));
  return output;
}

Tensor bn_eval_forward(Tensor input, OptionalTensor residual, Tensor running_mean, Tensor running_var,
                       OptionalTensor weight, OptionalTensor bias, double eps, bool relu) {
  const Tensor output = empty_as(input);
  const auto apply = apply_args(input, residual, running_mean, running_var, weight, bias, relu, output);
  resfuse::cpu::bn_eval_forward({apply, apply.invstd, eps});
  return output;
}

std::tuple<Tensor, Tensor, Tensor> bn_train_forward(Tensor input, OptionalTensor residual, OptionalTensor weight,
                                                    OptionalTensor bias, OptionalTensor running_mean,
                                                    OptionalTensor running_var, OptionalTensor statistics,
                                                    double momentum, double eps, bool relu) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected 4 dimensions, got ", input.dim());
  const int64_t channels = input.size(1);
  const Tensor output = empty_as(input), mean = empty_vector(channels), invstd = empty_vector(channels);
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
  const Tensor grad_input = empty_as(input);
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
  if (needs_masked) masked = empty_as(input);
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

bool is_dense_nhwc(const Tensor& tensor) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  return (size[3] == 1 || stride[3] == size[1]) && (size[2] == 1 || stride[2] == size[3] * size[1]) &&
         (size[1] == 1 || stride[1] == 1) && (size[0] == 1 || stride[0] == size[2] * size[3] * size[1]);
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

resfuse::ConvVector conv_vector(const OptionalTensor& tensor, int64_t filters, const char* name) {
  if (!tensor) return {nullptr, 0, DType::float32};
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == filters, name, ": expected a vector of ", filters,
                  " elements");
  return {tensor->data_ptr(), tensor->stride(0), dtype_of(*tensor, name)};
}

// As resfuse.layout.is_channels_last: strides decide, where both orders are the same memory.
bool is_channels_last(const Tensor& tensor) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  return stride[1] == 1 && stride[3] >= size[1] && (stride[3] > 1 || stride[2] > 1);
}

Tensor empty_nhwc(const resfuse::Convolution& conv) {
  const int64_t channels = conv.filters, height = conv.out_height, width = conv.out_width;
  const int64_t size[] = {conv.batch, channels, height, width};
  const int64_t stride[] = {channels * height * width, 1, width * channels, channels};
  const Tensor tensor = empty(4, size, stride, number_of(conv.dtype));
  written(tensor);
  return tensor;
}

// The convolution's result is channels_last if its input or weight is: PyTorch's own rule.
Tensor in_result_format(const Tensor& output, const Tensor& input, const Tensor& weight) {
  return is_channels_last(input) || is_channels_last(weight) ? output : torch::stable::contiguous(output);
}

Tensor to_nhwc(const Tensor& tensor) {
  return is_dense_nhwc(tensor) ? tensor : torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// The input as kernels read it.  They convert NCHW while they pack it, which for a 1x1 kernel costs more than a copy.
Tensor readable(const Tensor& input, const Tensor& weight) {
  return input.size(1) > 4 && input.stride(1) != 1 && weight.size(2) == 1 && weight.size(3) == 1 ? to_nhwc(input)
                                                                                                 : input;
}

// The numbers of a convolution, in one tensor of float64: PyTorch takes half a microsecond for each of an operator's.
struct Settings {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
  double eps;
  bool relu, overwrite_residual, pad_residual;

  explicit Settings(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.numel() == 11 && tensor.is_contiguous(),
                    "settings: expected 11 numbers in float64");
    const double* at = static_cast<const double*>(tensor.data_ptr());
    for (int64_t* to : {&stride_h, &stride_w, &padding_h, &padding_w, &dilation_h, &dilation_w, &groups})
      *to = static_cast<int64_t>(*at++);
    eps = *at++;
    for (bool* to : {&relu, &overwrite_residual, &pad_residual}) *to = *at++ != 0;
  }
};

// Shapes and strides of a convolution of an input with so many filters of `group_channels` channels each.
resfuse::ConvForward conv_args(const Tensor& input, const Tensor& weight, const OptionalTensor& conv_bias,
                               int64_t filters, int64_t group_channels, const Settings& settings) {
  const auto size = input.sizes(), kernel = weight.sizes(), in = input.strides(), of = weight.strides();
  STD_TORCH_CHECK(settings.groups > 0 && filters % settings.groups == 0 && size[1] == group_channels * settings.groups,
                  "conv_weight: its channels and groups do not fit the input");
  resfuse::ConvForward args{};
  resfuse::Convolution& conv = args.conv;
  conv.batch = size[0], conv.channels = size[1], conv.height = size[2], conv.width = size[3];
  conv.filters = filters, conv.kernel_h = kernel[2], conv.kernel_w = kernel[3];
  conv.stride_h = settings.stride_h, conv.stride_w = settings.stride_w;
  conv.padding_h = settings.padding_h, conv.padding_w = settings.padding_w;
  conv.dilation_h = settings.dilation_h, conv.dilation_w = settings.dilation_w;
  conv.groups = settings.groups;
  conv.dtype = dtype_of(input, "input");
  conv.out_height = (size[2] + 2 * conv.padding_h - conv.dilation_h * (kernel[2] - 1) - 1) / conv.stride_h + 1;
  conv.out_width = (size[3] + 2 * conv.padding_w - conv.dilation_w * (kernel[3] - 1) - 1) / conv.stride_w + 1;
  STD_TORCH_CHECK(conv.out_height > 0 && conv.out_width > 0, "input: smaller than the kernel");
  args.input = input.data_ptr();
  args.weight = weight.data_ptr();
  args.weight_dtype = dtype_of(weight, "conv_weight");
  STD_TORCH_CHECK(args.weight_dtype == DType::float32 || conv.dtype == DType::bfloat16,
                  "conv_weight: bfloat16, but the input is float32");
  // Strides of dimensions of one element have no meaning: those of dense memory let the kernels see that it is dense.
  args.input_strides[1] = size[1] == 1 ? 1 : in[1];
  args.input_strides[3] = size[3] == 1 ? size[1] * args.input_strides[1] : in[3];
  args.input_strides[2] = size[2] == 1 ? size[3] * args.input_strides[3] : in[2];
  args.input_strides[0] = size[0] == 1 ? size[2] * args.input_strides[2] : in[0];
  args.weight_strides = {filters / conv.groups * of[0], of[0], of[1], of[2], of[3]};
  args.conv_bias = conv_vector(conv_bias, filters, "conv_bias");
  if (conv.dtype == DType::bfloat16) args.products = resfuse::cpu::bfloat16_products();
  return args;
}

// Whether a tensor lies in strided CPU memory, as all arguments of an operator that checks them itself must.
bool is_readable(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.layout() == torch::headeronly::Layout::Strided && tensor.data_ptr() != nullptr;
}

bool is_vector(const OptionalTensor& tensor, int64_t filters, ScalarType narrow, ScalarType wide) {
  if (!tensor) return true;
  const ScalarType type = tensor->scalar_type();
  return is_readable(*tensor) && tensor->dim() == 1 && tensor->size(0) == filters && (type == narrow || type == wide);
}

// Whether the memory from the first to the last element of one tensor meets that of another.
bool may_overlap(const Tensor& one, const Tensor& other) {
  const auto extent = [](const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    const char* first = static_cast<const char*>(tensor.data_ptr());
    return std::pair(first, first + (last + 1) * static_cast<int64_t>(tensor.element_size()));
  };
  const auto [a, a_end] = extent(one);
  const auto [b, b_end] = extent(other);
  return a < b_end && b < a_end;
}

// What F.conv2d and F.batch_norm accept on the CPU in the kernels' dtypes, with a weight that may be wider than the
// input.  Everything else is left to the caller, who finds the words for an error.
bool fits(const Tensor& input, const Tensor& weight, const OptionalTensor& conv_bias, const OptionalTensor (&bn)[4],
          const OptionalTensor& residual, const Settings& settings) {
  if (!is_readable(input) || !is_readable(weight) || input.dim() != 4 || weight.dim() != 4) return false;
  const ScalarType type = input.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16) return false;
  if (weight.scalar_type() != type && weight.scalar_type() != ScalarType::Float) return false;
  const auto size = input.sizes(), kernel = weight.sizes();
  const int64_t filters = kernel[0];
  if (input.numel() == 0 || weight.numel() == 0 || filters % settings.groups != 0 ||
      size[1] != kernel[1] * settings.groups)
    return false;
  if (!is_vector(conv_bias, filters, type, weight.scalar_type())) return false;
  for (const OptionalTensor& vector : bn)
    if (!is_vector(vector, filters, type, ScalarType::Float)) return false;
  if (bn[0].has_value() != bn[1].has_value()) return false;
  const int64_t height = size[2] + 2 * settings.padding_h - settings.dilation_h * (kernel[2] - 1) - 1;
  const int64_t width = size[3] + 2 * settings.padding_w - settings.dilation_w * (kernel[3] - 1) - 1;
  if (height < 0 || width < 0) return false;
  if (!residual) return true;
  if (!is_readable(*residual) || residual->dim() != 4 || residual->scalar_type() != type) return false;
  const auto of = residual->sizes();
  return of[0] == size[0] && of[2] == height / settings.stride_h + 1 && of[3] == width / settings.stride_w + 1 &&
         (of[1] == filters || (settings.pad_residual && of[1] < filters));
}

// A convolution in inference: its tensors in the order of the operators' schemas.
struct Inference {
  Tensor input, weight;
  OptionalTensor conv_bias, bn[4], residual;
  Settings settings;
  Tensor read = input;  // the input as kernels read it
  resfuse::ConvForward args{};
  bool in_place = false;  // the output is the residual

  // False where the tensors do not fit each other, or the kernels.
  bool prepare() {
    if (!fits(input, weight, conv_bias, bn, residual, settings)) return false;
    read = readable(input, weight);
    args = conv_args(read, weight, conv_bias, weight.size(0), weight.size(1), settings);
    const int64_t filters = args.conv.filters;
    args.running_mean = conv_vector(bn[0], filters, "running_mean");
    args.running_var = conv_vector(bn[1], filters, "running_var");
    args.bn_weight = conv_vector(bn[2], filters, "weight");
    args.bn_bias = conv_vector(bn[3], filters, "bias");
    args.eps = settings.eps;
    args.relu = settings.relu;
    if (!residual) return true;
    args.residual_channels = residual->size(1);
    in_place = settings.overwrite_residual && args.residual_channels == filters && is_dense_nhwc(*residual) &&
               !may_overlap(*residual, input);
    residual = to_nhwc(*residual);
    args.residual = residual->data_ptr();
    return true;
  }
};

OptionalTensor conv_inference_forward(Tensor input, Tensor weight, OptionalTensor conv_bias, OptionalTensor mean,
                                      OptionalTensor var, OptionalTensor bn_weight, OptionalTensor bn_bias,
                                      OptionalTensor residual, Tensor settings) {
  Inference call{input, weight, conv_bias, {mean, var, bn_weight, bn_bias}, residual, Settings(settings)};
  if (!call.prepare()) return std::nullopt;
  const Tensor output = call.in_place ? *call.residual : empty_nhwc(call.args.conv);
  call.args.output = output.data_ptr();
  resfuse::cpu::conv_forward(call.args);
  return in_result_format(output, input, weight);
}

OptionalTensor conv_pool_forward(Tensor input, Tensor weight, OptionalTensor conv_bias, OptionalTensor mean,
                                 OptionalTensor var, OptionalTensor bn_weight, OptionalTensor bn_bias, Tensor settings,
                                 std::vector<int64_t> pooling) {
  STD_TORCH_CHECK(pooling.size() == 8, "pooling: expected kernel size, stride, padding and dilation");
  Inference call{input, weight, conv_bias, {mean, var, bn_weight, bn_bias}, {}, Settings(settings)};
  if (!call.prepare()) return std::nullopt;
  const resfuse::Convolution& conv = call.args.conv;
  const auto axis = [&](int64_t size, int64_t i) {
    const int64_t beyond = size + 2 * pooling[4 + i] - pooling[6 + i] * (pooling[i] - 1) - 1;
    const int64_t out = beyond < 0 ? 0 : beyond / pooling[2 + i] + 1;
    return resfuse::PoolAxis{size, out, pooling[i], pooling[2 + i], pooling[4 + i], pooling[6 + i]};
  };
  const resfuse::Pooling pool{conv.batch, conv.filters, axis(conv.out_height, 0), axis(conv.out_width, 1), conv.dtype};
  if (pool.rows.out == 0 || pool.columns.out == 0) return std::nullopt;
  resfuse::Convolution pooled = conv;
  pooled.out_height = pool.rows.out, pooled.out_width = pool.columns.out;
  const Tensor output = empty_nhwc(pooled);
  call.args.output = output.data_ptr();
  if (!resfuse::cpu::conv_pool_forward(call.args, pool)) return std::nullopt;
  return in_result_format(output, input, weight);
}

// z = conv(input) + conv_bias, and its mean and M2 per channel, in float64.
std::tuple<Tensor, Tensor> conv_statistics_forward(Tensor input, Tensor weight, OptionalTensor conv_bias,
                                                   Tensor settings) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, "input, conv_weight: expected 4 dimensions");
  const Tensor read = readable(input, weight);
  resfuse::ConvForward args = conv_args(read, weight, conv_bias, weight.size(0), weight.size(1), Settings(settings));
  const Tensor output = empty_nhwc(args.conv);
  const int64_t size[] = {2, args.conv.filters}, stride[] = {args.conv.filters, 1};
  const Tensor statistics = empty(2, size, stride, aoti_torch_dtype_float64());
  args.output = output.data_ptr();
  args.statistics = static_cast<double*>(statistics.data_ptr());
  resfuse::cpu::conv_forward(args);
  return {in_result_format(output, input, weight), statistics};
}

// The gradient of the input of a convolution of stride 1: the convolution of grad_output with the turned weight.
Tensor conv_input_grad(Tensor grad_output, Tensor weight, Tensor settings) {
  Settings turned(settings);
  STD_TORCH_CHECK(grad_output.dim() == 4 && weight.dim() == 4 && grad_output.size(1) == weight.size(0),
                  "grad_output, conv_weight: shapes do not fit each other");
  const auto size = weight.sizes(), stride = weight.strides();
  const int64_t filters = size[0] / turned.groups;
  turned.padding_h = turned.dilation_h * (size[2] - 1) - turned.padding_h;
  turned.padding_w = turned.dilation_w * (size[3] - 1) - turned.padding_w;
  STD_TORCH_CHECK(turned.stride_h == 1 && turned.stride_w == 1, "stride: expected 1");
  STD_TORCH_CHECK(turned.padding_h >= 0 && turned.padding_w >= 0, "padding: wider than the kernel");
  const Tensor read = readable(grad_output, weight);
  resfuse::ConvForward args = conv_args(read, weight, {}, size[1] * turned.groups, filters, turned);
  const int64_t element = args.weight_dtype == DType::float32 ? 4 : 2;
  args.weight =
      static_cast<const char*>(weight.data_ptr()) + ((size[2] - 1) * stride[2] + (size[3] - 1) * stride[3]) * element;
  args.weight_strides = {filters * stride[0], stride[1], stride[0], -stride[2], -stride[3]};
  const Tensor output = empty_nhwc(args.conv);
  args.output = output.data_ptr();
  resfuse::cpu::conv_forward(args);
  return output;
}

// The gradient of the weight of a convolution, or none where PyTorch has to compute it.
OptionalTensor conv_weight_grad(Tensor grad_output, Tensor input, Tensor weight, Tensor settings) {
  const auto size = weight.sizes();
  const resfuse::Convolution conv = conv_args(input, weight, {}, size[0], size[1], Settings(settings)).conv;
  const int64_t expected[] = {conv.batch, conv.filters, conv.out_height, conv.out_width};
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(grad_output.size(i) == expected[i], "grad_output: its shape is not that of the output");
  for (const Tensor* tensor : {&grad_output, &weight})
    if (tensor->scalar_type() != input.scalar_type()) return {};
  if (!resfuse::cpu::takes_weight_grad(conv) || !is_dense_nhwc(input)) return {};
  grad_output = to_nhwc(grad_output);
  const Tensor grad_weight = torch::stable::empty_like(weight);  // whatever its strides
  const auto stride = grad_weight.strides();
  const resfuse::ConvWeightGrad args{conv,
                                     input.data_ptr(),
                                     grad_output.data_ptr(),
                                     grad_weight.data_ptr(),
                                     {0, stride[0], stride[1], stride[2], stride[3]}};
  if (!resfuse::cpu::conv_weight_grad(args)) return {};
  return grad_weight;
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
  m.impl("conv_input_grad", TORCH_BOX(&conv_input_grad));
  m.impl("conv_statistics_forward", TORCH_BOX(&conv_statistics_forward));
  m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad));
}

STABLE_TORCH_LIBRARY_IMPL(resfuse_cpu, CompositeExplicitAutograd, m) {
  m.impl("bfloat16_products", TORCH_BOX(&bfloat16_products));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

// Called without a gradient, and for tensors that may lie anywhere: it looks for itself.
STABLE_TORCH_LIBRARY_IMPL(resfuse_cpu, CompositeImplicitAutograd, m) {
  m.impl("conv_inference_forward", TORCH_BOX(&conv_inference_forward));
  m.impl("conv_pool_forward", TORCH_BOX(&conv_pool_forward));
}
