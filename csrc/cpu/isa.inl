// Everything that is compiled once per instruction set.  The including file has set RESFUSE_ISA, the width of a vector
// in floats (RESFUSE_ISA_LANES), how many of them a panel of filters has (RESFUSE_ISA_PANEL), and the target.
// All names live in the namespace of the instruction set: the linker must not merge code of two of them.
namespace resfuse::cpu::RESFUSE_ISA {
namespace {
#include "vec.inl"

#include "add_relu.inl"
#include "bn_act.inl"

#include "conv_vec.inl"

#include "max_pool.inl"

#include "conv_plan.inl"

#include "conv_pack.inl"
#include "conv_tile.inl"

#include "conv_gemm.inl"
#if RESFUSE_ISA_LANES == 16
#include "conv_few.inl"
#endif
#include "conv_lanes.inl"
#include "conv_winograd.inl"

#include "conv_weight_grad.inl"

#include "conv_pool.inl"

#include "conv.inl"
}  // namespace

extern const Kernels kernels;
const Kernels kernels = {add_relu_forward, add_relu_backward,  bn_statistics,     bn_apply,         bn_eval_forward,
                         bn_train_forward, bn_backward_reduce, bn_backward_apply, max_pool_forward, max_pool_backward,
                         conv_forward,     conv_pool_forward,  conv_weight_grad,  multiply_seconds};
}  // namespace resfuse::cpu::RESFUSE_ISA
