// Partition of an activation, NHWC or NCHW, by the batch norm kernels. A block has one tile of channels and one part of
// the positions, for `slots` x `members` threads. A slot is a group of adjacent channels; an item is the N elements
// that a thread reads at a time; the members of a slot take its items in turn.
//
//   NHWC, a slot is N channels, its items are the positions        NCHW, a slot is one channel, its items N positions
//
//               channels                                                       positions
//             +----+----+                                               +----+----+----+----+----+----+
//   positions | m0 | m0 | part 0                               slot 0   | m0 | m1 | m2 | m0 | m1 | m2 |  image 0
//             | m1 | m1 |                                      slot 1   | m0 | m1 | m2 | m0 | m1 | m2 |
//             | m0 | m0 |                                               +----+----+----+----+----+----+
//             +----+----+                                      slot 0   | m0 | ...                       image 1
//             | m0 | m0 | part 1
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "launch.cuh"
#include "vector.cuh"

namespace resfuse::cuda {

constexpr int kTileChannels = 64;  // at most: side by side they are a line of L2, or two of float32

struct ChannelTiles {
  int channels;
  int lanes;            // neighbouring elements of an item belong to this many channels: N (NHWC) or 1
  int lane_items;       // values per channel in an item: 1 (NHWC) or N
  bool slots_adjacent;  // threads of neighbouring slots are neighbours (NHWC), or those of neighbouring members
  int slots, members;
  int tiles, parts;
  int64_t items, items_per_part;  // of a slot
  // Offsets in elements: from channel to channel; from item to item, `run` times, then from image to image.
  int64_t channel_stride, item_stride, image_stride;
  int run;
  // From one item of a member to its next: `step` elements and `step_items` items on, and `wrap` where the run ends.
  int64_t step, wrap;
  int step_items;

  __host__ __device__ int tile_channels() const { return slots * lanes; }
  __host__ int threads() const { return slots * members; }
  __host__ unsigned grid() const { return static_cast<unsigned>(tiles) * static_cast<unsigned>(parts); }

  // Maximum number of items per thread.
  __host__ int most_steps() const { return static_cast<int>((items_per_part + members - 1) / members); }

  __device__ int64_t offset(int64_t item) const { return item / run * image_stride + item % run * item_stride; }

  // Number of values per channel in a part.
  __device__ int64_t part_count(int64_t part) const {
    const int64_t rest = items - part * items_per_part;
    return (rest < items_per_part ? rest : items_per_part) * lane_items;
  }

  __device__ int64_t count() const { return items * lane_items; }
};

// A thread's share of it.
struct ThreadShare {
  int tile_channel;  // the first channel of the block's tile
  int channel;       // the first of the thread's
  int part, slot, member;
  int steps;
  int64_t first;  // item
  int64_t base;   // offset of the channel

  __device__ explicit ThreadShare(const ChannelTiles& t) {
    const int tile = blockIdx.x % t.tiles, thread = threadIdx.x;
    part = blockIdx.x / t.tiles;
    slot = t.slots_adjacent ? thread % t.slots : thread / t.members;
    member = t.slots_adjacent ? thread / t.slots : thread % t.members;
    tile_channel = tile * t.tile_channels();
    channel = tile_channel + slot * t.lanes;
    base = channel * t.channel_stride;
    const int64_t begin = part * t.items_per_part;
    const int64_t end = begin + t.items_per_part < t.items ? begin + t.items_per_part : t.items;
    first = begin + member;
    const bool there = channel < t.channels && first < end;
    steps = there ? static_cast<int>((end - first + t.members - 1) / t.members) : 0;
  }
};

// Iterates over the items of a thread in either direction, without a division.
struct Walk {
  int64_t offset;
  int position;  // in the run

  // Positioned at item number `step` of the thread, which need not exist.
  __device__ Walk(const ChannelTiles& t, const ThreadShare& share, int step) {
    const int64_t item = share.first + static_cast<int64_t>(step) * t.members;
    offset = share.base + t.offset(item);
    position = static_cast<int>(item % t.run);
  }

