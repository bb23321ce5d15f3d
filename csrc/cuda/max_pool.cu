// Max pooling of NHWC tensors, with the position of each maximum in its window in one byte.
//
//   forward    reads the input, whose overlapping windows meet in L1 and L2; writes a value and a byte per output
//   backward   reads them once, and again from L1 and L2 for each input that a window covers; writes the input's
//   gradient
//
// A thread has N neighbouring channels of a pixel, of the output in forward, of the input in backward: there it adds
// the gradients of the windows whose maximum the pixel is, in fp32 and in their order, which is PyTorch's. So there are
// no atomics, and results repeat.
#include <cstring>

#include "launch.cuh"
#include "two_pass.cuh"

namespace resfuse::cuda {
namespace {

constexpr int kThreads = 256;

struct Axis {
  int size, out, kernel, stride, padding, dilation;

  __device__ explicit Axis(const PoolAxis& axis)
      : size(static_cast<int>(axis.size)),
        out(static_cast<int>(axis.out)),
        kernel(static_cast<int>(axis.kernel)),
        stride(static_cast<int>(axis.stride)),
        padding(static_cast<int>(axis.padding)),
        dilation(static_cast<int>(axis.dilation)) {}
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One dimension of a window: its elements are start + step dilation, for step in [first, last).
struct Window {
  int start, first, last;

  __device__ Window(const Axis& axis, int out) : start(out * axis.stride - axis.padding) {
    first = start < 0 ? ceil_div(-start, axis.dilation) : 0;
    last = min(axis.kernel, ceil_div(axis.size - start, axis.dilation));
  }
};

// N bytes, read and written at once.
template <int N>
using Bytes = std::conditional_t<N == 1, uint8_t, std::conditional_t<N == 4, uint32_t, uint2>>;

// Calls function(index of the values, row of the batch, column, channel) for every N channels of a thread.
template <int N, class Function>
__device__ __forceinline__ void each_pixel(int64_t rows, int columns, int channels, const Function& function) {
  const int vectors = channels / N, width = columns * vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * width; i += step) {
    const int row = static_cast<int>(i / width), rest = static_cast<int>(i - static_cast<int64_t>(row) * width);
    function(i * N, row, rest / vectors, rest % vectors * N);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) max_pool_forward_kernel(MaxPoolForward args) {
  using E = Elements<T, N>;
  const Axis rows(args.pool.rows), columns(args.pool.columns);
  const int channels = static_cast<int>(args.pool.channels);
  each_pixel<N>(args.pool.batch * rows.out, columns.out, channels, [&](int64_t to, int row, int column, int channel) {
    const Window high(rows, row % rows.out), wide(columns, column);
    const T* image = static_cast<const T*>(args.input) +
                     static_cast<int64_t>(row / rows.out) * rows.size * columns.size * channels + channel;
    float best[N];
    uint8_t position[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      best[k] = -INFINITY;
      position[k] = static_cast<uint8_t>(high.first * columns.kernel + wide.first);
    }
    for (int r = high.first; r < high.last; ++r) {
      const T* line = image + static_cast<int64_t>(high.start + r * rows.dilation) * columns.size * channels;
#pragma unroll 3
      for (int s = wide.first; s < wide.last; ++s) {
        float value[N];
        E::unpack(E::load(line + static_cast<int64_t>(wide.start + s * columns.dilation) * channels), value);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const bool better = value[k] > best[k] || value[k] != value[k];  // the first of several; NaN before all
          best[k] = better ? value[k] : best[k];
          position[k] = better ? static_cast<uint8_t>(r * columns.kernel + s) : position[k];
        }
      }
    }
    E::store(static_cast<T*>(args.output) + to, E::pack(best));
    Bytes<N> bytes;
    std::memcpy(&bytes, position, N);
    *reinterpret_cast<Bytes<N>*>(args.positions + to) = bytes;
  });
}

// The first window of an axis that reaches so far.
__device__ __forceinline__ int first_window(const Axis& axis, int at) {
  const int before = at - axis.dilation * (axis.kernel - 1);
  return before > 0 ? ceil_div(before, axis.stride) : 0;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) max_pool_backward_kernel(MaxPoolBackward args) {
  using E = Elements<T, N>;
  const Axis rows(args.pool.rows), columns(args.pool.columns);
  const int channels = static_cast<int>(args.pool.channels);
  each_pixel<N>(args.pool.batch * rows.size, columns.size, channels, [&](int64_t to, int row, int column, int channel) {
    const int high = row % rows.size + rows.padding, wide = column + columns.padding;
    const int64_t image = static_cast<int64_t>(row / rows.size) * rows.out;
    float sum[N] = {};
    for (int r = first_window(rows, high); r < rows.out && r * rows.stride <= high; ++r) {
      const int below = high - r * rows.stride;
      if (below % rows.dilation != 0) continue;
      for (int s = first_window(columns, wide); s < columns.out && s * columns.stride <= wide; ++s) {
        const int beside = wide - s * columns.stride;
        if (beside % columns.dilation != 0) continue;
        const int here = below / rows.dilation * columns.kernel + beside / columns.dilation;
        const int64_t from = ((image + r) * columns.out + s) * channels + channel;
        float gradient[N];
        E::unpack(E::load(static_cast<const T*>(args.grad_output) + from), gradient);
        const Bytes<N> bytes = *reinterpret_cast<const Bytes<N>*>(args.positions + from);
        uint8_t position[N];
        std::memcpy(position, &bytes, N);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += position[k] == here ? gradient[k] : 0.f;
      }
    }
    E::store(static_cast<T*>(args.grad_input) + to, E::pack(sum));
  });
}

// Calls function(T{}, N); positions are read and written N bytes at a time.
template <class Function>
void with_channels(const Pooling& pool, const void* input, const void* output, const uint8_t* positions,
                   const Function& function) {
  const Activation shape{pool.batch, pool.channels, 1, true, pool.dtype};
  with_elements(shape, aligned(input, output) && reinterpret_cast<uintptr_t>(positions) % 8 == 0, function);
}

}  // namespace

void max_pool_forward(const MaxPoolForward& args, void* stream) {
  with_channels(args.pool, args.input, args.output, args.positions, [&](auto element, auto count) {
    auto* kernel = max_pool_forward_kernel<decltype(element), count.value>;
    const int64_t pixels = args.pool.batch * args.pool.rows.out * args.pool.columns.out;
    const unsigned grid = grid_for(kernel, pixels * (args.pool.channels / count.value), kThreads);
    launch(kernel, dim3(grid), dim3(kThreads), 0, stream, false, args);
  });
}

void max_pool_backward(const MaxPoolBackward& args, void* stream) {
  with_channels(args.pool, args.grad_input, args.grad_output, args.positions, [&](auto element, auto count) {
    auto* kernel = max_pool_backward_kernel<decltype(element), count.value>;
    const int64_t pixels = args.pool.batch * args.pool.rows.size * args.pool.columns.size;
    const unsigned grid = grid_for(kernel, pixels * (args.pool.channels / count.value), kThreads);
    launch(kernel, dim3(grid), dim3(kThreads), 0, stream, false, args);
  });
}

}  // namespace resfuse::cuda
