// One tile of an implicit GEMM: out[pixel][channel] = sum over taps (r, s) and channels c of
//
//   input[image][oy stride + r dilation - padding][ox stride + s dilation - padding][c] weight[channel][r][s][c]
//
//               K: taps, channels of a tap                      N: output channels of one group
//             +--------+--------+-- - -                       +--------+
//   M: pixels | slot 0 | slot 1 |    64 bytes per row         |  acc   |   a warp has kWarpM x kWarpN of it,
//    kBlockM  |        |        |    and step                 |        |   in registers
//             +--------+--------+-- - -                       +--------+
//
// A step of K never spans two taps.  Slots are rows of 64 bytes, input above weight, in a ring of kStages that cp.async
// fills kStages - 1 steps ahead.  Row r keeps its 16-byte chunk c at c ^ (r / 2 % 4): the 8 rows that one phase of
// ldmatrix reads lie in 8 different groups of banks.
//
// A slot's weight row r holds output channel `permuted(r)`, so that the accumulators of four neighbouring mma tiles
// are 8 consecutive channels in one thread: outputs and residuals are accessed 16 bytes at a time, without a shuffle.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "mma.cuh"

namespace resfuse::cuda {

// A convolution in the kernels' terms, as derived by `geometry` in conv_launch.cuh.
struct ConvGeometry {
  const void* input;   // NHWC
  const void* weight;  // K, R, S, C / groups
  int64_t pixels;      // of all images' outputs
  int height, width, channels, out_height, out_width;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int taps_h, taps_w;  // of the main loop
  int run;             // values of one tap, side by side in memory
  int span;            // pixels that `run` covers: kernel_w where a filter row counts as one tap, else 1
  int filters, group_filters, group_channels;
  int tiles_m, tiles_n, group_tiles_n;
  int steps;
};

// Larger tiles load fewer bytes per product; smaller ones give more blocks.
template <int kBlockM_, int kBlockN_, int kWarpsM_, int kWarpsN_, int kBlocksPerProcessor_>
struct Tile {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr int kWarpM = kBlockM / kWarpsM, kWarpN = kBlockN / kWarpsN;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
  static constexpr int kStages = 4, kRowBytes = 64, kRowsPerPass = kThreads / 4;
  static constexpr int kPassesA = kBlockM / kRowsPerPass, kPassesB = kBlockN / kRowsPerPass;
  static constexpr int kSlotBytes = (kBlockM + kBlockN) * kRowBytes;
  static_assert(kWarpN % 32 == 0 && kWarpM % 16 == 0 && kRowsPerPass % 32 == 0);
};

template <class T>
using Accumulators = float[T::kMmaM][T::kMmaN][4];

__device__ __forceinline__ int permuted(int row) { return (row & ~31) + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2; }
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 64 + ((chunk ^ (row / 2 % 4)) << 4); }

// The pixels and channels of a tile.
struct TileIndex {
  int64_t first_pixel;
  int group, first_filter;  // the latter within the group
};

template <class T>
__device__ __forceinline__ TileIndex tile_index(const ConvGeometry& conv, int tile_m, int tile_n) {
  return {static_cast<int64_t>(tile_m) * T::kBlockM, tile_n / conv.group_tiles_n,
          tile_n % conv.group_tiles_n * T::kBlockN};
}

// Kinds of copy to shared memory.
enum class Copies {
  vectors,  // by cp.async, 16 bytes at a time: a tap's values are a multiple of that and so are all addresses
  halves,   // by cp.async, 8 bytes at a time: the same for 8
  values    // one by one through registers, from memory of any alignment
};

// Fills slots, one step of K after the other.  A thread always copies the same chunk of rows kRowsPerPass apart.
//
// Unless copied in vectors a filter row can count as one tap, of kernel_w pixels side by side: on 4 channels the 7x7
// stem then has 7 steps of 28 values, not 49 of 4.
template <class Math, class T, Copies kCopies>
struct Loader {
  using Element = typename Math::Element;
  using Bits = std::conditional_t<sizeof(Element) == 2, uint16_t, uint32_t>;
  static constexpr int kSize = sizeof(Element), kChunk = 16 / kSize, kStep = 4 * kChunk;
  static constexpr int kPassBytes = T::kRowsPerPass * T::kRowBytes;

  const ConvGeometry& conv;
  const unsigned char *input[T::kPassesA], *weight;  // at the first tap's first channel of this thread's chunk
  int64_t input_step, weight_step, weight_pass;      // bytes
  int y[T::kPassesA], x[T::kPassesA];
  unsigned input_valid, weight_valid;  // a bit per pass; the former's depend on the tap
  int chunk, slot_offset, r, s, c;

