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

// output = act(weight (input - mean) invstd + bias + residual).
struct BnApply {
  Activation shape;
  const void* input;
  const void* residual;  // or null
  const float *mean, *invstd;
  const float *weight, *bias;  // or null
  const float* mean_low;       // what rounding to float32 took from the mean, or null
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
  float *mean, *invstd;               // the same memory as apply.mean and apply.invstd
  float *running_mean, *running_var;  // or null
  double momentum, eps;
};

// With g = grad_output where output > 0: sum_g = sum g, sum_g_xhat = sum g (input - mean) invstd.
struct BnBackwardReduce {
  Activation shape;
  const void* grad_output;
  const void* input;
  const void* output;  // the ReLU's output, or null
  const float *mean, *invstd;
  float *sum_g, *sum_g_xhat;
  void* masked;  // receives g, or null
};

// grad_input = weight invstd (g - sum_g / count - xhat sum_g_xhat / count); count 0: = weight invstd g.
struct BnBackwardApply {
  Activation shape;
  const void* grad_output;
  const void* input;
  const void* output;  // the ReLU's output, or null where grad_output is masked already
  const float *mean, *invstd;
  const float* weight;  // or null
  const float *sum_g, *sum_g_xhat;
  double count;
  void* grad_input;
};

// Of `rows` pixels with `channels` values each: does every one have a value that is positive and finite?
struct RowsLive {
  const void* values;
  int64_t rows, channels;
  DType dtype;
};

// output = input, and whether all of it is finite.
struct CopyFinite {
  const void* input;
  void* output;  // or null: look only
  int64_t numel;
  DType dtype;
};

// A piece of memory.
struct Bytes {
  const void* data;  // or null
  int64_t size;
};

// The tensors that a folded, packed convolution weight was made from.  A snapshot holds the shapes (as one number each)
// and all bytes of the per-channel vectors, and kSnapshotSamples elements of the weight, evenly spaced.
struct SnapshotSource {
  int64_t shapes[5];
  Bytes vectors[5];
  Bytes weight;
  int64_t element_size;
};
constexpr int64_t kSnapshotSamples = 32;

namespace cpu {
void add_relu_forward(const AddReluForward& args);
void add_relu_backward(const AddReluBackward& args);
void bn_statistics(const BnStatistics& args);
void bn_apply(const BnApply& args);
void bn_eval_forward(const BnEvalForward& args);
void bn_train_forward(const BnTrainForward& args);
void bn_backward_reduce(const BnBackwardReduce& args);
void bn_backward_apply(const BnBackwardApply& args);
bool rows_live(const RowsLive& args);
bool copy_finite(const CopyFinite& args);
int64_t snapshot_size(const SnapshotSource& source);
void snapshot(const SnapshotSource& source, uint8_t* into);
bool snapshot_matches(const SnapshotSource& source, const uint8_t* taken, int64_t size);
const char* instruction_set();
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
// output = act(weight (input - mean) invstd + bias + residual).
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

// With g = grad_output where output > 0 and xhat = (input - mean) invstd: sum_g = sum g, sum_g_xhat = sum g xhat,
// grad_residual = g, and grad_input = weight invstd (g - sum_g / count - xhat sum_g_xhat / count) with batch
// statistics, weight invstd g with running ones.
struct BnBackward {
  Activation shape;
  const void* grad_output;
  const void* input;
  const void* output;  // the ReLU's output, or null without a ReLU
  ChannelVector weight, mean, invstd;
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
  const void* grad_output;
  const void* input;
  const void* output;  // the ReLU's output, or null where grad_output is masked already
  ChannelVector weight, mean, invstd, sum_g, sum_g_xhat;
  double count;
  void* grad_input;
};

}  // namespace cuda

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
}  // namespace cuda

}  // namespace resfuse
