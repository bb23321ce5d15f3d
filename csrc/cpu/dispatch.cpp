// Chooses the instruction set once: the widest that the processor has, or a narrower one that RESFUSE_CPU_ISA names (so
// that one machine can test all of them).
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace resfuse::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

Choice choose() {
  const Choice choices[] = {
#if defined(__x86_64__)
      {"avx512", &avx512::kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq")},
      {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", &baseline::kernels, true},
  };
  const char* asked = std::getenv("RESFUSE_CPU_ISA");
  for (const Choice& choice : choices)
    if (choice.supported && (asked == nullptr || std::strcmp(asked, choice.name) == 0)) return choice;
  return {"baseline", &baseline::kernels, true};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

BFloat16Products bfloat16_products() {
  static const BFloat16Products products = [] {
#if defined(__x86_64__)
    if (chosen().kernels != &avx512::kernels || !__builtin_cpu_supports("avx512bf16")) return BFloat16Products::widened;
    const char* asked = std::getenv("RESFUSE_CPU_BF16");
    if (asked != nullptr && std::strcmp(asked, "widened") == 0) return BFloat16Products::widened;
    if (asked != nullptr && std::strcmp(asked, "pairs") == 0) return BFloat16Products::pairs;
    // Some processors have the instruction for the sake of the smaller tensors alone: it is slower than float32's.
    const auto seconds = chosen().kernels->multiply_seconds;
    if (seconds(BFloat16Products::pairs) < seconds(BFloat16Products::widened)) return BFloat16Products::pairs;
#endif
    return BFloat16Products::widened;
  }();
  return products;
}

const char* instruction_set() { return chosen().name; }
void add_relu_forward(const AddReluForward& args) { chosen().kernels->add_relu_forward(args); }
void add_relu_backward(const AddReluBackward& args) { chosen().kernels->add_relu_backward(args); }
void bn_statistics(const BnStatistics& args) { chosen().kernels->bn_statistics(args); }
void bn_apply(const BnApply& args) { chosen().kernels->bn_apply(args); }
void bn_eval_forward(const BnEvalForward& args) { chosen().kernels->bn_eval_forward(args); }
void bn_train_forward(const BnTrainForward& args) { chosen().kernels->bn_train_forward(args); }
void bn_backward_reduce(const BnBackwardReduce& args) { chosen().kernels->bn_backward_reduce(args); }
void bn_backward_apply(const BnBackwardApply& args) { chosen().kernels->bn_backward_apply(args); }
void max_pool_forward(const MaxPoolForward& args) { chosen().kernels->max_pool_forward(args); }
void max_pool_backward(const MaxPoolBackward& args) { chosen().kernels->max_pool_backward(args); }
void conv_forward(const ConvForward& args) { chosen().kernels->conv_forward(args); }
bool conv_pool_forward(const ConvForward& args, const Pooling& pool) {
  return chosen().kernels->conv_pool_forward(args, pool);
}
bool takes_weight_grad(const Convolution& conv) {
  // The transformations round by more than a short sum does.
  const int64_t tiles = conv.batch * ceil_div(conv.out_height, 2) * ceil_div(conv.out_width, 2);
  return tiles >= 64 && conv.kernel_h == 3 && conv.kernel_w == 3 && conv.stride_h == 1 && conv.stride_w == 1 &&
         conv.dilation_h == 1 && conv.dilation_w == 1 && conv.groups == 1 && conv.channels % 16 == 0 &&
         conv.filters % 16 == 0;  // whole vectors of every instruction set
}
bool conv_weight_grad(const ConvWeightGrad& args) { return chosen().kernels->conv_weight_grad(args); }

}  // namespace resfuse::cpu
