// The gradients of batch norm, residual and activation. Per channel over N, H, W, with g = dy where y > 0 (or NaN),
// else 0, and xhat = (x - mean) invstd:
//
//   sum_g = sum g,  sum_g_xhat = sum g xhat,  dresidual = g
//   dx = weight invstd (g - sum_g / count - xhat sum_g_xhat / count)     with batch statistics
//   dx = weight invstd g                                                 with running statistics
//
// Without y its sign is computed from x, as forward did.
//
// bn_backward         one cooperative launch: g and the sums of each block's part, dresidual, and dx where it needs no
//                     sums | grid barrier | sums merged in a fixed order, then dx. Reads dy, x and y if there is one.
//                     Each block keeps as much of g and x in shared memory as fits and reads the rest again (dresidual
//                     in place of dy and y), backwards, while it is still in L2. Bytes: 2 to 4 activations read, 6
//                     with y and without dresidual, plus the writes.
// bn_backward_apply   dx from given sums. Reads g and, with batch statistics, x; writes dx.
#include "launch.cuh"
#include "reduce.cuh"
#include "two_pass.cuh"
#include "vector.cuh"

namespace resfuse::cuda {
namespace {

constexpr int kApplyThreads = 256;
template <int N>
constexpr int kGroup = N == 1 ? 8 : 2;  // items in flight, from up to three activations

// Per channel: dx = scale g - (x - mean) slope - shift, and y = relu((x - mean) scale + bias).
struct Gradient {
  float mean, scale, bias, slope, shift;
};

// The same for the N elements of a thread's items.
template <int N>
struct Gradients {
  float mean[N], scale[N], bias[N], slope[N], shift[N];

  __device__ Gradients(const Gradient* vectors, const ChannelTiles& t, const ThreadShare& share) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Gradient of = vectors[share.slot * t.lanes + (t.lanes == 1 ? 0 : k)];
      mean[k] = of.mean;
      scale[k] = of.scale;
      bias[k] = of.bias;
      slope[k] = of.slope;
      shift[k] = of.shift;
    }
  }

  // Turns dy into g.
  template <class T>
  __device__ __forceinline__ void mask(float (&dy)[N], const float (&x)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) dy[k] = Affine{mean[k], scale[k], bias[k]}(x[k]) <= kRoundedToZero<T> ? 0.f : dy[k];
  }

  // Turns g into dx, with batch statistics.
  __device__ __forceinline__ void apply(float (&g)[N], const float (&x)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) g[k] = fmaf(scale[k], g[k], -fmaf(x[k] - mean[k], slope[k], shift[k]));
  }

  // With running statistics: x may be infinite and must not enter.
  __device__ __forceinline__ void apply(float (&g)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) g[k] *= scale[k];
  }
};

// The coefficients of dx from a channel's sums over `count` values; once per channel, so in double precision.
template <class T, class Args>
__device__ Gradient gradient(const Args& args, int channel, double sum_g, double sum_g_xhat, double count) {
  const float mean = channel_value<T>(args.mean, channel, 0.f), invstd = channel_value<T>(args.invstd, channel, 1.f);
  const double scale = static_cast<double>(invstd) * channel_value<T>(args.weight, channel, 1.f);  // exact
  const double slope = scale * sum_g_xhat / count * invstd, shift = scale * sum_g / count;
  float bias = 0.f;
  if constexpr (std::is_same_v<Args, BnBackward>) bias = channel_value<T>(args.bias, channel, 0.f);
  return {mean, static_cast<float>(scale), bias, static_cast<float>(slope), static_cast<float>(shift)};
}

// One item of dy, y and x in registers; `g` computes the masked gradient, whose mask comes from y where there is one.
template <class T, int N>
struct Item {
  using E = Elements<T, N>;
  typename E::Word dy, y, x;

  template <bool kLast>
  __device__ __forceinline__ void load(const T* dy_from, const T* y_from, const T* x_from, int64_t offset) {
    dy = E::template load<kLast>(dy_from + offset);
    if (y_from != nullptr) y = E::template load<kLast>(y_from + offset);
    if (x_from != nullptr) x = E::template load<kLast>(x_from + offset);
  }

  __device__ __forceinline__ void g(const Gradients<N>& of, bool relu, bool has_y, float (&values)[N]) const {
    E::unpack(dy, values);
    if (!relu) return;
    if (has_y) {
      float output[N];
      E::unpack(y, output);
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = masked(values[k], output[k]);
    } else {
      float input[N];
      E::unpack(x, input);
      of.template mask<T>(values, input);
    }
  }
};

