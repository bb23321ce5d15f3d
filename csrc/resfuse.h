// What crosses the border between bindings and kernels: plain structs (pointers, sizes, strides) and launcher
// prototypes. Bindings know torch and check arguments; kernels know only what stands here.
#pragma once
#include <cstdint>

namespace resfuse {

enum class DType : int32_t { float32, bfloat16, float16 };

// output = max(input + residual, 0) over `numel` elements that lie in the same order in all three tensors.
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

// `stream` is a cudaStream_t; the CUDA types stay out of this header.
namespace cuda {
void add_relu_forward(const AddReluForward& args, void* stream);
void add_relu_backward(const AddReluBackward& args, void* stream);
}  // namespace cuda

}  // namespace resfuse
