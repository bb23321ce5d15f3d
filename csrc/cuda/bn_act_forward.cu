// Batch norm, residual and activation: per channel over N, H, W
//
//   y = act((x - mean) (invstd weight) + bias + residual),   invstd = (variance + eps)^-1/2
//
// with mean and invstd rounded to float first, as they are kept: backward computes y again from them.
//
// bn_train_forward   one cooperative launch: x -> (count, mean, M2) of each block's part | grid barrier | merged in a
//                    fixed order, running statistics, then y. Reads x; each block keeps as much of it in shared memory
//                    as fits and reads the rest again, backwards, while it is still in L2. Reads the residual, writes
//                    y. Bytes: 2 to 3 activations, and the residual. Where a convolution has left the parts' moments,
//                    only what follows the barrier is launched.
// bn_statistics      its first half. Reads x.
// bn_apply           y with given statistics: raw running ones (nothing is folded ahead of time), or mean and invstd.
//                    Reads x and the residual, writes y.
#include <cmath>

#include "launch.cuh"
#include "reduce.cuh"
#include "two_pass.cuh"
#include "vector.cuh"

namespace resfuse::cuda {
namespace {

constexpr int kApplyThreads = 256;

__device__ float median(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }

// The median of three values of a channel, the same for all parts: deviations from it are about as small as those from
// the mean and, where the mean is large, exact. A single outlier is never chosen.
template <class T>
struct Pivot {
  const T* input;
  int64_t offsets[3];
  int64_t channel_stride;

  __device__ Pivot(const T* input, const ChannelTiles& t)
      : input(input), offsets{0, t.offset(t.items / 2), t.offset(t.items - 1)}, channel_stride(t.channel_stride) {}

  __device__ float operator()(int channel) const {
    const T* from = input + channel * channel_stride;
    const float a = to_float(from[offsets[0]]), b = to_float(from[offsets[1]]), c = to_float(from[offsets[2]]);
    return median(a, b, c);
  }
};

// Moments of the thread's items, the mean relative to the pivot. With d = x - centre, where the centre is the median of
// the thread's first three items, S = sum d and Q = sum d^2 suffice: mean = centre + S / n and M2 = Q - S^2 / n, which
// cancels only as far as the values drift within one thread. x of the first `kept` items stays in `keep`.
template <class T, int N>
__device__ void thread_moments(const T* input, const Pivot<T>& pivot, const ChannelTiles& t, const ThreadShare& share,
                               int kept, typename Elements<T, N>::Word* keep, Moments (&moments)[N]) {
  using E = Elements<T, N>;
  constexpr int kGroup = N == 1 ? 16 : 4;  // items in flight, to cover the latency of memory
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  float centre[N] = {}, sum[N] = {}, squares[N] = {};
  Walk walk(t, share, 0);
  for_each_group<kGroup>(share.steps, [&](int first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    typename E::Word words[kGroup];
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      if (kFull || first + u < share.steps) {
        words[u] = E::load(input + walk.offset);
        walk.next(t);
      }
    }
    if (first == 0) {
      float second[N], third[N];
      E::unpack(words[0], centre);
      E::unpack(kFull || share.steps > 1 ? words[1] : words[0], second);
      E::unpack(kFull || share.steps > 2 ? words[2] : words[0], third);
#pragma unroll
      for (int k = 0; k < N; ++k) centre[k] = median(centre[k], second[k], third[k]);
    }
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      if (kFull || first + u < share.steps) {
        if (first + u < kept) keep[(first + u) * threads + thread] = words[u];
        float x[N];
        E::unpack(words[u], x);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float d = x[k] - centre[k];
          sum[k] += d;
          squares[k] = fmaf(d, d, squares[k]);
        }
      }
    }
  });
  if (share.steps == 0) return;
  const auto count = static_cast<float>(share.steps);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float mean = sum[k] / count, to_pivot = centre[k] - pivot(share.channel + (t.lanes == 1 ? 0 : k));
    moments[k] = {count, to_pivot + mean, fmaf(-sum[k], mean, squares[k])};
  }
  if (t.lanes == 1)  // NCHW: all belong to one channel
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) moments[k].merge(moments[k + half]);
}

