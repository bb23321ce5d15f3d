// Few pixels and many filters, such as 7x7 images one at a time: packing filters would cost a third of the arithmetic.
//
// So the pixels are packed, by all threads together, and the filters are read as they lie, each once: the operands of
// multiply_tile change places, and its result is transposed in the epilogue.  The pixels beyond 48 take dot products.

constexpr int64_t kFewPixels = 48, kFewRest = 4, kFewFilters = 32;  // a unit of work: so many filters

template <class T, class Mul>
bool takes_few(const ConvForward& args) {
  const Convolution& conv = args.conv;
  const WeightStrides& stride = args.weight_strides;
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels;
  const bool words = args.weight_dtype == conv.dtype && sizeof(T) * Mul::channels == 4 &&
                     conv.channels % Mul::channels == 0 && stride.filter % Mul::channels == 0 &&
                     reinterpret_cast<uintptr_t>(args.weight) % 4 == 0;
  return words && conv.groups == 1 && pixels >= kFewPixels && pixels <= kFewPixels + kFewRest &&
         conv.filters % kFewFilters == 0 && depth % (kWidth * Mul::channels) == 0 &&
         pixels * depth * static_cast<int64_t>(sizeof(T)) <= l2_cache_bytes() && stride.channel == 1 &&
         stride.filter >= depth && (conv.kernel_w == 1 || stride.column == conv.channels) &&
         (conv.kernel_h == 1 || stride.row == conv.kernel_w * conv.channels) && args.statistics == nullptr &&
         (args.residual == nullptr || args.residual_channels == conv.filters);
}

template <class T, class Mul>
class FewPixels {
 public:
  FewPixels(const ConvForward& args, const ConvPlan& plan, int64_t threads)
      : args(args), plan(plan), threads(threads), rest(plan.pixels - kFewPixels) {
    const int64_t shared = (kFewPixels + kFewRest) * plan.depth;
    const int64_t own = std::max(kWidth * plan.window_words, 3 * kFewFilters * (kFewPixels + kFewRest)) + 64;
    float* scratch = reinterpret_cast<float*>(scratch_memory((shared + threads * own) * 4));
    panel = scratch;
    lines = panel + kFewPixels * plan.depth;
    for (int64_t thread = 0; thread < threads; ++thread) scratches.push_back(scratch + shared + thread * own);
  }

  void run() {
    std::atomic<int64_t> packed{0}, taken{0};
    run_threads(threads, [&](int64_t thread) {
      for (int64_t unit; (unit = packed.fetch_add(1)) < kFewPixels / kWidth + 1;) pack(unit, scratches[thread]);
    });
    run_threads(threads, [&](int64_t thread) {
      for (int64_t unit; (unit = taken.fetch_add(1)) < args.conv.filters / kFewFilters;)
        multiply_unit(unit * kFewFilters, scratches[thread]);
    });
  }

 private:
  const T* input() const { return static_cast<const T*>(args.input); }
  const char* filter(int64_t k) const {
    return reinterpret_cast<const char*>(static_cast<const T*>(args.weight) + k * args.weight_strides.filter);
  }

  // Sixteen pixels to the panel, or those that are left over to lines.
  void pack(int64_t unit, float* windows) const {
    if (unit == kFewPixels / kWidth) {
      for (int64_t i = 0; i < rest; ++i) copy_window<Mul>(args, plan, input(), kFewPixels + i, lines + i * plan.depth);
      return;
    }
    for (int64_t i = 0; i < kWidth; ++i)
      copy_window<Mul>(args, plan, input(), unit * kWidth + i, windows + i * plan.window_words);
    pack_contiguous<Floats>(windows, plan.window_words, plan.depth, panel + unit * kWidth, kFewPixels, RowsInOrder{});
  }

  void multiply_unit(int64_t k, float* scratch) const {
    float* sums = scratch;                                            // [filter][pixel]
    float* turned = scratch + kFewFilters * (kFewPixels + kFewRest);  // [pixel][filter]
    float vectors[3][kFewFilters], ones[kFewPixels], zeros[kFewPixels] = {};
    const EpilogueVectors epilogue = {vectors[0], vectors[1], vectors[2]};
    epilogue.fill(args, k, kFewFilters, kFewFilters);
    std::fill(ones, ones + kFewPixels, 1.0f);
    Tile tile{};
    tile.pixel_bytes = args.weight_strides.filter * static_cast<int64_t>(sizeof(T));
    tile.tap_rows = tile.tap_columns = 1;
    tile.run = plan.depth;
    tile.centre = tile.shift = zeros, tile.scale = ones;
    tile.output_stride = kFewPixels;
    tile.panel = panel, tile.filters = kFewPixels;
    tile.ahead_step = 64;
    for (int64_t i = 0; i < kFewFilters; i += 8) {
      tile.pixels[0] = filter(k + i), tile.pixels[1] = filter(k + i + 4);
      tile.ahead = filter(k + i + 8);  // the filters of the next tile
      tile.output = sums + i * kFewPixels;
      multiply_tile<float, Mul, kFewPixels / kWidth, 2, 4>(tile);
      for (int64_t f = i; f < i + 8; ++f)  // while the filters lie in the cache
        for (int64_t j = 0; j < rest; ++j)
          turned[(kFewPixels + j) * kFewFilters + f] = dot(filter(k + f), lines + j * plan.depth);
    }
    for (int64_t f = 0; f < kFewFilters; f += kWidth)
      pack_contiguous<Floats>(sums + f * kFewPixels, kFewPixels, kFewPixels, turned + f, kFewFilters, RowsInOrder{});
    for (int64_t pixel = 0; pixel < plan.pixels; ++pixel) finish(pixel, k, turned + pixel * kFewFilters, epilogue);
  }

  float dot(const char* filter, const float* b) const {
    const float* a = reinterpret_cast<const float*>(filter);
    vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= plan.depth; i += 4 * kWidth)
      unrolled<4>(
          [&](auto j) { sums[j] = Mul::multiply_add(sums[j], vload(a + i + j * kWidth), vload(b + i + j * kWidth)); });
    for (; i < plan.depth; i += kWidth) sums[0] = Mul::multiply_add(sums[0], vload(a + i), vload(b + i));
    const vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float sum = 0;
    for (int64_t lane = 0; lane < kWidth; ++lane) sum += all[lane];
    return sum;
  }

  void finish(int64_t pixel, int64_t k, const float* from, const EpilogueVectors& epilogue) const {
    constexpr int64_t vectors = kFewFilters / kWidth;
    const int64_t at = pixel * args.conv.filters + k;
    vec values[1][vectors];
    unrolled<vectors>([&](auto v) {
      const int64_t f = v * kWidth;
      values[0][v] =
          (vload(from + f) - vload(epilogue.centre + f)) * vload(epilogue.scale + f) + vload(epilogue.shift + f);
    });
    Tile tile{};
    tile.output = static_cast<T*>(args.output) + at;
    tile.residual = args.residual != nullptr ? static_cast<const T*>(args.residual) + at : nullptr;
    tile.filters = tile.residual_filters = kFewFilters;
    tile.relu = args.relu;
    finish_tile<T, Mul, 1, vectors>(tile, values);
  }

  const ConvForward& args;
  const ConvPlan& plan;
  const int64_t threads, rest;
  float *panel, *lines;  // of 48 pixels, and the windows of the others
  std::vector<float*> scratches;
};

template <class T, class Mul>
void conv_few(const ConvForward& args) {
  const ConvPlan plan = plan_conv(args, Mul::channels, false, 1);
  FewPixels<T, Mul>(args, plan, conv_threads(args.conv)).run();
}
