// torch <-> plain structs for the CPU's convolutions, on the stable ABI.  Schemas are in
// resfuse/backends/cpu_kernels.py.
#include <algorithm>
#include <utility>

#include "bindings_cpu.h"

namespace {

using namespace resfuse::cpu::bindings;
using resfuse::DType;

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

Tensor empty_nhwc(const resfuse::Convolution& conv, Memory memory) {
  const int64_t channels = conv.filters, height = conv.out_height, width = conv.out_width;
  const int64_t size[] = {conv.batch, channels, height, width};
  const int64_t stride[] = {channels * height * width, 1, width * channels, channels};
  const Tensor tensor = empty(4, size, stride, conv.dtype, memory);
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

// What a convolution reads: a tensor, or the output of another one.
struct Source {
  const void* data = nullptr;  // none yet, of an output
  DType dtype;
  int64_t size[4], stride[4];

  explicit Source(const Tensor& tensor) : data(tensor.data_ptr()), dtype(dtype_of(tensor, "input")) {
    std::copy_n(tensor.sizes().begin(), 4, size);
    std::copy_n(tensor.strides().begin(), 4, stride);
  }
  explicit Source(const resfuse::Convolution& conv)
      : dtype(conv.dtype),
        size{conv.batch, conv.filters, conv.out_height, conv.out_width},
        stride{conv.out_height * conv.out_width * conv.filters, 1, conv.out_width * conv.filters, conv.filters} {}
};

// Shapes and strides of a convolution with so many filters of `group_channels` channels each.
resfuse::ConvForward conv_args(const Source& input, const Tensor& weight, const OptionalTensor& conv_bias,
                               int64_t filters, int64_t group_channels, const Settings& settings) {
  const auto size = input.size, in = input.stride;
  const auto kernel = weight.sizes(), of = weight.strides();
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
  conv.dtype = input.dtype;
  conv.out_height = (size[2] + 2 * conv.padding_h - conv.dilation_h * (kernel[2] - 1) - 1) / conv.stride_h + 1;
  conv.out_width = (size[3] + 2 * conv.padding_w - conv.dilation_w * (kernel[3] - 1) - 1) / conv.stride_w + 1;
  STD_TORCH_CHECK(conv.out_height > 0 && conv.out_width > 0, "input: smaller than the kernel");
  args.input = input.data;
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
bool fits(const Source& input, const OptionalTensor* tensors, const OptionalTensor* residual,
          const Settings& settings) {
  const OptionalTensor& weight = tensors[0];
  if (!weight || !is_readable(*weight) || weight->dim() != 4 || weight->numel() == 0) return false;
  const ScalarType type = input.dtype == DType::float32 ? ScalarType::Float : ScalarType::BFloat16;
  if (weight->scalar_type() != type && weight->scalar_type() != ScalarType::Float) return false;
  const auto kernel = weight->sizes();
  const int64_t filters = kernel[0];
  if (settings.groups < 1 || filters % settings.groups != 0 || input.size[1] != kernel[1] * settings.groups)
    return false;
  if (!is_vector(tensors[1], filters, type, weight->scalar_type())) return false;
  for (const OptionalTensor* vector = tensors + 2; vector < tensors + 6; ++vector)
    if (!is_vector(*vector, filters, type, ScalarType::Float)) return false;
  if (tensors[2].has_value() != tensors[3].has_value()) return false;
  const int64_t height = input.size[2] + 2 * settings.padding_h - settings.dilation_h * (kernel[2] - 1) - 1;
  const int64_t width = input.size[3] + 2 * settings.padding_w - settings.dilation_w * (kernel[3] - 1) - 1;
  if (height < 0 || width < 0) return false;
  if (residual == nullptr || !*residual) return true;
  const Tensor& added = **residual;
  if (!is_readable(added) || added.dim() != 4 || added.scalar_type() != type) return false;
  const auto of = added.sizes();
  return of[0] == input.size[0] && of[2] == height / settings.stride_h + 1 && of[3] == width / settings.stride_w + 1 &&
         (of[1] == filters || (settings.pad_residual && of[1] < filters));
}

// Whether kernels can read this input.
bool is_input(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return is_readable(tensor) && tensor.dim() == 4 && tensor.numel() > 0 &&
         (type == ScalarType::Float || type == ScalarType::BFloat16);
}

// Convolutions in inference, each of which reads the output of the one before it.
struct Inference {
  Tensor input;
  OptionalTensor residual;  // of the last
  std::vector<resfuse::ConvForward> calls;
  bool channels_last = false;  // the output, by PyTorch's rule: it is where an input or weight is
  bool in_place = false;       // the output is the residual
  Tensor given = input;        // before it was made readable

  // One more convolution: its weight, bias, and batch norm's mean, variance, weight and bias.  False, and it is not
  // taken, where the tensors do not fit each other, or the kernels.
  bool take(const OptionalTensor* tensors, const Settings& settings, bool last) {
    if (calls.empty() && !is_input(input)) return false;
    const Source read = calls.empty() ? Source(input) : Source(calls.back().conv);
    if (!fits(read, tensors, last ? &residual : nullptr, settings)) return false;
    const Tensor& weight = *tensors[0];
    if (calls.empty()) {
      channels_last = is_channels_last(input);
      given = input;
      input = readable(input, weight);
    }
    channels_last |= is_channels_last(weight);
    const int64_t filters = weight.size(0);
    resfuse::ConvForward args =
        conv_args(calls.empty() ? Source(input) : read, weight, tensors[1], filters, weight.size(1), settings);
    args.running_mean = conv_vector(tensors[2], filters, "running_mean");
    args.running_var = conv_vector(tensors[3], filters, "running_var");
    args.bn_weight = conv_vector(tensors[4], filters, "weight");
    args.bn_bias = conv_vector(tensors[5], filters, "bias");
    args.eps = settings.eps;
    args.relu = settings.relu;
    if (last && residual) {
      args.residual_channels = residual->size(1);
      in_place = settings.overwrite_residual && args.residual_channels == filters && is_dense_nhwc(*residual) &&
                 (is_read_before(args.conv) || !may_overlap(*residual, given));
      residual = to_nhwc(*residual);
      args.residual = residual->data_ptr();
    }
    calls.push_back(args);
    return true;
  }

  Tensor output() {
    const Tensor output = in_place ? *residual : empty_nhwc(calls.back().conv, Memory::pytorch);
    calls.back().output = output.data_ptr();
    return output;
  }

  Tensor result(const Tensor& output) const { return channels_last ? output : torch::stable::contiguous(output); }

  // Of several convolutions, the first has read an image before the last writes to it, where that is the same memory.
  bool is_read_before(const resfuse::Convolution& last) const {
    return !calls.empty() && residual->data_ptr() == given.data_ptr() && is_dense_nhwc(given) &&
           given.size(1) * given.size(2) * given.size(3) == last.filters * last.out_height * last.out_width;
  }
};

// `tensors` are seven for each convolution: its weight, bias, batch norm's four, and its settings.
OptionalTensor conv_inference_forward(Tensor input, std::vector<OptionalTensor> tensors, OptionalTensor residual) {
  STD_TORCH_CHECK(!tensors.empty() && tensors.size() % 7 == 0, "tensors: expected 7 for each convolution, got ",
                  tensors.size());
  Inference inference{input, residual};
  for (auto at = tensors.begin(); at != tensors.end(); at += 7) {
    STD_TORCH_CHECK(at[6].has_value(), "settings: expected a tensor, got none");
    if (!inference.take(&*at, Settings(*at[6]), tensors.end() - at == 7)) return std::nullopt;
  }
  if (!resfuse::cpu::takes_chain(inference.calls.data(), inference.calls.size())) return std::nullopt;
  const Tensor output = inference.output();
  resfuse::cpu::conv_chain_forward(inference.calls.data(), inference.calls.size());
  return inference.result(output);
}

OptionalTensor conv_pool_forward(Tensor input, Tensor weight, OptionalTensor conv_bias, OptionalTensor mean,
                                 OptionalTensor var, OptionalTensor bn_weight, OptionalTensor bn_bias, Tensor settings,
                                 std::vector<int64_t> pooling) {
  STD_TORCH_CHECK(pooling.size() == 8, "pooling: expected kernel size, stride, padding and dilation");
  Inference inference{input};
  const OptionalTensor tensors[] = {weight, conv_bias, mean, var, bn_weight, bn_bias};
  if (!inference.take(tensors, Settings(settings), true)) return std::nullopt;
  resfuse::ConvForward& args = inference.calls.back();
  const resfuse::Convolution& conv = args.conv;
  const auto axis = [&](int64_t size, int64_t i) {
    const int64_t beyond = size + 2 * pooling[4 + i] - pooling[6 + i] * (pooling[i] - 1) - 1;
    const int64_t out = beyond < 0 ? 0 : beyond / pooling[2 + i] + 1;
    return resfuse::PoolAxis{size, out, pooling[i], pooling[2 + i], pooling[4 + i], pooling[6 + i]};
  };
  const resfuse::Pooling pool{conv.batch, conv.filters, axis(conv.out_height, 0), axis(conv.out_width, 1), conv.dtype};
  if (pool.rows.out == 0 || pool.columns.out == 0) return std::nullopt;
  resfuse::Convolution pooled = conv;
  pooled.out_height = pool.rows.out, pooled.out_width = pool.columns.out;
  const Tensor output = empty_nhwc(pooled, Memory::pytorch);
  args.output = output.data_ptr();
  if (!resfuse::cpu::conv_pool_forward(args, pool)) return std::nullopt;
  return inference.result(output);
}

// z = conv(input) + conv_bias, and its mean and M2 per channel, in float64.
std::tuple<Tensor, Tensor> conv_statistics_forward(Tensor input, Tensor weight, OptionalTensor conv_bias,
                                                   Tensor settings) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, "input, conv_weight: expected 4 dimensions");
  const Tensor read = readable(input, weight);
  resfuse::ConvForward args =
      conv_args(Source(read), weight, conv_bias, weight.size(0), weight.size(1), Settings(settings));
  const Tensor output = empty_nhwc(args.conv, Memory::pool);
  const int64_t size[] = {2, args.conv.filters}, stride[] = {args.conv.filters, 1};
  const Tensor statistics = empty(2, size, stride, aoti_torch_dtype_float64());
  args.output = output.data_ptr();
  args.statistics = static_cast<double*>(statistics.data_ptr());
  resfuse::cpu::conv_forward(args);
  return {in_result_format(output, input, weight), statistics};
}

// The gradient of the input of a convolution of stride 1: the convolution of grad_output with the turned weight.  It is
// added to `carried`, in its memory where that is dense.
Tensor conv_input_grad(Tensor grad_output, Tensor weight, Tensor settings, OptionalTensor carried) {
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
  resfuse::ConvForward args = conv_args(Source(read), weight, {}, size[1] * turned.groups, filters, turned);
  const int64_t element = args.weight_dtype == DType::float32 ? 4 : 2;
  args.weight =
      static_cast<const char*>(weight.data_ptr()) + ((size[2] - 1) * stride[2] + (size[3] - 1) * stride[3]) * element;
  args.weight_strides = {filters * stride[0], stride[1], stride[0], -stride[2], -stride[3]};
  if (carried) {
    const resfuse::Convolution& conv = args.conv;
    const int64_t expected[] = {conv.batch, conv.filters, conv.out_height, conv.out_width};
    STD_TORCH_CHECK(carried->dim() == 4 && std::equal(expected, expected + 4, carried->sizes().begin()) &&
                        dtype_of(*carried, "carried") == conv.dtype,
                    "carried: expected the shape of the input, and the dtype of grad_output");
    carried = to_nhwc(*carried);
    args.residual = carried->data_ptr();
    args.residual_channels = conv.filters;
  }
  const Tensor output = carried ? *carried : empty_nhwc(args.conv, Memory::pool);
  args.output = output.data_ptr();
  resfuse::cpu::conv_forward(args);
  return output;
}

// The gradient of the weight of a convolution, or none where PyTorch has to compute it.
OptionalTensor conv_weight_grad(Tensor grad_output, Tensor input, Tensor weight, Tensor settings) {
  const auto size = weight.sizes();
  const resfuse::Convolution conv = conv_args(Source(input), weight, {}, size[0], size[1], Settings(settings)).conv;
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resfuse_cpu, CPU, m) {
  m.impl("conv_input_grad", TORCH_BOX(&conv_input_grad));
  m.impl("conv_statistics_forward", TORCH_BOX(&conv_statistics_forward));
  m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad));
}

// Called without a gradient, and for tensors that may lie anywhere: it looks for itself.
STABLE_TORCH_LIBRARY_IMPL(resfuse_cpu, CompositeImplicitAutograd, m) {
  m.impl("conv_inference_forward", TORCH_BOX(&conv_inference_forward));
  m.impl("conv_pool_forward", TORCH_BOX(&conv_pool_forward));
}
