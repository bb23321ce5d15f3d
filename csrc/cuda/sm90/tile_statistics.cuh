// Mean and M2 = sum (z - mean)^2 of each channel of a 128-pixel tile, from the accumulators of two consumer warpgroups.
#pragma once
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>

namespace resfuse::sm90 {

constexpr int kTileM = 128;
constexpr int kProducers = 128, kConsumers = 256;  // threads, in this order

template <int kTileN>
struct StatisticsScratch {
  float sums[kConsumers / 32][kTileN], mean[kTileN];
};

CUTLASS_DEVICE void sync_consumers() { cutlass::arch::NamedBarrier::sync(kConsumers, 0); }

// z = accumulator + shift, rounded as it will be stored; `rows` of the tile exist. Thread c < kTileN of the consumers
// gets the mean and M2 of channel c; undefined in the others.
//
// A wgmma accumulator of 64 x N has, in each warp's 16 rows, rows lane / 4 and lane / 4 + 8 in a thread, and of every 8
// channels its lane % 4'th pair.
template <class Element, int kTileN, class Accumulators>
CUTLASS_DEVICE void tile_statistics(const Accumulators& acc, const float* shift, int rows,
                                    StatisticsScratch<kTileN>& scratch, float& mean, float& m2) {
  constexpr int kPairs = kTileN / 8;
  const int thread = threadIdx.x - kProducers, lane = thread % 32, warp = thread / 32;
  const int first_row = warp * 16 + lane / 4;
  const auto sum_of = [&](const auto& term) {
    CUTLASS_PRAGMA_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const int channel = pair * 8 + lane % 4 * 2;
      float sum[2] = {0, 0};
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half)
        if (first_row + half * 8 < rows) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float z = static_cast<float>(Element(acc(pair * 4 + half * 2 + i) + shift[channel + i]));
            sum[i] += term(z, channel + i);
          }
        }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        CUTLASS_PRAGMA_UNROLL
        for (int step = 4; step < 32; step *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
        if (lane < 4) scratch.sums[warp][channel + i] = sum[i];
      }
    }
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
