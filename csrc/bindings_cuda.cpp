// torch <-> resfuse.h for CUDA tensors, on torch's stable ABI: no Python.h, no ATen, one binary for many torch
// versions. Schemas are defined in resfuse/backends/cuda.py; here are only the implementations.
#include "bindings_cuda.h"

namespace resfuse {
namespace {

void add_relu_forward(const Tensor& input, const Tensor& residual, Tensor output) {
  check_device(input, "input");
  check_like(residual, "residual", input, "input");
  check_like(output, "output", input, "input");
  const Place place(input);
  cuda::add_relu_forward(
      {input.data_ptr(), residual.data_ptr(), output.data_ptr(), input.numel(), dtype_of(input, "input")},
      place.stream);
}

void add_relu_backward(const Tensor& grad_output, const Tensor& output, Tensor grad_input) {
  check_device(output, "output");
  check_like(grad_output, "grad_output", output, "output");
  check_like(grad_input, "grad_input", output, "output");
  const Place place(output);
  cuda::add_relu_backward(
      {grad_output.data_ptr(), output.data_ptr(), grad_input.data_ptr(), output.numel(), dtype_of(output, "output")},
      place.stream);
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_cuda, RESFUSE_DISPATCH_KEY, m) {
  m.impl("add_relu_forward", TORCH_BOX(&resfuse::add_relu_forward));
  m.impl("add_relu_backward", TORCH_BOX(&resfuse::add_relu_backward));
}
