#include "conv_launch.cuh"

namespace resfuse::sm90 {

template void conv<cutlass::bfloat16_t>(const ConvForward& args, void* stream);

}  // namespace resfuse::sm90
