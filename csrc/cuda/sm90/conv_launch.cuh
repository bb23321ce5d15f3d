// The launcher for one element type; conv_*.cu instantiate it, so that they compile in parallel.
#pragma once
#include "../launch.cuh"
#include "conv_kernel.cuh"

namespace resfuse::sm90 {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    sm90_conv_kernel(const __grid_constant__ typename Kernel::Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  RESFUSE_DYNAMIC_SHARED(memory);
  Kernel::run(params, reinterpret_cast<char*>(memory));
#endif
}

template <class Kernel>
void launch_conv(const ConvForward& args, void* stream) {
  if (!Kernel::can_implement(args.conv)) throw std::runtime_error("convolution: not one for TMA and wgmma");
  const typename Kernel::Params params = Kernel::params(args);
  cuda::launch(sm90_conv_kernel<Kernel>, dim3(params.schedule.blocks(args.blocks)), dim3(Kernel::kThreads),
               sizeof(typename Kernel::SharedStorage), stream, false, params);
}

template <class Element>
void conv(const ConvForward& args, void* stream) {
  switch (args.tile_n) {
    case 64:
      return launch_conv<ConvKernel<Element, 64, 7>>(args, stream);
    case 128:
      return launch_conv<ConvKernel<Element, 128, sizeof(Element) == 4 ? 4 : 5>>(args, stream);
    case 256:
      return launch_conv<ConvKernel<Element, 256, 3>>(args, stream);
  }
  throw std::runtime_error("convolution: unsupported tile 128 x " + std::to_string(args.tile_n));
}

}  // namespace resfuse::sm90
