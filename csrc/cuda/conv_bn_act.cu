// conv_bn_act by element type; the kernels are in conv_kernels.cuh, the main loop in conv_tile.cuh.
#include <stdexcept>

#include "../resfuse.h"
#include "mma.cuh"

namespace resfuse::cuda {

template <class Math>
void conv_inference(const ConvInferenceForward& args, void* stream);
template <class Math>
void conv_train(const ConvTrainForward& args, void* stream);

void conv_inference_forward(const ConvInferenceForward& args, void* stream) {
  switch (args.conv.dtype) {
    case DType::bfloat16:
      return conv_inference<Bf16>(args, stream);
    case DType::float16:
      return conv_inference<Fp16>(args, stream);
    case DType::float32:
      return args.conv.tf32 ? conv_inference<Tf32>(args, stream) : conv_inference<Fp32>(args, stream);
  }
  throw std::runtime_error("convolution: unknown dtype");
}

void conv_train_forward(const ConvTrainForward& args, void* stream) {
  switch (args.conv.dtype) {
    case DType::bfloat16:
      return conv_train<Bf16>(args, stream);
    case DType::float16:
      return conv_train<Fp16>(args, stream);
    case DType::float32:
      return args.conv.tf32 ? conv_train<Tf32>(args, stream) : conv_train<Fp32>(args, stream);
  }
  throw std::runtime_error("convolution: unknown dtype");
}

}  // namespace resfuse::cuda
