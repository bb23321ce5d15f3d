#include "conv_launch.cuh"

namespace resfuse::cuda {

template void conv_inference<Fp16>(const ConvInferenceForward& args, void* stream);
template void conv_train<Fp16>(const ConvTrainForward& args, void* stream);

}  // namespace resfuse::cuda
