// Epilogue, from a tile's accumulators to memory: layout of a thread's values, per-channel vectors, batch norm,
// residual, ReLU.
#pragma once
#include "../resfuse.h"
#include "batch_statistics.cuh"
#include "conv_tile.cuh"
#include "vector.cuh"

namespace resfuse::cuda {

// A thread loads and stores kRun neighbouring channels of a pixel at a time.
constexpr int kRun = 8;

// From shared memory: 16 bytes at a time, `stride` elements apart.
template <class E>
__device__ __forceinline__ void load_run(const E* from, float (&values)[kRun], int stride = kVectorSize<E>) {
  using Vector = Elements<E, kVectorSize<E>>;
#pragma unroll
  for (int k = 0; k < kRun; k += kVectorSize<E>, from += stride)
    Vector::unpack(Vector::load(from), reinterpret_cast<float (&)[kVectorSize<E>]>(values[k]));
}

// `count` of them are inside; `wide`: all are, and 16-byte accesses are possible.
template <class E>
__device__ __forceinline__ void store_run(E* to, const float (&values)[kRun], int count, bool wide) {
  using Vector = Elements<E, kVectorSize<E>>;
  if (wide) {
#pragma unroll
    for (int k = 0; k < kRun; k += kVectorSize<E>)
      Vector::store(to + k, Vector::pack(reinterpret_cast<const float (&)[kVectorSize<E>]>(values[k])));
  } else {
#pragma unroll
    for (int k = 0; k < kRun; ++k)
      if (k < count) to[k] = from_float<E>(values[k]);
  }
}

// A thread's accumulators are kSlabs x kSlabRows pieces: kRun channels of one of the tile's rows.
template <class T>
constexpr int kSlabs = T::kMmaN / 4;
template <class T>
constexpr int kSlabRows = T::kMmaM * 2;
template <class T>
constexpr int kPieces = kSlabs<T> * kSlabRows<T>;

// Row and first channel of a piece, relative to the tile.
template <class T>
__device__ __forceinline__ int row_of(int piece) {
  return threadIdx.x / 32 % T::kWarpsM * T::kWarpM + threadIdx.x % 32 / 4 + piece % kSlabRows<T> * 8;
}
template <class T>
__device__ __forceinline__ int channel_of(int piece) {
  return threadIdx.x / 32 / T::kWarpsM * T::kWarpN + threadIdx.x % 4 * kRun + piece / kSlabRows<T> * 32;
}

// Calls body(piece, row, channel, values) for kCount pieces; `values` is written back to the accumulators.
template <class T, int kCount = kPieces<T>, class Body>
__device__ __forceinline__ void for_each_run(Accumulators<T>& acc, const Body& body, int first_piece = 0) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int piece = first_piece + i, slab = piece / kSlabRows<T>, r = piece % kSlabRows<T>;
    float values[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) values[k] = acc[r / 2][slab * 4 + k / 2][r % 2 * 2 + k % 2];
    body(piece, row_of<T>(piece), channel_of<T>(piece), values);
#pragma unroll
    for (int k = 0; k < kRun; ++k) acc[r / 2][slab * 4 + k / 2][r % 2 * 2 + k % 2] = values[k];
  }
}

// Destination of a tile's results.
template <class E>
struct Output {
  const E* residual;  // or null; may be `output`
  E* output;
  int filters, group_filters;
  bool relu, wide;  // wide: 16-byte accesses are possible
};

// Where the output has the first element of a piece.
template <class T, class E>
__device__ __forceinline__ int64_t offset_of(const Output<E>& out, const TileIndex& tile, int piece) {
  const int channel = tile.group * out.group_filters + tile.first_filter + channel_of<T>(piece);
  return (tile.first_pixel + row_of<T>(piece)) * out.filters + channel;
}

// output = act((value - centre) scale + shift + residual), with the three vectors in shared memory.
template <class T>
struct alignas(16) ChannelTerms {
  float centre[T::kBlockN], scale[T::kBlockN], shift[T::kBlockN];
};

