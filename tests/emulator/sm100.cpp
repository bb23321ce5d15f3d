// In place of csrc/cuda/sm100, whose tcgen05 nothing here emulates: the kernel for sm_90, so that its callers run.
#include "resfuse.h"

namespace resfuse::sm100 {

void conv_forward(const ConvForward& args, void* stream) {
  ConvForward same = args;
  same.blocks = 2;
  sm90::conv_forward(same, stream);
}

}  // namespace resfuse::sm100
