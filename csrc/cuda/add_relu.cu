// output = relu(input + residual)                        reads 2, writes 1 element per element
// grad_input = output <= 0 ? 0 : grad_output              reads 2, writes 1
//
// Both are bound by memory, so the one thing that matters is wide accesses: 16 bytes per thread and step, neighbouring
// threads beside each other. The arithmetic is fp32; the sum is rounded to the tensor's type once, as in eager PyTorch.
//
//   |<- head ->|<------------- vectors of 16 bytes ------------->|<- tail ->|
//   scalar, up to the first 16-byte boundary                      scalar
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../resfuse.h"
#include "launch.cuh"

namespace resfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Comparisons, not fmaxf: fmaxf(NaN, 0) is 0, whereas torch.relu and its backward let a NaN through.
struct AddRelu {
  template <class T>
  __device__ T operator()(T input, T residual) const {
    const float sum = to_float(input) + to_float(residual);
    return from_float<T>(sum <= 0.f ? 0.f : sum);
  }
};

struct MaskByOutput {
  template <class T>
  __device__ T operator()(T grad_output, T output) const {
    return to_float(output) <= 0.f ? from_float<T>(0.f) : grad_output;
  }
};

template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T values[kSize];
};

template <class Op, class T>
__global__ void binary_kernel(const T* a, const T* b, T* out, int64_t head, int64_t vectors, int64_t numel) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const Op op{};

  const auto* va = reinterpret_cast<const Vector<T>*>(a + head);
  const auto* vb = reinterpret_cast<const Vector<T>*>(b + head);
  auto* vout = reinterpret_cast<Vector<T>*>(out + head);
  for (int64_t i = first; i < vectors; i += step) {
    const Vector<T> x = va[i], y = vb[i];
    Vector<T> z;
#pragma unroll
    for (int k = 0; k < Vector<T>::kSize; ++k) z.values[k] = op(x.values[k], y.values[k]);
    vout[i] = z;
  }

  // Head and tail as one range of scalars, so that a grid of any size covers them.
  const int64_t tail = head + vectors * Vector<T>::kSize;
  for (int64_t i = first; i < numel - (tail - head); i += step) {
    const int64_t j = i < head ? i : i - head + tail;
    out[j] = op(a[j], b[j]);
  }
}

// Elements before the first 16-byte boundary that all three share; `numel`, so no vectors at all, where none is shared.
template <class T>
int64_t scalar_head(const T* a, const T* b, const T* out, int64_t numel) {
  const auto offset = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes; };
  if (offset(a) != offset(b) || offset(a) != offset(out)) return numel;
  const auto head = static_cast<int64_t>((kVectorBytes - offset(a)) % kVectorBytes / sizeof(T));
  return std::min(head, numel);
}

template <class Op, class T>
void run(const void* a_ptr, const void* b_ptr, void* out_ptr, int64_t numel, void* stream) {
  const auto* a = static_cast<const T*>(a_ptr);
  const auto* b = static_cast<const T*>(b_ptr);
  auto* out = static_cast<T*>(out_ptr);
  const int64_t head = scalar_head(a, b, out, numel);
  const int64_t vectors = (numel - head) / Vector<T>::kSize;
  const int64_t scalars = numel - vectors * Vector<T>::kSize;
  auto* kernel = binary_kernel<Op, T>;
  const unsigned grid = grid_for(kernel, std::max(vectors, scalars), kThreads);
  launch(kernel, dim3(grid), dim3(kThreads), 0, stream, false, a, b, out, head, vectors, numel);
}

template <class Op>
void run(DType dtype, const void* a, const void* b, void* out, int64_t numel, void* stream) {
  if (numel == 0) return;  // a grid of zero blocks is an error
  switch (dtype) {
    case DType::float32:
      return run<Op, float>(a, b, out, numel, stream);
    case DType::bfloat16:
      return run<Op, __nv_bfloat16>(a, b, out, numel, stream);
    case DType::float16:
      return run<Op, __half>(a, b, out, numel, stream);
  }
  throw std::runtime_error("add_relu: unknown dtype");
}

}  // namespace

void add_relu_forward(const AddReluForward& args, void* stream) {
  run<AddRelu>(args.dtype, args.input, args.residual, args.output, args.numel, stream);
}

void add_relu_backward(const AddReluBackward& args, void* stream) {
  run<MaskByOutput>(args.dtype, args.grad_output, args.output, args.grad_input, args.numel, stream);
}

}  // namespace resfuse::cuda
