// The convolution for sm_100a is CUTLASS's own: its persistent kernel (tiles handed out by the hardware, TMA im2col,
// tcgen05, accumulators of two tiles in tensor memory) with the epilogue of csrc/cuda/sm90. Nothing here emulates
// tcgen05, and no GPU has run it yet.
#include <cutlass/kernel_hardware_info.hpp>  // which the collectives use without including it

#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>

#include "../launch.cuh"
#include "../sm90/bn_act_epilogue.cuh"
#include "../sm90/conv_problem.cuh"

namespace resfuse::sm100 {
namespace {

template <class Element, int kTileN>
struct Conv {
  using Tile = cute::Shape<cute::_128, cute::Int<kTileN>, cute::Shape<cute::_64>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, cutlass::layout::RowMajor, 8, Element,
      cutlass::layout::RowMajor, 8, cutlass::epilogue::TmaWarpSpecialized1Sm,
      sm90::BnActEpilogue<kTileN, Element>>::CollectiveOp;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, Element,
      cutlass::layout::TensorNHWC, 8, Element, cutlass::layout::TensorNHWC, 8, float, Tile, Cluster,
      cutlass::conv::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      cutlass::conv::KernelImplicitTmaWarpSpecialized1SmSm100>::CollectiveOp;
  using Kernel = cutlass::conv::kernel::ConvUniversal<sm90::Problem, Mainloop, Epilogue>;
  static_assert(alignof(typename Epilogue::TensorStorage) == 1024);  // and so the operands, which follow it
  static_assert(Kernel::SharedStorageSize <= 226 * 1024);  // what launch.cuh requests of the 227 KiB of sm_100

  // Encodes the tensor maps. Not `Kernel::to_underlying_arguments`: in its view of the output pixels have three
  // strides, in ours of dense memory one.
  static typename Kernel::Params params(const ConvForward& args) {
    const sm90::Problem p = sm90::problem(args.conv);
    const auto shape = cutlass::conv::detail::get_linearized_problem_shape_MNKL(p);
    const auto* x = static_cast<const Element*>(args.input);
    const auto* w = static_cast<const Element*>(args.weight);
    return {shape,
            Mainloop::to_underlying_arguments(p, {x, w}, nullptr),
            sm90::epilogue_params<Epilogue>(args, cute::get<0>(shape), cute::get<1>(shape)),
            Kernel::TileScheduler::to_underlying_arguments(p, Tile{}, typename Kernel::AtomThrShapeMNK{}, Cluster{}, {},
                                                           {}),
            {}};
  }
};

template <class Conv>
__global__ void __launch_bounds__(Conv::Kernel::MaxThreadsPerBlock, 1)
    sm100_conv_kernel(const __grid_constant__ typename Conv::Kernel::Params params) {
  RESFUSE_DYNAMIC_SHARED(memory);
  typename Conv::Kernel()(params, reinterpret_cast<char*>(memory));
}

template <class Conv>
void launch_conv(const ConvForward& args, void* stream) {
  using Kernel = typename Conv::Kernel;
  if (!Conv::Mainloop::can_implement(sm90::problem(args.conv), {}))
    throw std::runtime_error("convolution: not one for TMA and tcgen05");
  const typename Kernel::Params params = Conv::params(args);
  cuda::launch(sm100_conv_kernel<Conv>, Kernel::get_grid_shape(params), Kernel::get_block_shape(),
               Kernel::SharedStorageSize, stream, false, params);
}

template <class Element>
void conv(const ConvForward& args, void* stream) {
  switch (args.tile_n) {
    case 64:
      return launch_conv<Conv<Element, 64>>(args, stream);
    case 128:
      return launch_conv<Conv<Element, 128>>(args, stream);
  }
  throw std::runtime_error("convolution: unsupported tile 128 x " + std::to_string(args.tile_n));
}

}  // namespace

void conv_forward(const ConvForward& args, void* stream) {
  switch (args.conv.dtype) {
    case DType::bfloat16:
      return conv<cutlass::bfloat16_t>(args, stream);
    case DType::float16:
      return conv<cutlass::half_t>(args, stream);
    case DType::float32:
      break;
  }
  throw std::runtime_error("convolution: neither bfloat16 nor float16");
}

}  // namespace resfuse::sm100
