// Zeros behind the channels of a convolution's input or weight, which other kernels can then read 8 or 16 bytes at a
// time: NHWC memory from a tensor of any strides, in one pass. For kernels that cannot take a filter row apart, a pixel
// of the output has the channels of all pixels that the row reads.
//
// A warp has a row of the batch, a thread one store of it. In NCHW memory its neighbours' loads are adjacent; in NHWC
// memory they meet in L1. Elements are moved as bits.
#include <cstring>
#include <type_traits>

#include "../resfuse.h"
#include "launch.cuh"

namespace resfuse::cuda {
namespace {

constexpr int kThreads = 256;

template <int kBytes, class T>
using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, T>>;

// T has the size of an element; N of them are stored at once.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) pad_channels_kernel(PadChannels args) {
  const auto channels = static_cast<unsigned>(args.size[1]), vectors = static_cast<unsigned>(args.out_channels / N);
  const auto columns = static_cast<unsigned>(args.size[3]), taps = static_cast<unsigned>(args.taps);
  const auto stride = static_cast<unsigned>(args.stride), dilation = static_cast<unsigned>(args.dilation);
  const unsigned padding = static_cast<unsigned>(args.padding), width = static_cast<unsigned>(args.out_width) * vectors;
  const int64_t to_channel = args.strides[1], to_tap = args.dilation * args.strides[3] - (channels - 1) * to_channel;
  const int64_t rows = args.size[0] * args.size[2], step = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; row < rows; row += step) {
    const int64_t image = row / args.size[2], line = row - image * args.size[2];
    const T* from = static_cast<const T*>(args.input) + image * args.strides[0] + line * args.strides[2];
    for (unsigned i = threadIdx.x % 32; i < width; i += 32) {
      const unsigned pixel = i / vectors, first = (i - pixel * vectors) * N;
      unsigned tap = first / channels, channel = first - tap * channels;
      unsigned column = pixel * stride + tap * dilation - padding;  // left of the image it is a large one
      int64_t offset = static_cast<int>(column) * args.strides[3] + channel * to_channel;
      T values[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        values[k] = tap < taps && column < columns ? from[offset] : T{0};
        const bool last = ++channel == channels;
        offset += last ? to_tap : to_channel;
        column += last ? dilation : 0;
        tap += last;
        channel = last ? 0 : channel;
      }
      Word<N * sizeof(T), T> word;
      std::memcpy(&word, values, sizeof(word));
      reinterpret_cast<Word<N * sizeof(T), T>*>(args.output)[row * width + i] = word;
    }
  }
}

template <class T>
void run(const PadChannels& args, void* stream) {
  const int64_t bytes = args.out_channels * static_cast<int64_t>(sizeof(T));
  auto* kernel = bytes % 16 == 0  ? pad_channels_kernel<T, 16 / sizeof(T)>
                 : bytes % 8 == 0 ? pad_channels_kernel<T, 8 / sizeof(T)>
                                  : pad_channels_kernel<T, 1>;
  const unsigned grid = grid_for(kernel, args.size[0] * args.size[2] * 32, kThreads);
  launch(kernel, dim3(grid), dim3(kThreads), 0, stream, false, args);
}

}  // namespace

void pad_channels(const PadChannels& args, void* stream) {
  args.dtype == DType::float32 ? run<uint32_t>(args, stream) : run<uint16_t>(args, stream);
}

}  // namespace resfuse::cuda
