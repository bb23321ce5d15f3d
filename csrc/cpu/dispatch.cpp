// Chooses the instruction set once, by what the processor says of itself.
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
};

Choice choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return {"AVX-512", &avx512::kernels};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", &avx2::kernels};
#endif
  return {"baseline", &baseline::kernels};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const char* instruction_set() { return chosen().name; }
void add_relu_forward(const AddReluForward& args) { chosen().kernels->add_relu_forward(args); }
void add_relu_backward(const AddReluBackward& args) { chosen().kernels->add_relu_backward(args); }
void bn_statistics(const BnStatistics& args) { chosen().kernels->bn_statistics(args); }
void bn_apply(const BnApply& args) { chosen().kernels->bn_apply(args); }
void bn_eval_forward(const BnEvalForward& args) { chosen().kernels->bn_eval_forward(args); }
void bn_train_forward(const BnTrainForward& args) { chosen().kernels->bn_train_forward(args); }
void bn_backward_reduce(const BnBackwardReduce& args) { chosen().kernels->bn_backward_reduce(args); }
void bn_backward_apply(const BnBackwardApply& args) { chosen().kernels->bn_backward_apply(args); }
bool rows_live(const RowsLive& args) { return chosen().kernels->rows_live(args); }
bool copy_finite(const CopyFinite& args) { return chosen().kernels->copy_finite(args); }

}  // namespace resfuse::cpu
