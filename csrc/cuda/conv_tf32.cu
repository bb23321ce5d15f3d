#include "conv_launch.cuh"

namespace resfuse::cuda {

template void conv_inference<Tf32>(const ConvInferenceForward& args, void* stream);
template void conv_train<Tf32>(const ConvTrainForward& args, void* stream);

}  // namespace resfuse::cuda