// Sums of g and of g (x - mean) over the thread's items; writes dresidual, and dx = scale g if requested. g and x of
// the first `kept` items stay in `keep`.
template <class T, int N>
__device__ void thread_sums(const BnBackward& args, const ChannelTiles& t, const ThreadShare& share,
                            const Gradient* vectors, int kept, typename Elements<T, N>::Word* keep,
                            SumPair (&sums)[N]) {
  using E = Elements<T, N>;
  const auto* dy = static_cast<const T*>(args.grad_output);
  const auto* y = static_cast<const T*>(args.output);
  const auto* x = static_cast<const T*>(args.input);
  auto* dresidual = static_cast<T*>(args.grad_residual);
  auto* dx = args.batch_statistics ? nullptr : static_cast<T*>(args.grad_input);
  const Gradients<N> of(vectors, t, share);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  Walk walk(t, share, 0);
  for_each_group<kGroup<N>>(share.steps, [&](int first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    Item<T, N> items[kGroup<N>];
    int64_t offsets[kGroup<N>];
#pragma unroll
    for (int u = 0; u < kGroup<N>; ++u) {
      if (kFull || first + u < share.steps) {
        offsets[u] = walk.offset;
        items[u].template load<false>(dy, y, x, walk.offset);
        walk.next(t);
      }
    }
#pragma unroll
    for (int u = 0; u < kGroup<N>; ++u) {
      const int step = first + u;
      if (kFull || step < share.steps) {
        float g[N], values[N];
        items[u].g(of, args.relu, y != nullptr, g);
        E::unpack(items[u].x, values);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          sums[k].first += g[k];
          sums[k].second = fmaf(g[k], values[k] - of.mean[k], sums[k].second);
        }
        const typename E::Word masked_dy = E::pack(g);
        if (step < kept) {
          keep[2 * step * threads + thread] = masked_dy;
          keep[(2 * step + 1) * threads + thread] = items[u].x;
        }
        if (dresidual != nullptr) E::store(dresidual + offsets[u], masked_dy);
        if (dx != nullptr) {
          of.apply(g);
          E::store(dx + offsets[u], E::pack(g));
        }
      }
    }
  });
  if (t.lanes == 1)  // NCHW: all belong to one channel
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) sums[k].merge(sums[k + half]);
}

