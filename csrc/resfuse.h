// The interface between bindings and kernels: plain structs (pointers, sizes, strides) and launcher prototypes.
// Bindings know torch and check arguments; kernels know only this header.
#pragma once
#include <cstdint>

namespace resfuse {

enum class DType : int32_t { float32, bfloat16, float16 };

// output = max(input + residual, 0) over `numel` elements, in the same order in all three tensors.
struct AddReluForward {
  const void* input;
  const void* residual;
  void* output;
  int64_t numel;
  DType dtype;
};

// grad_input = grad_output where output > 0, else 0.  It is the gradient of both summands.
struct AddReluBackward {
  const void* grad_output;
  const void* output;
  void* grad_input;
  int64_t numel;
  DType dtype;
};

// A dense (batch, channels, pixels) tensor in NHWC (channels_last) or NCHW order; pixels = height * width.
struct Activation {
  int64_t batch, channels, pixels;
  bool channels_last;
  DType dtype;
};

// Values per channel, contiguous, in float32 or in the dtype of the activations.
struct ChannelVector {
  void* data;  // or null
  DType dtype;
};

// Per-channel vectors are float32.  Pointers marked `or null` switch a term off.

// mean and m2 = sum (input - mean)^2 per channel.
struct BnStatistics {
  Activation shape;
  const void* input;
  float *mean, *m2;
};

// output = act((input - mean) (invstd weight) + bias + residual), with these roundings and no others than one of a
// fused multiply-add: backward computes it again.
struct BnApply {
  Activation shape;
  const void* input;
  const void* residual;  // or null
  const float *mean, *invstd;
  const float *weight, *bias;  // or null
  bool relu;
  void* output;
};

// Batch norm with running statistics: BnApply with invstd = (running_var + eps)^-1/2; apply.invstd is not read.
struct BnEvalForward {
  BnApply apply;
  const float* running_var;
  double eps;
};

// Batch norm in training: statistics of the batch into mean and invstd, the running ones updated, then BnApply.
struct BnTrainForward {
  BnApply apply;
  const double* statistics;           // mean and M2 of each channel where they are known, or null
  float *mean, *invstd;               // the same memory as apply.mean and apply.invstd
  float *running_mean, *running_var;  // or null
  double momentum, eps;
};

// g = grad_output where the ReLU's output is not <= 0; the output is that of BnApply without a residual where it is
// null.
struct BnMask {
  const void* grad_output;
  const void* output;  // or null
  const float *mean, *invstd;
  const float *weight, *bias;  // or null
  bool relu;                   // false: g = grad_output
};

// sum_g = sum g, sum_g_xhat = sum g (input - mean) invstd.
struct BnBackwardReduce {
  Activation shape;
  const void* input;
  BnMask mask;
  float *sum_g, *sum_g_xhat;
  void* masked;  // receives g, or null
};

// grad_input = weight invstd (g - sum_g / count - xhat sum_g_xhat / count); count 0: = weight invstd g.
struct BnBackwardApply {
  Activation shape;
  const void* input;
  BnMask mask;
  const float *sum_g, *sum_g_xhat;
  double count;
  void* grad_input;
};

// One dimension of the windows of a pooling: window `i` of `out` has the elements i stride - padding + j dilation,
// j < kernel, as far as they exist.
struct PoolAxis {
  int64_t size, out, kernel, stride, padding, dilation;
};

// A pooling on NHWC memory; a window has at most 256 elements.
struct Pooling {
  int64_t batch, channels;
  PoolAxis rows, columns;
  DType dtype;
};

// output = the maximum of each window, positions = which element it is, by rows; the first of several, the last NaN.
struct MaxPoolForward {
  Pooling pool;
  const void* input;
  void* output;
  uint8_t* positions;
};

// grad_input = the sum of the gradients of the windows whose maximum an element is.
struct MaxPoolBackward {
  Pooling pool;
  const void* grad_output;
  const uint8_t* positions;
  void* grad_input;
};

// A convolution on NHWC memory: input (batch, height, width, channels), weight (filters, kernel_h, kernel_w,
// channels / groups), output (batch, out_height, out_width, filters).
struct Convolution {
  int64_t batch, height, width, channels;
  int64_t filters, kernel_h, kernel_w;
  int64_t out_height, out_width;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups;
  DType dtype;
  bool tf32;  // float32 only: products of 11 significant bits, on tensor cores
};

// Values per channel that need not be contiguous.
struct ConvVector {
  const void* data;  // or null
  int64_t stride;
  DType dtype;
};

// Elements from one group, filter of a group, channel of a group, row and column of a weight to the next.
struct WeightStrides {
  int64_t group, filter, channel, row, column;
};

// How bfloat16 is multiplied: widened to float32, or in pairs by vdpbf16ps.
enum class BFloat16Products : int32_t { widened, pairs };

// output = act(BN(conv(input, weight) + conv_bias) + residual) on the CPU, or without BN where running_var is null.
struct ConvForward {
  Convolution conv;
  const void *input, *weight;
  int64_t input_strides[4];  // elements from one image, channel, row and column to the next
  WeightStrides weight_strides;
  DType weight_dtype;
  const void* residual;  // NHWC, or null; may be `output` where it has as many channels
  int64_t residual_channels;
  void* output;  // NHWC
  ConvVector conv_bias, running_mean, running_var, bn_weight, bn_bias;
  double eps;
  bool relu;
  BFloat16Products products;
  double* statistics;  // receives the mean and M2 of each filter of the output: 2 x filters, or null
};

// The gradient of a convolution's weight on the CPU; all tensors have the convolution's dtype.
struct ConvWeightGrad {
  Convolution conv;
  const void *input, *grad_output;  // NHWC
  void* grad_weight;
  WeightStrides strides;  // of grad_weight
};

namespace cpu {
void add_relu_forward(const AddReluForward& args);
void add_relu_backward(const AddReluBackward& args);
void bn_statistics(const BnStatistics& args);
void bn_apply(const BnApply& args);
void bn_eval_forward(const BnEvalForward& args);
void bn_train_forward(const BnTrainForward& args);
void bn_backward_reduce(const BnBackwardReduce& args);
void bn_backward_apply(const BnBackwardApply& args);
void max_pool_forward(const MaxPoolForward& args);
void max_pool_backward(const MaxPoolBackward& args);
void conv_forward(const ConvForward& args);

// Each of the convolutions reads what the one before it writes, and that alone; the first has an input, the last an
// output and may have a residual.  Whole images: where `output` is the first one's input, it has been read.
void conv_chain_forward(const ConvForward* calls, int64_t count);
bool takes_chain(const ConvForward* calls, int64_t count);  // not where one image between them is large

// Max pooling of the convolution's result, which `output` receives in place of it; false where that has to be done one
// after the other, and nothing has happened.
bool conv_pool_forward(const ConvForward& args, const Pooling& pool);
bool takes_weight_grad(const Convolution& conv);  // whether conv_weight_grad can compute it
// False where gradients are not finite: more of them than eager's would be.
bool conv_weight_grad(const ConvWeightGrad& args);
void prefer_huge_pages(void* data, int64_t bytes);  // under a large result
const char* instruction_set();
// The faster of those that the processor has, measured once, or the one that RESFUSE_CPU_BF16 names.
BFloat16Products bfloat16_products();
}  // namespace cpu

// Batch norm on a GPU: per-channel vectors in either dtype, so that no launch converts them.  The workspace has
// `bn_workspace_size` floats; `launches` 1 or 2 is a request by tests, 0 takes one where the grid is resident.
namespace cuda {

// mean and m2 = sum (input - mean)^2 per channel.
struct BnStatistics {
  Activation shape;
  const void* input;
  float *mean, *m2;
  float* workspace;
  int32_t launches;
};

// Batch norm in training: statistics of the batch into mean and invstd, the running ones updated, and
// output = act((input - mean) (invstd weight) + bias + residual), from the mean and invstd that are written.
struct BnTrainForward {
  Activation shape;
  const void* input;
  const void* residual;  // or null
  ChannelVector weight, bias, running_mean, running_var;
  double momentum, eps;
  bool relu;
  void* output;
  float *mean, *invstd;
  float* workspace;
  int32_t launches;
  // The statistics that the workspace has already: of so many parts, or 0, of so many pixels each, in NHWC order.
  int32_t known_parts;
  int64_t known_part;
};

// The same output with given statistics: `spread` is the variance, or invstd.
struct BnApply {
  Activation shape;
  const void* input;
  const void* residual;  // or null
  ChannelVector weight, bias, mean, spread;
  bool spread_is_variance;
  double eps;
  bool relu;
  void* output;
};

// With g = grad_output where the ReLU's output > 0 and xhat = (input - mean) invstd: sum_g = sum g, sum_g_xhat = sum g
// xhat, grad_residual = g, and grad_input = weight invstd (g - sum_g / count - xhat sum_g_xhat / count) with batch
// statistics, weight invstd g with running ones.
struct BnBackward {
  Activation shape;
  const void* grad_output;
  const void* input;
  const void* output;  // the ReLU's output; null: that of BnApply without a residual
  ChannelVector weight, bias, mean, invstd;
  bool relu;  // false: g = grad_output
  bool batch_statistics;
  void* grad_input;     // or null
  void* grad_residual;  // or null
  float *sum_g, *sum_g_xhat;
  float* workspace;
  int32_t launches;
};

// grad_input alone, with given sums over `count` values per channel; count 0: running statistics, the sums are unused.
struct BnBackwardApply {
  Activation shape;
  const void* grad_output;  // masked
  const void* input;
  ChannelVector weight, mean, invstd, sum_g, sum_g_xhat;
  double count;
  void* grad_input;
};

}  // namespace cuda

// Tiling of a convolution: one of the tiles listed in csrc/cuda/conv_launch.cuh; `splits` blocks share the K steps of a
// tile (inference only); `launches` 1 or 2 is a request by tests, 0 takes one where all blocks are resident.
struct ConvConfig {
  int32_t block_m, block_n, splits, launches;
};

// output = act(BN(conv(input, weight) + conv_bias) + residual) with running statistics; BN may be absent.
struct ConvInferenceForward {
  Convolution conv;
  ConvConfig config;
  const void *input, *weight;
  const void* residual;  // or null; may be `output`
  void* output;
  ChannelVector conv_bias, running_mean, running_var, bn_weight, bn_bias;
  double eps;
  bool relu;
  void* workspace;  // float32; or null with one split
  int64_t workspace_size;
};

// The same with batch statistics: z = conv(input, weight) + conv_bias is stored; mean and invstd are float32.
struct ConvTrainForward {
  Convolution conv;
  ConvConfig config;
  const void *input, *weight;
  const void* residual;  // or null
  void *z, *output;
  ChannelVector conv_bias, running_mean, running_var, bn_weight, bn_bias;
  float *mean, *invstd;
  double momentum, eps;
  bool relu;
  void* workspace;  // float32
  int64_t workspace_size;
};

// A copy of a tensor of any strides in NHWC memory, with zeros behind its channels. Where `taps` is not 1, a pixel of
// the output has the channels of all pixels that a filter row reads: column stride - padding + tap dilation.
struct PadChannels {
  int64_t size[4], strides[4];  // of the input: images, channels, rows and columns, and elements from one to the next
  int64_t out_channels, out_width;
  int64_t taps, stride, padding, dilation;
  DType dtype;
  const void* input;
  void* output;
};

// `stream` is a cudaStream_t; this header has no CUDA types.
namespace cuda {
void add_relu_forward(const AddReluForward& args, void* stream);
void add_relu_backward(const AddReluBackward& args, void* stream);
void bn_statistics(const BnStatistics& args, void* stream);
void bn_train_forward(const BnTrainForward& args, void* stream);
void bn_apply(const BnApply& args, void* stream);
void bn_backward(const BnBackward& args, void* stream);
void bn_backward_apply(const BnBackwardApply& args, void* stream);
int64_t bn_workspace_size(int64_t channels);  // floats, on the current device
void conv_inference_forward(const ConvInferenceForward& args, void* stream);
void conv_train_forward(const ConvTrainForward& args, void* stream);
void pad_channels(const PadChannels& args, void* stream);  // rows of input and output fit 31 bits
// Rows of a batch, and values of a row, of input and output, fit 31 bits.
void max_pool_forward(const MaxPoolForward& args, void* stream);
void max_pool_backward(const MaxPoolBackward& args, void* stream);
}  // namespace cuda

// Convolutions on Hopper, in bfloat16 and float16, without groups; channels and filters are multiples of 8 and all
// memory is aligned to 16 bytes.
namespace sm90 {

// output = act(BN(conv(input, weight) + conv_bias) + residual) with running statistics; BN may be absent. In training
// without BN, residual and ReLU: the statistics of neighbouring tiles go to `parts`, and cuda::bn_train_forward goes
// on.
struct ConvForward {
  Convolution conv;
  int32_t tile_n;          // 64, 128 or 256 output channels by 128 pixels
  int32_t blocks;          // at most, in inference
  int32_t tiles_per_part;  // of 128 pixels each; 0 in inference
  const void *input, *weight;
  const void* residual;  // or null; may be `output`
  void* output;
  ChannelVector conv_bias, running_mean, running_var, bn_weight, bn_bias;
  double eps;
  bool relu;
  float* parts;  // in training [parts][mean, M2][filters], else null
};

void conv_forward(const ConvForward& args, void* stream);
}  // namespace sm90

// The same on Blackwell, in inference alone: tile_n is 64 or 128, and the hardware chooses how many blocks run.
namespace sm100 {
using sm90::ConvForward;
void conv_forward(const ConvForward& args, void* stream);
}  // namespace sm100

}  // namespace resfuse
