// The two kernels of conv_bn_act: with running statistics (inference), and with batch statistics (training).
#pragma once
#include <cooperative_groups.h>

#include "conv_statistics.cuh"
#include "launch.cuh"

namespace resfuse::cuda {

template <class T>
struct ConvShared {
  unsigned char slots[T::kStages * T::kSlotBytes];
  ChannelTerms<T> terms;
  StatisticsScratch<T> statistics;
};

struct ConvInference {
  ChannelVector conv_bias, mean, variance, weight, bias;
  float eps;
  float* partial;  // [tiles][splits][pieces][kRun / 4][threads] of 4 floats
};

// Neighbouring blocks share kGroupM tiles of M for all tiles of N, so that both operands hit L2.
__device__ __forceinline__ void rasterize(const ConvGeometry& conv, unsigned block, int& tile_m, int& tile_n) {
  constexpr unsigned kGroupM = 8;
  const unsigned group = block / (kGroupM * conv.tiles_n), within = block % (kGroupM * conv.tiles_n);
  const unsigned rows = min(conv.tiles_m - group * kGroupM, kGroupM);
  tile_m = group * kGroupM + within % rows;
  tile_n = within / rows;
}

// output = act((conv(input, weight) + conv_bias - mean) invstd weight + bias + residual), rounded once.
//
// Block (tile, split) of a grid [tiles][splits] computes its share of the steps of K.  With several splits it writes
// partial sums to the workspace and, once all have, adds up its share of the tile's pieces in the order of the splits.
//
// Reads input, weight and residual, writes output: itemsize (N H W C + K R S C / groups + 2 M K) bytes at best.
template <class Math, class T, Copies kCopies>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerProcessor)
    conv_inference_kernel(const ConvGeometry conv, const ConvInference bn, const Output<typename Math::Element> out,
                          const Phase phase) {
  using Element = typename Math::Element;
  RESFUSE_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ConvShared<T>*>(memory);
  int tile_m, tile_n;
  rasterize(conv, blockIdx.x, tile_m, tile_n);
  const TileIndex tile = tile_index<T>(conv, tile_m, tile_n);
  const int split = blockIdx.y, splits = gridDim.y;
  const auto own = [&](int piece) { return splits == 1 || piece % splits == split; };
  float4* partial = reinterpret_cast<float4*>(bn.partial) +
                    static_cast<int64_t>(blockIdx.x) * splits * kPieces<T> * 2 * T::kThreads + threadIdx.x;

  const int channel = threadIdx.x;
  if (channel < T::kBlockN) {
    float centre = 0, scale = 0, shift = 0;
    if (tile.first_filter + channel < conv.group_filters) {
      const int filter = tile.group * conv.group_filters + tile.first_filter + channel;
      scale = channel_value<Element>(bn.weight, filter, 1.f);
      if (bn.variance.data != nullptr)
        scale *= inverse_deviation(channel_value<Element>(bn.variance, filter, 0.f), bn.eps);
      centre = channel_value<Element>(bn.mean, filter, 0.f) - channel_value<Element>(bn.conv_bias, filter, 0.f);
      shift = channel_value<Element>(bn.bias, filter, 0.f);
    }
    shared.terms.centre[channel] = centre;
    shared.terms.scale[channel] = scale;
    shared.terms.shift[channel] = shift;
  }

  Accumulators<T> acc;
  if (phase != Phase::second) {
    const auto share = [&](int which) { return static_cast<int>(static_cast<int64_t>(conv.steps) * which / splits); };
    convolve<Math, T, kCopies>(acc, conv, tile, share(split), share(split + 1), shared.slots);
    if (splits > 1)
      for_each_run<T>(acc, [&](int piece, int, int, const float (&values)[kRun]) {
        float4* to = partial + (split * kPieces<T> + piece) * 2 * T::kThreads;
        to[0] = make_float4(values[0], values[1], values[2], values[3]);
        to[T::kThreads] = make_float4(values[4], values[5], values[6], values[7]);
      });
  }
  if (splits > 1) {
    if (phase == Phase::first) return;
    if (phase == Phase::both) cooperative_groups::this_grid().sync();
    for_each_run<T>(acc, [&](int, int, int, float (&values)[kRun]) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) values[k] = 0;
    });
#pragma unroll 1
    for (int from = 0; from < splits; ++from)
      for_each_run<T>(acc, [&](int piece, int, int, float (&values)[kRun]) {
        if (!own(piece)) return;
        const float4* parts = partial + (from * kPieces<T> + piece) * 2 * T::kThreads;
        const float4 low = parts[0], high = parts[T::kThreads];
        values[0] += low.x, values[1] += low.y, values[2] += low.z, values[3] += low.w;
        values[4] += high.x, values[5] += high.y, values[6] += high.z, values[7] += high.w;
      });
  }
  store_tile<T, Element>(acc, shared.terms, out, tile, conv.pixels - tile.first_pixel, nullptr, shared.slots, own);
}

