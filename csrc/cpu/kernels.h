// The table of CPU kernels, one per instruction set; dispatch.cpp picks one when first called.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../resfuse.h"
#include "memory.h"
#include "parallel.h"

namespace resfuse::cpu {

struct Kernels {
  void (*add_relu_forward)(const AddReluForward&);
  void (*add_relu_backward)(const AddReluBackward&);
  void (*bn_statistics)(const BnStatistics&);
  void (*bn_apply)(const BnApply&);
  void (*bn_eval_forward)(const BnEvalForward&);
  void (*bn_train_forward)(const BnTrainForward&);
  void (*bn_backward_reduce)(const BnBackwardReduce&);
  void (*bn_backward_apply)(const BnBackwardApply&);
  void (*max_pool_forward)(const MaxPoolForward&);
  void (*max_pool_backward)(const MaxPoolBackward&);
  void (*conv_forward)(const ConvForward&);
  bool (*conv_pool_forward)(const ConvForward&, const Pooling&);
  bool (*conv_weight_grad)(const ConvWeightGrad&);
  double (*multiply_seconds)(BFloat16Products);
};

}  // namespace resfuse::cpu
