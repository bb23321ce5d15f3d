// A convolution as CUTLASS's collectives for sm_90 and sm_100 take it.
#pragma once
#include <cutlass/conv/convnd_problem_shape.hpp>

#include "../../resfuse.h"

namespace resfuse::sm90 {

using Problem = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;

inline Problem problem(const Convolution& c) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const int padding[] = {narrow(c.padding_h), narrow(c.padding_w)};
  return {cutlass::conv::Mode::kCrossCorrelation,
          {narrow(c.batch), narrow(c.height), narrow(c.width), narrow(c.channels)},
          {narrow(c.filters), narrow(c.kernel_h), narrow(c.kernel_w), narrow(c.channels)},
          {padding[0], padding[1]},
          {padding[0], padding[1]},
          {narrow(c.stride_h), narrow(c.stride_w)},
          {narrow(c.dilation_h), narrow(c.dilation_w)},
          1};
}

}  // namespace resfuse::sm90