// Pieces of two tensors, residual and z, on their way to a thread, in the slots that the main loop has left.  No load
// moves ahead of a store that may be to the same memory: loaded one by one, each piece would wait for DRAM after the
// store of the one before it.  A thread reads what it has copied itself, so it waits for its copies and for nobody
// else.
template <class T, class E>
struct Staging {
  static constexpr int kWords = kRun * static_cast<int>(sizeof(E)) / 16, kPerWord = kVectorSize<E>;
  static constexpr int kRoom = T::kStages * T::kSlotBytes / (2 * kWords * 16 * T::kThreads);
  static constexpr int kAtOnce = kRoom >= kPieces<T> ? kPieces<T> : kRoom >= 8 ? 8 : kRoom >= 4 ? 4 : 2;
  static_assert(kRoom >= 2 && kPieces<T> % kAtOnce == 0);
  E* own;

  __device__ __forceinline__ explicit Staging(unsigned char* slots)
      : own(reinterpret_cast<E*>(slots) + threadIdx.x * kPerWord) {}

  __device__ __forceinline__ E* word(int tensor, int piece, int which) const {
    return own + ((tensor * kAtOnce + piece % kAtOnce) * kWords + which) * T::kThreads * kPerWord;
  }

  __device__ __forceinline__ void copy(int tensor, int piece, const E* from, int count, bool wide) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      E* to = word(tensor, piece, w);
      if (wide) {
        copy_async<16>(to, from + w * kPerWord, true);
      } else {
#pragma unroll
        for (int k = 0; k < kPerWord; ++k)
          to[k] = w * kPerWord + k < count ? from[w * kPerWord + k] : from_float<E>(0.f);
      }
    }
  }

  __device__ __forceinline__ void read(int tensor, int piece, float (&values)[kRun]) const {
    load_run(word(tensor, piece, 0), values, T::kThreads * kPerWord);
  }
};

// Writes a tile of the output, from the accumulators or, where z is given, from that: those of its pieces for which
// `own` is true.  `rows` of the tile exist.
template <class T, class E, class Own>
__device__ __forceinline__ void store_tile(Accumulators<T>& acc, const ChannelTerms<T>& terms, const Output<E>& out,
                                           const TileIndex& tile, int64_t rows, const E* z, unsigned char* slots,
                                           const Own& own) {
  const Staging<T, E> staging(slots);
  constexpr int kAtOnce = Staging<T, E>::kAtOnce;
  const auto at = [&](int piece) { return offset_of<T>(out, tile, piece); };
  const auto inside = [&](int channel) { return out.group_filters - tile.first_filter - channel; };
#pragma unroll
  for (int first = 0; first < kPieces<T>; first += kAtOnce) {
    __syncthreads();  // what was copied before has been read, and the terms are there
    if (out.residual != nullptr || z != nullptr)
#pragma unroll 1  // no registers for this while the accumulators hold most of them
      for (int piece = first; piece < first + kAtOnce; ++piece) {
        const int row = row_of<T>(piece), channel = channel_of<T>(piece);
        if (row >= rows || inside(channel) <= 0 || !own(piece)) continue;
        if (out.residual != nullptr) staging.copy(0, piece, out.residual + at(piece), inside(channel), out.wide);
        if (z != nullptr) staging.copy(1, piece, z + at(piece), inside(channel), out.wide);
      }
    copy_async_commit();
    copy_async_wait<0>();
    for_each_run<T, kAtOnce>(
        acc,
        [&](int piece, int row, int channel, const float (&sums)[kRun]) {
          if (row >= rows || inside(channel) <= 0 || !own(piece)) return;
          float values[kRun], centre[kRun], scale[kRun], shift[kRun];
          if (z != nullptr) {
            staging.read(1, piece, values);
          } else {
#pragma unroll
            for (int k = 0; k < kRun; ++k) values[k] = sums[k];
          }
          load_run(terms.centre + channel, centre);
          load_run(terms.scale + channel, scale);
          load_run(terms.shift + channel, shift);
#pragma unroll
          for (int k = 0; k < kRun; ++k) values[k] = Affine{centre[k], scale[k], shift[k]}(values[k]);
          if (out.residual != nullptr) {
            float residual[kRun];
            staging.read(0, piece, residual);
#pragma unroll
            for (int k = 0; k < kRun; ++k) values[k] += residual[k];
          }
          if (out.relu) {
#pragma unroll
            for (int k = 0; k < kRun; ++k) values[k] = relu(values[k]);
          }
          store_run(out.output + at(piece), values, inside(channel), out.wide);
        },
        first);
  }
}

}  // namespace resfuse::cuda
