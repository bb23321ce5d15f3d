// torch <-> resfuse.h for CUDA tensors, on torch's stable ABI: no Python.h, no ATen, one binary for many torch
// versions. Schemas are defined in resfuse/backends/cuda.py; here are only the implementations.
#include "bindings_cuda.h"

#include "resfuse.h"

namespace resfuse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// The kernels walk all tensors with one flat index, so sizes and strides must agree. A stride along a dimension of one
// element addresses nothing and may differ.
void check_same_layout(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check_device(tensor, name);
  STD_TORCH_CHECK(tensor.get_device_index() == other.get_device_index(), name, " must be on the device of ",
                  other_name);
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name);
  STD_TORCH_CHECK(tensor.dim() == other.dim(), name, " must have the shape of ", other_name);
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == other.size(d), name, " must have the shape of ", other_name);
    STD_TORCH_CHECK(tensor.size(d) <= 1 || tensor.stride(d) == other.stride(d), name, " must have the strides of ",
                    other_name);
  }
}

void add_relu_forward(const Tensor& input, const Tensor& residual, Tensor output) {
  check_device(input, "input");
  check_same_layout(residual, "residual", input, "input");
  check_same_layout(output, "output", input, "input");
  const DeviceGuard guard(input.get_device_index());
  cuda::add_relu_forward(
      {input.data_ptr(), residual.data_ptr(), output.data_ptr(), input.numel(), dtype_of(input, "input")},
      current_stream(input.get_device_index()));
}

void add_relu_backward(const Tensor& grad_output, const Tensor& output, Tensor grad_input) {
  check_device(output, "output");
  check_same_layout(grad_output, "grad_output", output, "output");
  check_same_layout(grad_input, "grad_input", output, "output");
  const DeviceGuard guard(output.get_device_index());
  cuda::add_relu_backward(
      {grad_output.data_ptr(), output.data_ptr(), grad_input.data_ptr(), output.numel(), dtype_of(output, "output")},
      current_stream(output.get_device_index()));
}

}  // namespace
}  // namespace resfuse

STABLE_TORCH_LIBRARY_IMPL(resfuse_cuda, RESFUSE_DISPATCH_KEY, m) {
  m.impl("add_relu_forward", TORCH_BOX(&resfuse::add_relu_forward));
  m.impl("add_relu_backward", TORCH_BOX(&resfuse::add_relu_backward));
}
