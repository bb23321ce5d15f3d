// Reductions in a fixed order, so that results repeat bit for bit: over the threads of a block in shared memory, and
// over the blocks of a grid through a workspace [parts][2][channels] of float32.
#pragma once
#include <cooperative_groups.h>

#include "batch_statistics.cuh"
#include "channel_tiles.cuh"

namespace resfuse::cuda {

// Two sums.
struct SumPair {
  float first = 0.f, second = 0.f;

  __device__ void merge(const SumPair& other) {
    first += other.first;
    second += other.second;
  }
};

// Shared memory that `merge_members` needs for `lanes` values per thread: half of the threads write theirs.
template <class Value>
__host__ __device__ size_t merge_bytes(int slots, int members, int lanes) {
  return sizeof(Value) * lanes * slots * ((members + 1) / 2);
}

// Merges the first `lanes` values over all members of a slot into member 0: in every round the second half of the
// members passes its values to the first.
template <class Value, int N>
__device__ void merge_members(Value (&values)[N], int lanes, int slot, int slots, int member, int members,
                              Value* scratch) {
  for (int count = members; count > 1; count = (count + 1) / 2) {
    const int half = (count + 1) / 2;
    __syncthreads();  // the scratch is free
    if (member >= half && member < count)
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (k < lanes) scratch[(k * half + member - half) * slots + slot] = values[k];
    __syncthreads();
    if (member + half < count)
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (k < lanes) values[k].merge(scratch[(k * half + member) * slots + slot]);
  }
}

// Waits for all blocks that have parts of the same channels.
__device__ inline void wait_for_parts(int parts) {
  if (parts > 1) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();  // the block has all of its channels
  }
}

// Row `part` of the workspace: two values per channel.
__device__ inline void store_part(float* workspace, const ChannelTiles& t, int part, int channel, float first,
                                  float second) {
  float* row = workspace + static_cast<int64_t>(part) * 2 * t.channels;
  row[channel] = first;
  row[t.channels + channel] = second;
}

// Channel c of the block's tile, merged over all parts, in thread c; undefined in the others. load(part, first, second)
// makes a Value from a part's two numbers. They are read past L1, which may be stale.
template <class Value, class Load>
__device__ Value merge_parts(const float* workspace, const ChannelTiles& t, const ThreadShare& share, Value* scratch,
                             const Load& load) {
  const int channels = t.tile_channels(), most = static_cast<int>(blockDim.x) / channels;
  const int groups = most < t.parts ? most : t.parts;
  const int slot = static_cast<int>(threadIdx.x) % channels, group = static_cast<int>(threadIdx.x) / channels;
  const int channel = share.tile_channel + slot;
  constexpr int kBatch = 4;  // loaded before the first of them is merged
  Value values[1];
  if (channel < t.channels)
    for (int first = group < groups ? group : t.parts; first < t.parts; first += kBatch * groups) {
      float pairs[kBatch][2];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int part = first + i * groups;
        const float* row = workspace + static_cast<int64_t>(part) * 2 * t.channels + channel;
        pairs[i][0] = part < t.parts ? __ldcg(row) : 0.f;
        pairs[i][1] = part < t.parts ? __ldcg(row + t.channels) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int part = first + i * groups;
        values[0].merge(part < t.parts ? load(part, pairs[i][0], pairs[i][1]) : Value{});
      }
    }
  merge_members(values, 1, slot, channels, group, groups, scratch);
  return values[0];
}

}  // namespace resfuse::cuda