  __device__ __forceinline__ Loader(const ConvGeometry& conv, const TileIndex& tile) : conv(conv) {
    const int row = threadIdx.x / 4;
    chunk = threadIdx.x % 4 * kChunk;
    slot_offset = swizzled(row, threadIdx.x % 4);
    // One division in 64 bits per tile; the others start from the tile's first image.
    const unsigned image_pixels = conv.out_height * conv.out_width;
    const int64_t image = tile.first_pixel / image_pixels;
    const auto within = static_cast<unsigned>(tile.first_pixel - image * image_pixels);
#pragma unroll
    for (int i = 0; i < T::kPassesA; ++i) {
      const unsigned pixel = within + row + i * T::kRowsPerPass;
      const unsigned line = pixel / conv.out_width, images = line / conv.out_height;
      x[i] = static_cast<int>(pixel - line * conv.out_width) * conv.stride_w - conv.pad_w;
      y[i] = static_cast<int>(line - images * conv.out_height) * conv.stride_h - conv.pad_h;
      const int64_t at = (((image + images) * conv.height + y[i]) * conv.width + x[i]) * conv.channels;
      input[i] =
          static_cast<const unsigned char*>(conv.input) + (at + tile.group * conv.group_channels + chunk) * kSize;
      if (tile.first_pixel + row + i * T::kRowsPerPass >= conv.pixels) y[i] = INT32_MIN / 2;  // outside every image
    }
    const int filter = tile.first_filter + permuted(row);
    const int64_t filter_bytes = static_cast<int64_t>(conv.taps_h) * conv.taps_w * conv.run * kSize;
    weight_pass = T::kRowsPerPass * filter_bytes;
    weight = static_cast<const unsigned char*>(conv.weight) + chunk * kSize +
             (static_cast<int64_t>(tile.group) * conv.group_filters + filter) * filter_bytes;
    weight_valid = 0;
#pragma unroll
    for (int i = 0; i < T::kPassesB; ++i)
      weight_valid |= unsigned{filter + i * T::kRowsPerPass < conv.group_filters} << i;
  }

  __device__ __forceinline__ void seek(int step) {
    const int steps_per_tap = (conv.run + kStep - 1) / kStep, tap = step / steps_per_tap;
    r = tap / conv.taps_w;
    s = tap % conv.taps_w;
    enter_tap();
    c = step % steps_per_tap * kStep;
    input_step += c * kSize;
    weight_step += c * kSize;
  }

  __device__ __forceinline__ void enter_tap() {
    const int dy = r * conv.dilation_h, dx = s * conv.dilation_w;
    c = 0;
    input_step = (static_cast<int64_t>(dy) * conv.width + dx) * conv.channels * kSize;
    weight_step = (static_cast<int64_t>(r) * conv.taps_w + s) * conv.run * kSize;
    input_valid = 0;
#pragma unroll
    for (int i = 0; i < T::kPassesA; ++i) {
      const bool line = static_cast<unsigned>(y[i] + dy) < static_cast<unsigned>(conv.height);
      const bool column =
          kCopies != Copies::vectors || static_cast<unsigned>(x[i] + dx) < static_cast<unsigned>(conv.width);
      input_valid |= unsigned{line && column} << i;
    }
  }

  __device__ __forceinline__ void advance() {
    c += kStep;
    input_step += T::kRowBytes;
    weight_step += T::kRowBytes;
    if (c < conv.run) return;
    if (++s == conv.taps_w) {
      s = 0;
      ++r;
    }
    enter_tap();
  }

  __device__ __forceinline__ void fill(unsigned char* slot) {
    unsigned char* to_input = slot + slot_offset;
    unsigned char* to_weight = to_input + T::kBlockM * T::kRowBytes;
    if constexpr (kCopies == Copies::vectors) {
      const bool inside = c + chunk < conv.run;
#pragma unroll
      for (int i = 0; i < T::kPassesA; ++i)
        copy_async<16>(to_input + i * kPassBytes, input[i] + input_step, inside && (input_valid >> i & 1));
#pragma unroll
      for (int i = 0; i < T::kPassesB; ++i)
        copy_async<16>(to_weight + i * kPassBytes, weight + weight_step + i * weight_pass,
                       inside && (weight_valid >> i & 1));
    } else {
      const int dx = s * conv.dilation_w;
#pragma unroll
      for (int i = 0; i < T::kPassesA; ++i) {
        // The run's pixels that lie within the line.
        const int first = max(0, -(x[i] + dx)), last = min(conv.span, max(0, conv.width - (x[i] + dx)));
        copy_chunk(to_input + i * kPassBytes, input[i] + input_step, first * conv.group_channels,
                   input_valid >> i & 1 ? last * conv.group_channels : 0);
      }
#pragma unroll
      for (int i = 0; i < T::kPassesB; ++i)
        copy_chunk(to_weight + i * kPassBytes, weight + weight_step + i * weight_pass, 0,
                   weight_valid >> i & 1 ? conv.run : 0);
    }
  }

