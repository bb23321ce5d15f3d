// Mean and M2 = sum (z - mean)^2 of each channel of a 128-pixel tile, from the accumulators of two consumer warpgroups.
#pragma once
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>

namespace resfuse::sm90 {

constexpr int kTileM = 128;
constexpr int kProducers = 128, kConsumers = 256;  // threads, in this order

template <int kTileN>
struct StatisticsScratch {
  float sums[kConsumers / 32][kTileN], mean[kTileN];
};

CUTLASS_DEVICE void sync_consumers() { cutlass::arch::NamedBarrier::sync(kConsumers, 0); }

// Sums of each value over the 8 lanes that have the same lane % 4. Each of them keeps kCount / 8 of the results, and
// passes on what it does not keep: a third of the shuffles that all results in all lanes would take. Returns which
// value the first result is of.
template <int kCount>
CUTLASS_DEVICE int sum_over_rows(float (&values)[kCount]) {
  int first = 0;
  const auto halve = [&](auto half, int step) {
    const bool upper = threadIdx.x & step;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < half; ++i) {
      const float passed_on = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, passed_on, step);
    }
    first += upper ? half : 0;
  };
  halve(cute::Int<kCount / 2>{}, 4);
  halve(cute::Int<kCount / 4>{}, 8);
  halve(cute::Int<kCount / 8>{}, 16);
  return first;
}

// z = accumulator + shift, rounded as it will be stored; `rows` of the tile exist. Thread c < kTileN of the consumers
// gets the mean and M2 of channel c; undefined in the others.
//
// A wgmma accumulator of 64 x N has, in each warp's 16 rows, rows lane / 4 and lane / 4 + 8 in a thread, and of every 8
// channels its lane % 4'th pair.
template <class Element, int kTileN, class Accumulators>
CUTLASS_DEVICE void tile_statistics(const Accumulators& acc, const float* shift, int rows,
                                    StatisticsScratch<kTileN>& scratch, float& mean, float& m2) {
  constexpr int kCount = kTileN / 4;  // channels of a thread
  const int thread = threadIdx.x - kProducers, lane = thread % 32, warp = thread / 32;
  const int first_row = warp * 16 + lane / 4;
  const auto channel_of = [&](int k) { return k / 2 * 8 + lane % 4 * 2 + k % 2; };
  const auto sum_of = [&](const auto& term) {
    float sums[kCount];
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const int channel = channel_of(k);
      sums[k] = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float z = static_cast<float>(Element(acc(k / 2 * 4 + half * 2 + k % 2) + shift[channel]));
        sums[k] += first_row + half * 8 < rows ? term(z, channel) : 0.f;
      }
    }
    const int first = sum_over_rows(sums);
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kCount / 8; ++k) scratch.sums[warp][channel_of(first + k)] = sums[k];
    sync_consumers();
    float total = 0;
    if (thread < kTileN)
      for (const auto& of_warp : scratch.sums) total += of_warp[thread];
    return total;
  };
  sync_consumers();  // other threads have written the shift
  mean = sum_of([](float z, int) { return z; }) / rows;
  if (thread < kTileN) scratch.mean[thread] = mean;
  sync_consumers();
  m2 = sum_of([&](float z, int channel) { return (z - scratch.mean[channel]) * (z - scratch.mean[channel]); });
}

}  // namespace resfuse::sm90