  __device__ __forceinline__ void next(const ChannelTiles& t) {
    offset += t.step;
    position += t.step_items;
    if (position >= t.run) {
      position -= t.run;
      offset += t.wrap;
    }
  }

  __device__ __forceinline__ void previous(const ChannelTiles& t) {
    offset -= t.step;
    position -= t.step_items;
    if (position < 0) {
      position += t.run;
      offset -= t.wrap;
    }
  }
};

// Calls group(first, full) for every kGroup steps, to be loaded together. `full`, a type, says that all of them exist,
// which makes the loop without bounds checks a third shorter.
template <int kGroup, class Group>
__device__ __forceinline__ void for_each_group(int steps, const Group& group) {
  int first = 0;
  for (; first + kGroup <= steps; first += kGroup) group(first, std::true_type{});
  if (first < steps) group(first, std::false_type{});
}

// One pixel counts as NHWC, one channel as NCHW with a single image, whatever the strides.
inline Activation simplified(Activation shape) {
  if (shape.pixels == 1) shape.channels_last = true;
  if (shape.channels == 1 && shape.batch * shape.pixels < 1 << 30)
    shape = {1, 1, shape.batch * shape.pixels, false, shape.dtype};
  return shape;
}

// True if an item can be 16 bytes: channels (NHWC) or planes (NCHW) are multiples of that, and all memory is aligned.
template <class T>
bool has_vectors(const Activation& any_shape, bool all_aligned) {
  const Activation shape = simplified(any_shape);
  return all_aligned && (shape.channels_last ? shape.channels : shape.pixels) % kVectorSize<T> == 0;
}

// Values of two per channel and part that tiles for `blocks` blocks can have: parts <= blocks / tiles, or one.
inline int64_t most_part_values(int64_t channels, int64_t blocks) {
  return 2 * std::max(channels, blocks * kTileChannels);
}

// Tiles for blocks of at most `threads`, and as many parts as keep the grid within the `resident` blocks, or one.
inline ChannelTiles cut(const Activation& any_shape, int n, int threads, int64_t resident) {
  const int64_t blocks = std::max<int64_t>(resident, 1);
  const Activation shape = simplified(any_shape);
  const auto divided = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  ChannelTiles t{};
  t.channels = static_cast<int>(shape.channels);
  int64_t slots;
  t.slots_adjacent = shape.channels_last;
  if (t.slots_adjacent) {
    t.lanes = n;
    t.lane_items = 1;
    t.channel_stride = 1;
    t.items = shape.batch * shape.pixels;
    t.run = static_cast<int>(std::min<int64_t>(t.items, 1 << 30));
    t.item_stride = shape.channels;
    t.image_stride = t.run * t.item_stride;
    slots = shape.channels / n;
    t.tiles = static_cast<int>(divided(slots, kTileChannels / n));
  } else {
    t.lanes = 1;
    t.lane_items = n;
    t.channel_stride = shape.pixels;
    t.items = shape.batch * (shape.pixels / n);
    t.run = static_cast<int>(shape.pixels / n);
    t.item_stride = n;
    t.image_stride = shape.channels * shape.pixels;
    slots = shape.channels;
    t.tiles = static_cast<int>(divided(slots, std::clamp<int64_t>(divided(slots, blocks), 1, kTileChannels)));
  }
  t.slots = static_cast<int>(divided(slots, t.tiles));
  // At least as many threads as channels: each channel's totals end up in one of them.
  t.members = static_cast<int>(std::max<int64_t>(std::min<int64_t>(threads / t.slots, t.items), t.lanes));
  t.parts = static_cast<int>(std::clamp<int64_t>(blocks / t.tiles, 1, divided(t.items, t.members)));
  t.items_per_part = divided(t.items, t.parts);
  t.parts = static_cast<int>(divided(t.items, t.items_per_part));
  t.step_items = t.members % t.run;
  t.step = t.members / t.run * t.image_stride + t.step_items * t.item_stride;
  t.wrap = t.image_stride - t.run * t.item_stride;
  return t;
}

}  // namespace resfuse::cuda
