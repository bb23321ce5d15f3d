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

// `count` of them are inside; `wide`: all are, and 16-byte accesses are possible.
template <class E>
__device__ __forceinline__ void load_run(const E* from, float (&values)[kRun], int count, bool wide) {
  using Vector = Elements<E, kVectorSize<E>>;
  if (wide) {
#pragma unroll
    for (int k = 0; k < kRun; k += kVectorSize<E>)
      Vector::unpack(Vector::load(from + k), reinterpret_cast<float (&)[kVectorSize<E>]>(values[k]));
  } else {
#pragma unroll
    for (int k = 0; k < kRun; ++k) values[k] = k < count ? to_float(from[k]) : 0.f;
  }
}

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

// Calls body(slab, slab row, row, channel, values) for every piece; row and first channel are relative to the tile, and
// `values` is written back to the accumulators.
template <class T, class Body>
__device__ __forceinline__ void for_each_run(Accumulators<T>& acc, const Body& body) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp % T::kWarpsM * T::kWarpM + lane / 4;
  const int first_channel = warp / T::kWarpsM * T::kWarpN + lane % 4 * kRun;
#pragma unroll
  for (int slab = 0; slab < kSlabs<T>; ++slab)
#pragma unroll
    for (int r = 0; r < kSlabRows<T>; ++r) {
      float values[kRun];
#pragma unroll
      for (int k = 0; k < kRun; ++k) values[k] = acc[r / 2][slab * 4 + k / 2][r % 2 * 2 + k % 2];
      body(slab, r, first_row + r * 8, first_channel + slab * 32, values);
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

// output = act((value - centre) scale + shift + residual), with the three vectors in shared memory.
template <class T>
struct alignas(16) ChannelTerms {
  float centre[T::kBlockN], scale[T::kBlockN], shift[T::kBlockN];
};

template <class T, class E>
__device__ __forceinline__ void normalize_run(const ChannelTerms<T>& terms, const Output<E>& out, const TileIndex& tile,
                                              int64_t pixel, int channel, float (&values)[kRun]) {
  const int count = out.group_filters - tile.first_filter - channel;
  if (count <= 0) return;
  const int64_t at = pixel * out.filters + tile.group * out.group_filters + tile.first_filter + channel;
  float centre[kRun], scale[kRun], shift[kRun];
  load_run(terms.centre + channel, centre, kRun, true);
  load_run(terms.scale + channel, scale, kRun, true);
  load_run(terms.shift + channel, shift, kRun, true);
#pragma unroll
  for (int k = 0; k < kRun; ++k) values[k] = (values[k] - centre[k]) * scale[k] + shift[k];
  if (out.residual != nullptr) {
    float residual[kRun];
    load_run(out.residual + at, residual, count, out.wide);
#pragma unroll
    for (int k = 0; k < kRun; ++k) values[k] += residual[k];
  }
  if (out.relu) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) values[k] = relu(values[k]);
  }
  store_run(out.output + at, values, count, out.wide);
}

}  // namespace resfuse::cuda