// Writes dx for the thread's items, the last first; g and x of the first `kept` are in `keep`. Without `relu` dy is g
// already; x null: running statistics.
template <class T, int N, bool kSecondPass>
__device__ void input_gradient(const T* dy, const T* y, const T* x, bool relu, T* dx, const ChannelTiles& t,
                               const ThreadShare& share, const Gradient* vectors, int kept,
                               const typename Elements<T, N>::Word* keep) {
  using E = Elements<T, N>;
  const Gradients<N> of(vectors, t, share);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  Walk walk(t, share, share.steps);
  for_each_group<kGroup<N>>(share.steps, [&](int first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    Item<T, N> items[kGroup<N>];
    int64_t offsets[kGroup<N>];
#pragma unroll
    for (int u = 0; u < kGroup<N>; ++u) {
      const int step = share.steps - 1 - first - u;
      if (kFull || step >= 0) {
        walk.previous(t);
        offsets[u] = walk.offset;
        if (step < kept) {
          items[u].dy = keep[2 * step * threads + thread];
          items[u].x = keep[(2 * step + 1) * threads + thread];
        } else {
          items[u].template load<kSecondPass>(dy, y, x, walk.offset);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kGroup<N>; ++u) {
      const int step = share.steps - 1 - first - u;
      if (kFull || step >= 0) {
        float g[N], values[N];
        items[u].g(of, relu && step >= kept, y != nullptr, g);
        if (x != nullptr) {
          E::unpack(items[u].x, values);
          of.apply(g, values);
        } else {
          of.apply(g);
        }
        E::template store<kSecondPass>(dx + offsets[u], E::pack(g));
      }
    }
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kTwoPassThreads, 1)
    bn_backward_kernel(const BnBackward args, const ChannelTiles t, const int kept, const Phase phase) {
  RESFUSE_DYNAMIC_SHARED(shared);
  const TwoPassShared<T, N, Gradient, SumPair> memory(shared, t);
  const ThreadShare share(t);
  const int channel = share.tile_channel + static_cast<int>(threadIdx.x);
  const bool has_channel = static_cast<int>(threadIdx.x) < t.tile_channels() && channel < t.channels;
  if (phase != Phase::second) {
    if (has_channel) memory.vectors[threadIdx.x] = gradient<T>(args, channel, 0., 0., 1.);
    __syncthreads();
    SumPair sums[N];
    thread_sums<T, N>(args, t, share, memory.vectors, kept, memory.kept, sums);
    merge_members(sums, t.lanes, share.slot, t.slots, share.member, t.members, memory.scratch);
    if (share.member == 0 && share.channel < t.channels)
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (k < t.lanes) store_part(args.workspace, t, share.part, share.channel + k, sums[k].first, sums[k].second);
  }
  if (phase == Phase::first) return;
  if (phase == Phase::both) wait_for_parts(t.parts);
  const bool second_pass = args.batch_statistics && args.grad_input != nullptr;
  if (share.part != 0 && !second_pass) return;

  const auto pair = [](int, float first, float second) { return SumPair{first, second}; };
  const SumPair sums = merge_parts<SumPair>(args.workspace, t, share, memory.scratch, pair);
  if (has_channel) {
    const float sum_g_xhat = sums.second * channel_value<T>(args.invstd, channel, 1.f);
    const auto count = static_cast<double>(t.count());
    memory.vectors[threadIdx.x] = gradient<T>(args, channel, sums.first, sum_g_xhat, count);
    if (share.part == 0) {
      args.sum_g[channel] = sums.first;
      args.sum_g_xhat[channel] = sum_g_xhat;
    }
  }
  if (!second_pass) return;
  __syncthreads();
  const auto* dresidual = static_cast<const T*>(args.grad_residual);  // holds g, if present
  input_gradient<T, N, true>(dresidual != nullptr ? dresidual : static_cast<const T*>(args.grad_output),
                             dresidual != nullptr ? nullptr : static_cast<const T*>(args.output),
                             static_cast<const T*>(args.input), args.relu && dresidual == nullptr,
                             static_cast<T*>(args.grad_input), t, share, memory.vectors, kept, memory.kept);
}

template <class T, int N>
__global__ void __launch_bounds__(kApplyThreads)
    bn_backward_apply_kernel(const BnBackwardApply args, const ChannelTiles t) {
  RESFUSE_DYNAMIC_SHARED(shared);
  auto* vectors = reinterpret_cast<Gradient*>(shared);
  const ThreadShare share(t);
  const int channel = share.tile_channel + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < t.tile_channels() && channel < t.channels) {
    const bool batch_statistics = args.count > 0;
    const float sum_g = batch_statistics ? channel_value<T>(args.sum_g, channel, 0.f) : 0.f;
    const float sum_g_xhat = batch_statistics ? channel_value<T>(args.sum_g_xhat, channel, 0.f) : 0.f;
    const double count = batch_statistics ? args.count : 1.;
    vectors[threadIdx.x] = gradient<T>(args, channel, sum_g, sum_g_xhat, count);
  }
  __syncthreads();
  input_gradient<T, N, false>(static_cast<const T*>(args.grad_output), nullptr, static_cast<const T*>(args.input),
                              false, static_cast<T*>(args.grad_input), t, share, vectors, 0, nullptr);
}

}  // namespace

void bn_backward(const BnBackward& args, void* stream) {
  const bool all_aligned = aligned(args.grad_output, args.input, args.output, args.grad_input, args.grad_residual);
  with_elements(args.shape, all_aligned, [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int N = decltype(size)::value;
    const int words = args.batch_statistics && args.grad_input != nullptr ? 2 : 0;  // per item: g and x
    launch_two_pass<T, N, Gradient, SumPair>(bn_backward_kernel<T, N>, args, words, stream);
  });
}

void bn_backward_apply(const BnBackwardApply& args, void* stream) {
  const bool all_aligned = aligned(args.grad_output, args.input, args.grad_input);
  with_elements(args.shape, all_aligned, [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int N = decltype(size)::value;
    auto* kernel = bn_backward_apply_kernel<T, N>;
    constexpr size_t kShared = kTileChannels * sizeof(Gradient);
    const ChannelTiles t = cut(args.shape, N, kApplyThreads, resident_blocks(kernel, kApplyThreads, kShared));
    launch(kernel, dim3(t.grid()), dim3(t.threads()), kShared, stream, false, args, t);
  });
}

}  // namespace resfuse::cuda