// Writes the moments of the block's part to the workspace.
template <class T, int N>
__device__ void part_moments(const T* input, const Pivot<T>& pivot, const ChannelTiles& t, const ThreadShare& share,
                             int kept, typename Elements<T, N>::Word* keep, Moments* scratch, float* workspace) {
  Moments moments[N];
  thread_moments<T, N>(input, pivot, t, share, kept, keep, moments);
  merge_members(moments, t.lanes, share.slot, t.slots, share.member, t.members, scratch);
  if (share.member == 0 && share.channel < t.channels)
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k < t.lanes)
        store_part(workspace, t, share.part, share.channel + k, moments[k].mean, moments[k].m2 + moments[k].m2_low);
}

// The moments of channel c of the block's tile, in thread c.
__device__ Moments whole_moments(const float* workspace, const ChannelTiles& t, const ThreadShare& share,
                                 Moments* scratch) {
  return merge_parts<Moments>(workspace, t, share, scratch, [&](int part, float mean, float m2) {
    return Moments{static_cast<float>(t.part_count(part)), mean, m2};
  });
}

// Writes y for the thread's items, the last first; x of the first `kept` is in `keep`. The second of two passes reads
// for the last time, and its writes should not evict what it has yet to read.
template <class T, int N, bool kSecondPass>
__device__ void normalise(const T* input, const T* residual, T* output, bool with_relu, const ChannelTiles& t,
                          const ThreadShare& share, const Affine* affine, int kept,
                          const typename Elements<T, N>::Word* keep) {
  using E = Elements<T, N>;
  constexpr int kGroup = N == 1 ? 8 : 4;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const float lowest = with_relu ? 0.f : -INFINITY;
  float mean[N], scale[N], shift[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Affine of = affine[share.slot * t.lanes + (t.lanes == 1 ? 0 : k)];
    mean[k] = of.mean;
    scale[k] = of.scale;
    shift[k] = of.shift;
  }
  Walk walk(t, share, share.steps);
  for_each_group<kGroup>(share.steps, [&](int first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    typename E::Word words[kGroup], others[kGroup];
    int64_t offsets[kGroup];
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      const int step = share.steps - 1 - first - u;
      if (kFull || step >= 0) {
        walk.previous(t);
        offsets[u] = walk.offset;
        if (step < kept) {
          words[u] = keep[step * threads + thread];
        } else {
          words[u] = E::template load<kSecondPass>(input + walk.offset);
        }
        if (residual != nullptr) others[u] = E::template load<kSecondPass>(residual + walk.offset);
      }
    }
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      if (kFull || first + u < share.steps) {
        float x[N], added[N] = {};
        E::unpack(words[u], x);
        if (residual != nullptr) E::unpack(others[u], added);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float y = Affine{mean[k], scale[k], shift[k]}(x[k]) + added[k];
          x[k] = y <= lowest ? lowest : y;  // NaN stays NaN
        }
        E::template store<kSecondPass>(output + offsets[u], E::pack(x));
      }
    }
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kTwoPassThreads, 1)
    bn_train_forward_kernel(const BnTrainForward args, const ChannelTiles t, const int kept, const Phase phase) {
  RESFUSE_DYNAMIC_SHARED(shared);
  const TwoPassShared<T, N, Affine, Moments> memory(shared, t);
  const ThreadShare share(t);
  const auto* input = static_cast<const T*>(args.input);
  const Pivot<T> pivot(input, t);
  if (phase != Phase::second)
    part_moments<T, N>(input, pivot, t, share, kept, memory.kept, memory.scratch, args.workspace);
  if (phase == Phase::first) return;
  if (phase == Phase::both) wait_for_parts(t.parts);

  const bool known = args.known_parts > 0;
  ChannelTiles parts = t;
  parts.parts = known ? args.known_parts : t.parts;
  parts.items_per_part = known ? args.known_part : t.items_per_part;
  const Moments moments = whole_moments(args.workspace, parts, share, memory.scratch);
  const int channel = share.tile_channel + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < t.tile_channels() && channel < t.channels) {
    const float mean = known ? moments.mean : pivot(channel) + moments.mean;
    const double variance = moments.sum_of_squares() / moments.count;
    const auto invstd = static_cast<float>(inverse_deviation(variance, args.eps));
    memory.vectors[threadIdx.x] = affine<T>(args, channel, mean, invstd);
    if (share.part == 0) {
      args.mean[channel] = mean;
      args.invstd[channel] = invstd;
      const double momentum = args.momentum, unbiased = moments.sum_of_squares() / (moments.count - 1.);
      if (args.running_mean.data != nullptr) {
        const float old = channel_value<T>(args.running_mean, channel, 0.f);
        set_channel_value<T>(args.running_mean, channel, updated_running(old, mean, momentum));
      }
      if (args.running_var.data != nullptr) {
        const float old = channel_value<T>(args.running_var, channel, 0.f);
        set_channel_value<T>(args.running_var, channel, updated_running(old, unbiased, momentum));
      }
    }
  }
  __syncthreads();
  normalise<T, N, true>(input, static_cast<const T*>(args.residual), static_cast<T*>(args.output), args.relu, t, share,
                        memory.vectors, kept, memory.kept);
}

