// output = relu(input + residual)                        reads 2, writes 1 element per element
// grad_input = output <= 0 ? 0 : grad_output              reads 2, writes 1
//
// Both are memory-bound, so all that matters is wide accesses, and enough of them in flight: 16 bytes per thread and
// step, coalesced, kUnroll steps ahead. The arithmetic is fp32; the sum is rounded to the tensor's type once, as in
// eager PyTorch.
//
//   |<- head ->|<------------- vectors of 16 bytes ------------->|<- tail ->|
//   scalar, up to the first 16-byte boundary                      scalar
#include "launch.cuh"
#include "vector.cuh"

namespace resfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

struct AddRelu {
  static __device__ float apply(float input, float residual) { return relu(input + residual); }
};

struct MaskByOutput {
  static __device__ float apply(float grad_output, float output) { return masked(grad_output, output); }
};

template <class Op, class T, int N>
__device__ __forceinline__ typename Elements<T, N>::Word apply(typename Elements<T, N>::Word a,
                                                               typename Elements<T, N>::Word b) {
  float x[N], y[N];
  Elements<T, N>::unpack(a, x);
  Elements<T, N>::unpack(b, y);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = Op::apply(x[k], y[k]);
  return Elements<T, N>::pack(x);
}

template <class Op, class T>
__global__ void __launch_bounds__(kThreads)
    add_relu_kernel(const T* a, const T* b, T* out, int64_t head, int64_t vectors, int64_t numel) {
  constexpr int N = kVectorSize<T>;
  using E = Elements<T, N>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;

  for (int64_t i = first; i < vectors; i += kUnroll * step) {
    typename E::Word x[kUnroll], y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = i + u * step;
      if (j < vectors) {
        x[u] = E::load(a + head + j * N);
        y[u] = E::load(b + head + j * N);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = i + u * step;
      if (j < vectors) E::store(out + head + j * N, apply<Op, T, N>(x[u], y[u]));
    }
  }

  // Head and tail form one range of scalars, which a grid of any size covers.
  const int64_t tail = head + vectors * N;
  for (int64_t i = first; i < numel - (tail - head); i += step) {
    const int64_t j = i < head ? i : i - head + tail;
    out[j] = apply<Op, T, 1>(a[j], b[j]);
  }
}

// Elements before the first 16-byte boundary common to all three; `numel`, so no vectors at all, if there is none.
template <class T>
int64_t scalar_head(const T* a, const T* b, const T* out, int64_t numel) {
  const auto offset = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes; };
  if (offset(a) != offset(b) || offset(a) != offset(out)) return numel;
  const auto head = static_cast<int64_t>((kVectorBytes - offset(a)) % kVectorBytes / sizeof(T));
  return std::min(head, numel);
}

template <class Op>
void run(DType dtype, const void* a_ptr, const void* b_ptr, void* out_ptr, int64_t numel, void* stream) {
  if (numel == 0) return;  // a grid of zero blocks is an error
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto* a = static_cast<const T*>(a_ptr);
    const auto* b = static_cast<const T*>(b_ptr);
    auto* out = static_cast<T*>(out_ptr);
    const int64_t head = scalar_head(a, b, out, numel);
    const int64_t vectors = (numel - head) / kVectorSize<T>;
    const int64_t scalars = numel - vectors * kVectorSize<T>;
    auto* kernel = add_relu_kernel<Op, T>;
    const unsigned grid = grid_for(kernel, std::max(vectors, scalars), kThreads);
    launch(kernel, dim3(grid), dim3(kThreads), 0, stream, false, a, b, out, head, vectors, numel);
  });
}

}  // namespace

void add_relu_forward(const AddReluForward& args, void* stream) {
  run<AddRelu>(args.dtype, args.input, args.residual, args.output, args.numel, stream);
}

void add_relu_backward(const AddReluBackward& args, void* stream) {
  run<MaskByOutput>(args.dtype, args.grad_output, args.output, args.grad_input, args.numel, stream);
}

}  // namespace resfuse::cuda