struct ConvTraining {
  ChannelVector conv_bias, running_mean, running_var, weight, bias;
  float *mean, *invstd;
  float momentum, eps;
  void* z;
  float* workspace;  // [parts][2][filters]
};

// z = conv(input, weight) + conv_bias; output = act((z - mean) invstd weight + bias + residual) with z's statistics.
//
// Block (part, column) computes the tiles of its part in turn, stores z and writes the moments of the stored values to
// the workspace.  Once all have, every block merges its column's parts in order and normalises its tiles, the latest
// first: that one is still in the accumulators, the others are likely in L2.  With one tile per block z is never read
// again.  The first part writes mean, invstd and the running statistics.
//
// Reads input, weight and residual, writes z and output: itemsize (N H W C + K R S C / groups + 3 M K) bytes at best.
template <class Math, class T, Copies kCopies>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerProcessor)
    conv_training_kernel(const ConvGeometry conv, const ConvTraining bn, const Output<typename Math::Element> out,
                         const TrainPlan plan, const Phase phase) {
  using Element = typename Math::Element;
  RESFUSE_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ConvShared<T>*>(memory);
  const int tile_n = blockIdx.x % conv.tiles_n, part = blockIdx.x / conv.tiles_n;
  const int first_tile = part * plan.tiles_per_part, tiles = min(plan.tiles_per_part, conv.tiles_m - first_tile);
  Element* z = static_cast<Element*>(bn.z);

  const int channel = threadIdx.x;
  TileIndex tile = tile_index<T>(conv, first_tile, tile_n);
  const int first_filter = tile.group * conv.group_filters + tile.first_filter, filter = first_filter + channel;
  const bool has_channel = channel < T::kBlockN && tile.first_filter + channel < conv.group_filters;
  const auto inside = [&](int first) { return conv.group_filters - tile.first_filter - first; };

  Accumulators<T> acc;
  if (phase != Phase::second) {
    if (channel < T::kBlockN)
      shared.terms.shift[channel] = has_channel ? channel_value<Element>(bn.conv_bias, filter, 0.f) : 0.f;
    Moments moments;
    for (int t = 0; t < tiles; ++t) {
      tile.first_pixel = static_cast<int64_t>(first_tile + t) * T::kBlockM;
      convolve<Math, T, kCopies>(acc, conv, tile, 0, conv.steps, shared.slots);
      const int rows = static_cast<int>(min(conv.pixels - tile.first_pixel, int64_t{T::kBlockM}));
      for_each_run<T>(acc, [&](int, int, int first, float (&values)[kRun]) {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
          values[k] = to_float(from_float<Element>(values[k] + shared.terms.shift[first + k]));
      });
      for_each_run<T>(acc, [&](int piece, int row, int first, const float (&values)[kRun]) {
        if (row < rows && inside(first) > 0)
          store_run(z + offset_of<T>(out, tile, piece), values, inside(first), out.wide);
      });
      float mean, m2;
      tile_moments<T>(acc, rows, shared.statistics, mean, m2);
      if (has_channel) moments.merge({static_cast<float>(rows), mean, m2});
    }
    if (has_channel) {
      float* row = bn.workspace + static_cast<int64_t>(part) * 2 * conv.filters + filter;
      row[0] = moments.mean;
      row[conv.filters] = moments.m2;
    }
  }
  if (phase == Phase::both) cooperative_groups::this_grid().sync();
  if (phase == Phase::first) return;

  const Moments all = merge_parts<T>(bn.workspace, conv, plan, tile, shared.statistics);
  if (channel < T::kBlockN) {
    float centre = 0, scale = 0, shift = 0;
    if (has_channel) {
      const float invstd = inverse_deviation(all.m2 / all.count, bn.eps);
      centre = all.mean;
      scale = invstd * channel_value<Element>(bn.weight, filter, 1.f);
      shift = channel_value<Element>(bn.bias, filter, 0.f);
      if (part == 0) {
        bn.mean[filter] = all.mean;
        bn.invstd[filter] = invstd;
        const auto update = [&](const ChannelVector& running, float value) {
          if (running.data == nullptr) return;
          set_channel_value<Element>(
              running, filter, channel_value<Element>(running, filter, 0.f) * (1 - bn.momentum) + value * bn.momentum);
        };
        update(bn.running_mean, all.mean);
        update(bn.running_var, all.m2 / (all.count - 1));
      }
    }
    shared.terms.centre[channel] = centre;
    shared.terms.scale[channel] = scale;
    shared.terms.shift[channel] = shift;
  }
  const auto all_pieces = [](int) { return true; };
  const auto store = [&](int t, const Element* from) {
    tile.first_pixel = static_cast<int64_t>(first_tile + t) * T::kBlockM;
    store_tile<T>(acc, shared.terms, out, tile, conv.pixels - tile.first_pixel, from, shared.slots, all_pieces);
  };
  int left = tiles;
  if (phase == Phase::both) store(--left, nullptr);
  while (left > 0) store(--left, z);
}

}  // namespace resfuse::cuda
