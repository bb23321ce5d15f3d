#include "conv_launch.cuh"

namespace resfuse::sm90 {

template void conv<float>(const ConvForward& args, void* stream);

}  // namespace resfuse::sm90
