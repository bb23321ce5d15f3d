// Launchers for one element type: checks of the request, the geometry in the kernels' terms, the kind of launch.
// conv_bf16.cu and its three siblings instantiate them, one file per type so that they compile in parallel.
#pragma once
#include <climits>

#include "conv_kernels.cuh"

namespace resfuse::cuda {

// The tiles, by the (block_m, block_n) of ConvConfig.  FMA on CUDA cores needs more registers than mma, so there the
// large tiles have more threads, or fewer blocks per multiprocessor.  Where values are not copied 16 bytes at a time
// the kind of copy determines the tile, whatever was requested: loading dominates there.
template <class Math>
struct Tiles {
  using Of128x128 = std::conditional_t<Math::kTensorCores, Tile<128, 128, 2, 2, 2>, Tile<128, 128, 2, 4, 1>>;
  using Of128x64 = std::conditional_t<Math::kTensorCores, Tile<128, 64, 2, 2, 3>, Tile<128, 64, 2, 2, 2>>;
  using Of64x64 = Tile<64, 64, 2, 2, 4>;
  using Of32x64 = Tile<32, 64, 2, 2, 4>;
  using OfHalves = Of128x64;
  using OfValues = Of64x64;
};

// True if a filter row counts as one tap: its pixels are contiguous in memory, and have few channels.
inline bool packs_rows(const Convolution& conv) {
  return conv.groups == 1 && conv.channels < 16 && conv.kernel_w > 1 && conv.dilation_w == 1;
}

inline Copies copies_of(const Convolution& conv, const void* input, const void* weight) {
  const int64_t bytes = conv.channels / conv.groups * (conv.dtype == DType::float32 ? 4 : 2);
  const auto multiples_of = [&](int64_t size) {
    return (bytes | reinterpret_cast<intptr_t>(input) | reinterpret_cast<intptr_t>(weight)) % size == 0;
  };
  if (multiples_of(16) && !packs_rows(conv)) return Copies::vectors;
  return multiples_of(8) ? Copies::halves : Copies::values;
}

template <class T>
ConvGeometry geometry(const Convolution& conv, const void* input, const void* weight, Copies copies) {
  const auto narrow = [](int64_t value, const char* what) {
    if (value > INT_MAX) throw std::runtime_error(std::string("convolution: ") + what + " exceeds 2^31 - 1");
    return static_cast<int>(value);
  };
  const auto tiles = [](int64_t size, int block) { return (size + block - 1) / block; };
  narrow(conv.out_height * conv.out_width + T::kBlockM, "the number of an image's pixels");
  const bool row = copies != Copies::vectors && packs_rows(conv);
  const int64_t group_channels = conv.channels / conv.groups, group_filters = conv.filters / conv.groups;
  const int64_t run = (row ? conv.kernel_w : 1) * group_channels;
  ConvGeometry g{};
  g.input = input;
  g.weight = weight;
  g.pixels = conv.batch * conv.out_height * conv.out_width;
  g.height = narrow(conv.height, "height");
  g.width = narrow(conv.width, "width");
  g.channels = narrow(conv.channels, "channels");
  g.out_height = static_cast<int>(conv.out_height);
  g.out_width = static_cast<int>(conv.out_width);
  g.stride_h = narrow(conv.stride_h, "stride");
  g.stride_w = narrow(conv.stride_w, "stride");
  g.pad_h = narrow(conv.padding_h, "padding");
  g.pad_w = narrow(conv.padding_w, "padding");
  g.dilation_h = narrow(conv.dilation_h, "dilation");
  g.dilation_w = narrow(conv.dilation_w, "dilation");
  g.taps_h = narrow(conv.kernel_h, "the kernel's height");
  g.taps_w = row ? 1 : narrow(conv.kernel_w, "the kernel's width");
  g.run = narrow(run, "a filter row");
  g.span = row ? narrow(conv.kernel_w, "the kernel's width") : 1;
  g.filters = narrow(conv.filters, "filters");
  g.group_filters = static_cast<int>(group_filters);
  g.group_channels = static_cast<int>(group_channels);
  g.tiles_m = narrow(tiles(g.pixels, T::kBlockM), "the number of tiles");
  g.group_tiles_n = static_cast<int>(tiles(group_filters, T::kBlockN));
  g.tiles_n = narrow(conv.groups * g.group_tiles_n, "the number of tiles");
  narrow(static_cast<int64_t>(g.tiles_m) * g.tiles_n, "the number of tiles");
  const int step = T::kRowBytes / (conv.dtype == DType::float32 ? 4 : 2);
  g.steps = narrow(conv.kernel_h * g.taps_w * tiles(run, step), "the number of steps");
  return g;
}

template <class Element>
Output<Element> output_of(const Convolution& conv, const void* residual, void* output, const void* z, bool relu) {
  const bool wide = conv.filters / conv.groups % kRun == 0 && aligned(residual, output, z);
  return {static_cast<const Element*>(residual),
          static_cast<Element*>(output),
          static_cast<int>(conv.filters),
          static_cast<int>(conv.filters / conv.groups),
          relu,
          wide};
}

inline void check_workspace(int64_t needed, int64_t given) {
  if (given < needed)
    throw std::runtime_error("convolution: the workspace has " + std::to_string(given) + " values and needs " +
                             std::to_string(needed));
}

// One cooperative launch of phase `both`, or one launch each of `first` and `second`.
template <class Kernel>
void in_phases(int requested, bool resident, const Kernel& launch_phase) {
  if (requested != 2 && resident && launch_phase(Phase::both, true)) return;
  if (requested == 1)
    throw std::runtime_error("convolution: one launch was asked for, but its blocks are not all resident");
  launch_phase(Phase::first, false);
  launch_phase(Phase::second, false);
}

template <class Math, class T, Copies kCopies>
void launch_inference(const ConvInferenceForward& args, void* stream) {
  const ConvGeometry conv = geometry<T>(args.conv, args.input, args.weight, kCopies);
  const int splits = std::clamp(args.config.splits, 1, std::max(1, conv.steps));
  const ConvInference bn{args.conv_bias,
                         args.running_mean,
                         args.running_var,
                         args.bn_weight,
                         args.bn_bias,
                         static_cast<float>(args.eps),
                         static_cast<float*>(args.workspace)};
  const auto out = output_of<typename Math::Element>(args.conv, args.residual, args.output, nullptr, args.relu);
  auto* kernel = conv_inference_kernel<Math, T, kCopies>;
  const dim3 grid(conv.tiles_m * conv.tiles_n, splits);
  const auto run = [&](Phase phase, bool cooperative) {
    return launch(kernel, grid, dim3(T::kThreads), sizeof(ConvShared<T>), stream, cooperative, conv, bn, out, phase);
  };
  if (splits == 1) {
    run(Phase::both, false);
    return;
  }
  const int64_t blocks = static_cast<int64_t>(grid.x) * splits;
  check_workspace(blocks * T::kBlockM * T::kBlockN, args.workspace_size);
  in_phases(args.config.launches,
            blocks <= resident_blocks(kernel, T::kThreads, sizeof(ConvShared<T>)) && can_cooperate(), run);
}

template <class Math, class T, Copies kCopies>
void launch_train(const ConvTrainForward& args, void* stream) {
  const ConvGeometry conv = geometry<T>(args.conv, args.input, args.weight, kCopies);
  const ConvTraining bn{args.conv_bias,
                        args.running_mean,
                        args.running_var,
                        args.bn_weight,
                        args.bn_bias,
                        args.mean,
                        args.invstd,
                        static_cast<float>(args.momentum),
                        static_cast<float>(args.eps),
                        args.z,
                        static_cast<float*>(args.workspace)};
  const auto out = output_of<typename Math::Element>(args.conv, args.residual, args.output, args.z, args.relu);
  auto* kernel = conv_training_kernel<Math, T, kCopies>;
  // As many blocks as are resident, with one launch or two, so that both give the same bits.
  const int resident = resident_blocks(kernel, T::kThreads, sizeof(ConvShared<T>));
  const int columns = std::max(1, resident / conv.tiles_n);
  const int tiles_per_part = (conv.tiles_m + columns - 1) / columns;
  const TrainPlan plan{(conv.tiles_m + tiles_per_part - 1) / tiles_per_part, tiles_per_part};
  check_workspace(int64_t{2} * plan.parts * conv.filters, args.workspace_size);
  in_phases(args.config.launches, plan.parts * conv.tiles_n <= resident && can_cooperate(),
            [&](Phase phase, bool cooperative) {
              return launch(kernel, dim3(plan.parts * conv.tiles_n), dim3(T::kThreads), sizeof(ConvShared<T>), stream,
                            cooperative, conv, bn, out, plan, phase);
            });
}

// Calls run(tile, copies), both of which carry compile-time constants.
template <class Math, class Run>
void with_tile(const ConvConfig& config, Copies copies, const Run& run) {
  const auto is = [&](int m, int n) { return config.block_m == m && config.block_n == n; };
  constexpr std::integral_constant<Copies, Copies::vectors> vectors;
  if (!is(128, 128) && !is(128, 64) && !is(64, 64) && !is(32, 64))
    throw std::runtime_error("convolution: unsupported tile " + std::to_string(config.block_m) + " x " +
                             std::to_string(config.block_n));
  if (copies == Copies::halves)
    return run(typename Tiles<Math>::OfHalves{}, std::integral_constant<Copies, Copies::halves>{});
  if (copies == Copies::values)
    return run(typename Tiles<Math>::OfValues{}, std::integral_constant<Copies, Copies::values>{});
  if (is(128, 128)) return run(typename Tiles<Math>::Of128x128{}, vectors);
  if (is(128, 64)) return run(typename Tiles<Math>::Of128x64{}, vectors);
  if (is(64, 64)) return run(typename Tiles<Math>::Of64x64{}, vectors);
  return run(typename Tiles<Math>::Of32x64{}, vectors);
}

template <class Math>
void conv_inference(const ConvInferenceForward& args, void* stream) {
  with_tile<Math>(args.config, copies_of(args.conv, args.input, args.weight),
                  [&](auto tile, auto copies) { launch_inference<Math, decltype(tile), copies.value>(args, stream); });
}

template <class Math>
void conv_train(const ConvTrainForward& args, void* stream) {
  with_tile<Math>(args.config, copies_of(args.conv, args.input, args.weight),
                  [&](auto tile, auto copies) { launch_train<Math, decltype(tile), copies.value>(args, stream); });
}

}  // namespace resfuse::cuda
