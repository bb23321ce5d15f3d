// Batch statistics of a convolution's output as (count, mean, M2), M2 = sum (z - mean)^2: per tile from the
// accumulators, then merged in a fixed order.  A block's tiles are merged into one part; parts are exchanged through a
// workspace [parts][2][filters].
#pragma once
#include "batch_statistics.cuh"
#include "conv_epilogue.cuh"

namespace resfuse::cuda {

// Shared memory for a block's reductions.
template <class T>
struct StatisticsScratch {
  float sums[2][T::kWarpsM][T::kBlockN];
  float centre[T::kBlockN];
};

// Adds `sums`, one per channel of the thread's runs, over the rows of a warp and writes the results to `to`.
template <class T>
__device__ __forceinline__ void sum_rows(float (&sums)[kSlabs<T>][kRun], float (&to)[T::kWarpsM][T::kBlockN]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int slab = 0; slab < kSlabs<T>; ++slab)
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      float sum = sums[slab][k];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane < 4) to[warp % T::kWarpsM][warp / T::kWarpsM * T::kWarpN + slab * 32 + lane * kRun + k] = sum;
    }
}

// Thread c < kBlockN gets the mean and M2 of channel c over the tile's first `rows` rows.
template <class T>
__device__ __forceinline__ void tile_moments(Accumulators<T>& acc, int rows, StatisticsScratch<T>& scratch, float& mean,
                                             float& m2) {
  float sums[kSlabs<T>][kRun] = {}, squares[kSlabs<T>][kRun] = {};
  for_each_run<T>(acc, [&](int piece, int row, int, const float (&values)[kRun]) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) sums[piece / kSlabRows<T>][k] += row < rows ? values[k] : 0.f;
  });
  sum_rows<T>(sums, scratch.sums[0]);
  __syncthreads();
  const int channel = threadIdx.x;
  const auto total = [&](int which) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < T::kWarpsM; ++w) sum += scratch.sums[which][w][channel];
    return sum;
  };
  if (channel < T::kBlockN) scratch.centre[channel] = total(0) / rows;
  __syncthreads();
#pragma unroll
  for (int slab = 0; slab < kSlabs<T>; ++slab)
#pragma unroll
    for (int k = 0; k < kRun; ++k) sums[slab][k] = 0;
  for_each_run<T>(acc, [&](int piece, int row, int first, const float (&values)[kRun]) {
    const int slab = piece / kSlabRows<T>;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const float deviation = row < rows ? values[k] - scratch.centre[first + k] : 0.f;
      sums[slab][k] += deviation;
      squares[slab][k] += deviation * deviation;
    }
  });
  sum_rows<T>(sums, scratch.sums[0]);
  sum_rows<T>(squares, scratch.sums[1]);
  __syncthreads();
  if (channel < T::kBlockN) {
    // The centre is as large as the mean and rounded accordingly; the sum of the deviations corrects for that.
    const float error = total(0) / rows;
    mean = scratch.centre[channel] + error;
    m2 = total(1) - rows * error * error;
  }
  __syncthreads();  // the scratch is free again
}

// Assignment of the tiles of a column (the same channels) to blocks.
struct TrainPlan {
  int parts;           // blocks of a column
  int tiles_per_part;  // neighbouring tiles of M; the last part may have fewer
};

// All parts of channel c of the tile, in thread c < kBlockN; undefined in the others.  The parts are dealt out to all
// threads of a channel, each of which loads kBatch of them at a time and merges those around their common mean.
template <class T>
__device__ __forceinline__ Moments merge_parts(const float* workspace, const ConvGeometry& conv, const TrainPlan& plan,
                                               const TileIndex& tile, StatisticsScratch<T>& scratch) {
  constexpr int kBatch = 8, kGroups = T::kThreads / T::kBlockN;
  static_assert(kGroups == 1 || (kGroups == 2 && T::kWarpsM == 2));
  const int channel = threadIdx.x % T::kBlockN, group = threadIdx.x / T::kBlockN;
  const bool there = tile.first_filter + channel < conv.group_filters;
  const float* of = workspace + tile.group * conv.group_filters + tile.first_filter + channel;
  const int64_t part_pixels = static_cast<int64_t>(plan.tiles_per_part) * T::kBlockM;
  Moments all;
  for (int first = group; first < plan.parts; first += kBatch * kGroups) {
    float counts[kBatch], means[kBatch], m2s[kBatch], count = 0, centre = 0, error = 0, m2 = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int part = first + i * kGroups;
      const int64_t left = conv.pixels - part * part_pixels, row = static_cast<int64_t>(part) * 2 * conv.filters;
      const bool inside = there && part < plan.parts;
      counts[i] = inside ? static_cast<float>(left < part_pixels ? left : part_pixels) : 0.f;
      means[i] = inside ? __ldcg(of + row) : 0.f;
      m2s[i] = inside ? __ldcg(of + row + conv.filters) : 0.f;
      count += counts[i];
    }
    const float inverse = 1.f / fmaxf(count, 1.f);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) centre = fmaf(means[i], counts[i], centre);
    centre *= inverse;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float deviation = means[i] - centre, weighted = deviation * counts[i];
      error += weighted;
      m2 += fmaf(deviation, weighted, m2s[i]);
    }
    error *= inverse;  // of the centre, which is as large as the mean and rounded accordingly
    all.merge({count, centre + error, fmaf(-error * error, count, m2)});
  }
  if constexpr (kGroups > 1) {
    auto& to = scratch.sums;
    if (group == 1) {
      to[0][0][channel] = all.count, to[0][1][channel] = all.mean;
      to[1][0][channel] = all.m2, to[1][1][channel] = all.m2_low;
    }
    __syncthreads();
    if (group == 0) all.merge({to[0][0][channel], to[0][1][channel], to[1][0][channel], to[1][1][channel]});
  }
  return all;
}

}  // namespace resfuse::cuda