template <class T, int N>
__global__ void __launch_bounds__(kTwoPassThreads, 1)
    bn_statistics_kernel(const BnStatistics args, const ChannelTiles t, const int, const Phase phase) {
  RESFUSE_DYNAMIC_SHARED(shared);
  const TwoPassShared<T, N, Affine, Moments> memory(shared, t);
  const ThreadShare share(t);
  const auto* input = static_cast<const T*>(args.input);
  const Pivot<T> pivot(input, t);
  if (phase != Phase::second) part_moments<T, N>(input, pivot, t, share, 0, nullptr, memory.scratch, args.workspace);
  if (phase == Phase::first) return;
  if (phase == Phase::both) wait_for_parts(t.parts);
  if (share.part != 0) return;

  const Moments moments = whole_moments(args.workspace, t, share, memory.scratch);
  const int channel = share.tile_channel + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < t.tile_channels() && channel < t.channels) {
    args.mean[channel] = pivot(channel) + moments.mean;
    args.m2[channel] = static_cast<float>(moments.sum_of_squares());
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kApplyThreads) bn_apply_kernel(const BnApply args, const ChannelTiles t) {
  RESFUSE_DYNAMIC_SHARED(shared);
  auto* vectors = reinterpret_cast<Affine*>(shared);
  const ThreadShare share(t);
  const int channel = share.tile_channel + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < t.tile_channels() && channel < t.channels) {
    float invstd = channel_value<T>(args.spread, channel, 1.f);
    if (args.spread_is_variance) invstd = static_cast<float>(inverse_deviation(static_cast<double>(invstd), args.eps));
    vectors[threadIdx.x] = affine<T>(args, channel, channel_value<T>(args.mean, channel, 0.f), invstd);
  }
  __syncthreads();
  normalise<T, N, false>(static_cast<const T*>(args.input), static_cast<const T*>(args.residual),
                         static_cast<T*>(args.output), args.relu, t, share, vectors, 0, nullptr);
}

}  // namespace

int64_t bn_workspace_size(int64_t channels) {
  const int blocks = resident_blocks(bn_statistics_kernel<float, 1>, kTwoPassThreads, shared_memory_limit());
  return most_part_values(channels, blocks);
}

void bn_statistics(const BnStatistics& args, void* stream) {
  with_elements(args.shape, aligned(args.input), [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int N = decltype(size)::value;
    launch_two_pass<T, N, Affine, Moments>(bn_statistics_kernel<T, N>, args, 0, stream);
  });
}

void bn_train_forward(const BnTrainForward& args, void* stream) {
  with_elements(args.shape, aligned(args.input, args.residual, args.output), [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int N = decltype(size)::value;
    launch_two_pass<T, N, Affine, Moments>(bn_train_forward_kernel<T, N>, args, 1, stream, args.known_parts > 0);
  });
}

void bn_apply(const BnApply& args, void* stream) {
  with_elements(args.shape, aligned(args.input, args.residual, args.output), [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int N = decltype(size)::value;
    auto* kernel = bn_apply_kernel<T, N>;
    constexpr size_t kShared = kTileChannels * sizeof(Affine);
    const ChannelTiles t = cut(args.shape, N, kApplyThreads, resident_blocks(kernel, kApplyThreads, kShared));
    launch(kernel, dim3(t.grid()), dim3(t.threads()), kShared, stream, false, args, t);
  });
}

}  // namespace resfuse::cuda