  // A chunk of the run's values, zeros for those not in [first, last).
  __device__ __forceinline__ void copy_chunk(unsigned char* to, const unsigned char* from, int first, int last) {
    const auto inside = [&](int k) { return c + chunk + k >= first && c + chunk + k < last; };
    if constexpr (kCopies == Copies::halves) {
      copy_async<8>(to, from, inside(0));
      copy_async<8>(to + 8, from + 8, inside(kChunk / 2));
    } else {
      const Bits* bits = reinterpret_cast<const Bits*>(from);
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = 0;
#pragma unroll
        for (int k = w * kChunk / 4; k < (w + 1) * kChunk / 4; ++k)
          if (inside(k)) words[w] |= uint32_t{bits[k]} << (k * sizeof(Bits) * 8 % 32);
      }
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

// acc += slot's input times slot's weight, on tensor cores: two mma deep.
template <class Math, class T>
__device__ __forceinline__ void multiply_slot(Accumulators<T>& acc, const unsigned char* slot) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_a = warp % T::kWarpsM * T::kWarpM, row_b = T::kBlockM + warp / T::kWarpsM * T::kWarpN;
  if constexpr (Math::kTensorCores) {
    // Matrices: of a, rows 0-7 and 8-15 of the lower 16 bytes, then of the upper; of b, rows 0-7 of both, then 8-15.
    const unsigned char* a = slot + row_a * T::kRowBytes;
    const unsigned char* b = slot + row_b * T::kRowBytes;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int at_a = swizzled(lane % 16, 2 * k + lane / 16);
      const int at_b = swizzled(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
      uint32_t columns[T::kMmaN / 2][4];
#pragma unroll
      for (int j = 0; j < T::kMmaN / 2; ++j) {
        load_matrices(columns[j], b + j * 16 * T::kRowBytes + at_b);
#pragma unroll
        for (uint32_t& pair : columns[j]) pair = Math::prepare(pair);
      }
#pragma unroll
      for (int i = 0; i < T::kMmaM; ++i) {
        uint32_t rows[4];
        load_matrices(rows, a + i * 16 * T::kRowBytes + at_a);
#pragma unroll
        for (uint32_t& pair : rows) pair = Math::prepare(pair);
#pragma unroll
        for (int j = 0; j < T::kMmaN; ++j) {
          const uint32_t column[2] = {columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]};
          Math::multiply(acc[i][j], rows, column);
        }
      }
    }
  } else {
    // The same outputs per thread as an mma: 2 kMmaM rows, 2 kMmaN columns, 4 values of k at a time.  Those are summed
    // separately: one more addition, and a sum of n products is rounded only n / 4 times at its full size.
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1  // else operands are loaded so far ahead that the accumulators spill
    for (int chunk = 0; chunk < 4; ++chunk) {
      float4 rows[T::kMmaM][2];
#pragma unroll
      for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          rows[i][h] = *reinterpret_cast<const float4*>(slot + swizzled(row_a + i * 16 + h * 8 + g, chunk));
#pragma unroll
      for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto b = *reinterpret_cast<const float4*>(slot + swizzled(row_b + j * 8 + 2 * t + e, chunk));
#pragma unroll
          for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float4 a = rows[i][h];
              float& sum = acc[i][j][2 * h + e];
              sum += fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
            }
        }
    }
  }
}

// acc = the products of steps [first, last) of the tile, through kStages * kSlotBytes of shared memory.
template <class Math, class T, Copies kCopies>
__device__ __forceinline__ void convolve(Accumulators<T>& acc, const ConvGeometry& conv, const TileIndex& tile,
                                         int first, int last, unsigned char* slots) {
  Loader<Math, T, kCopies> loader(conv, tile);
  loader.seek(first);
  int ahead = first, reading = 0, filling = 0;  // the two latter: offsets of slots
  const auto fill_next = [&] {
    if (ahead < last) {
      loader.fill(slots + filling);
      loader.advance();
      filling = filling == (T::kStages - 1) * T::kSlotBytes ? 0 : filling + T::kSlotBytes;
    }
    ++ahead;
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[i][j][q] = 0;
#pragma unroll 1
  for (int stage = 0; stage < T::kStages - 1; ++stage) fill_next();
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    copy_async_wait<T::kStages - 2>();  // of this thread's copies; the barrier makes everyone's visible,
    __syncthreads();                    // and the slot that is filled next has been read by all
    fill_next();
    multiply_slot<Math, T>(acc, slots + reading);
    reading = reading == (T::kStages - 1) * T::kSlotBytes ? 0 : reading + T::kSlotBytes;
  }
  __syncthreads();  // the slots are free again
}

}  // namespace resfuse::cuda
