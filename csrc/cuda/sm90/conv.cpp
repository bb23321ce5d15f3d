// The convolution by element type; the kernel is in conv_kernel.cuh.
#include <stdexcept>

#include "../../resfuse.h"

namespace cutlass {
struct bfloat16_t;
struct half_t;
}  // namespace cutlass

namespace resfuse::sm90 {

template <class Element>
void conv(const ConvForward& args, void* stream);

void conv_forward(const ConvForward& args, void* stream) {
  switch (args.conv.dtype) {
    case DType::bfloat16:
      return conv<cutlass::bfloat16_t>(args, stream);
    case DType::float16:
      return conv<cutlass::half_t>(args, stream);
    case DType::float32:
      return conv<float>(args, stream);
  }
  throw std::runtime_error("convolution: an unknown dtype");
}

}  // namespace resfuse::sm90
