// Convolutions of small groups (depthwise ones too): a lane for each filter, whatever group it belongs to.
//
// Each filter reads the channels of its own group.  So filters are packed as vectors, for each channel c of a group, of
// what every lane multiplies its group's channel c by; and pixels become such vectors: as they are multiplied, where
// groups have as many filters as channels and a vector has all values of its lanes, else as they are copied.

struct LanesPlan {
  int64_t vectors, lanes, blocks;  // of a block of filters
  int64_t group_channels, group_filters;
  bool picks;  // pixels are copied as they are
  int64_t band_width, pixel_floats;
  int64_t chunk_rows, chunks;  // of an image

  int64_t taps(const Convolution& conv) const { return conv.kernel_h * conv.kernel_w * group_channels; }
  int64_t scratch_bytes(const Convolution& conv) const {
    return (band_rows(conv) * band_width * pixel_floats + taps(conv) * lanes + group_channels * lanes + 3 * lanes +
            256) *
           4;
  }
  int64_t band_rows(const Convolution& conv) const {
    return (chunk_rows - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1;
  }
};

inline bool takes_lanes(const ConvForward& args) {
  return args.conv.groups > 1 && args.conv.filters / args.conv.groups < kWidth && args.conv.filters >= kWidth;
}

inline LanesPlan plan_lanes(const ConvForward& args, int64_t threads) {
  const Convolution& conv = args.conv;
  LanesPlan plan;
  plan.vectors = conv.filters > kWidth ? kPanelVectors : 1;
  plan.lanes = plan.vectors * kWidth;
  plan.blocks = ceil_div(conv.filters, plan.lanes);
  plan.group_channels = conv.channels / conv.groups;
  plan.group_filters = conv.filters / conv.groups;
  plan.band_width = (conv.out_width - 1) * conv.stride_w + (conv.kernel_w - 1) * conv.dilation_w + 1;
  plan.picks = RESFUSE_ISA_LANES >= 8 && plan.group_channels > 1 && plan.group_channels == plan.group_filters &&
               kWidth % plan.group_filters == 0 && conv.filters % kPanel == 0 && args.input_strides[1] == 1;
  plan.pixel_floats = plan.picks ? plan.lanes : plan.group_channels * plan.lanes;
  const int64_t row_bytes = plan.band_width * plan.pixel_floats * 4 * conv.stride_h;
  const int64_t fitting = std::max<int64_t>(1, l2_cache_bytes() / 4 / row_bytes);
  const int64_t wanted = ceil_div(4 * threads, plan.blocks * conv.batch);  // chunks of an image
  plan.chunk_rows = std::clamp<int64_t>(ceil_div(conv.out_height, wanted), 1, fitting);
  plan.chunks = ceil_div(conv.out_height, plan.chunk_rows);
  return plan;
}

template <class T>
struct LanesWorker {
  const ConvForward& args;
  const LanesPlan& plan;
  const Convolution& conv = args.conv;
  float *band, *filters;
  int32_t* picks;  // for each channel of a group and each lane: where in its vector of the input the lane's value is
  EpilogueVectors vectors;
  int64_t first = 0, count = 0;  // filters of the block

  LanesWorker(const ConvForward& args, const LanesPlan& plan, char* scratch) : args(args), plan(plan) {
    filters = reinterpret_cast<float*>(scratch);
    picks = reinterpret_cast<int32_t*>(filters + plan.taps(conv) * plan.lanes);
    vectors.centre = filters + (plan.taps(conv) + plan.group_channels) * plan.lanes;
    vectors.scale = vectors.centre + plan.lanes;
    vectors.shift = vectors.scale + plan.lanes;
    band = vectors.shift + plan.lanes + 64;
  }

  void run(std::atomic<int64_t>& next) {
    int64_t packed = -1;
    const int64_t per_block = conv.batch * plan.chunks;
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < plan.blocks * per_block;) {
      const int64_t block = unit / per_block;
      first = block * plan.lanes;
      count = std::min(plan.lanes, conv.filters - first);
      if (block != packed) pack();
      packed = block;
      const int64_t image = unit % per_block / plan.chunks, row = unit % plan.chunks * plan.chunk_rows;
      const int64_t rows = std::min(plan.chunk_rows, conv.out_height - row);
      copy(image, row, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t pixel = (image * conv.out_height + row + i) * conv.out_width;
        const float* from = band + i * conv.stride_h * plan.band_width * plan.pixel_floats;
        for (int64_t column = 0; column < conv.out_width;) {
          const int64_t now = std::min(kTileRows, conv.out_width - column);
          multiply_row(from + column * conv.stride_w * plan.pixel_floats, pixel + column, now);
          column += now;
        }
      }
    }
  }

 private:
  int64_t channel_of(int64_t filter) const { return filter / plan.group_filters * plan.group_channels; }

  template <class W>
  void pack_from(const W* weight) {
    int64_t filter[kPanel];
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t k = first + lane;
      filter[lane] =
          k / plan.group_filters * args.weight_strides.group + k % plan.group_filters * args.weight_strides.filter;
    }
    float* to = filters;
    for (int64_t row = 0; row < conv.kernel_h; ++row)
      for (int64_t column = 0; column < conv.kernel_w; ++column)
        for (int64_t c = 0; c < plan.group_channels; ++c, to += plan.lanes) {
          const W* at = weight + c * args.weight_strides.channel + row * args.weight_strides.row +
                        column * args.weight_strides.column;
          for (int64_t lane = 0; lane < plan.lanes; ++lane) to[lane] = lane < count ? scalar(at[filter[lane]]) : 0.0f;
        }
  }

  void pack() {
    if (args.weight_dtype == DType::float32)
      pack_from(static_cast<const float*>(args.weight));
    else
      pack_from(static_cast<const bf16*>(args.weight));
    vectors.fill(args, first, count, plan.lanes);
    for (int64_t i = 0; i < plan.group_channels * plan.lanes; ++i) {
      const int64_t lane = i % kWidth;
      picks[i] = static_cast<int32_t>(lane - lane % plan.group_channels + i / plan.lanes);
    }
  }

  void copy_pixel(const T* from, float* to) const {
    const int64_t stride = args.input_strides[1];
    if (plan.picks || (plan.group_channels == 1 && plan.group_filters == 1 && stride == 1)) {
      copy_run<Floats>(from + first, to, count);
      for (int64_t lane = count; lane < plan.lanes; ++lane) to[lane] = 0;
      return;
    }
    for (int64_t lane = 0; lane < plan.lanes;) {
      const int64_t k = first + lane;
      const int64_t same = std::min(plan.group_filters - k % plan.group_filters, plan.lanes - lane);  // of one group
      for (int64_t c = 0; c < plan.group_channels; ++c) {
        const float value = lane < count ? scalar(from[(channel_of(k) + c) * stride]) : 0.0f;
        for (int64_t i = 0; i < same; ++i) to[c * plan.lanes + lane + i] = value;
      }
      lane += same;
    }
  }

  void copy(int64_t image, int64_t first_row, int64_t rows) const {
    const T* input = static_cast<const T*>(args.input) + image * args.input_strides[0];
    const int64_t high = (rows - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1;
    float* to = band;
    for (int64_t i = 0; i < high; ++i)
      for (int64_t j = 0; j < plan.band_width; ++j, to += plan.pixel_floats) {
        const int64_t row = first_row * conv.stride_h - conv.padding_h + i, column = j - conv.padding_w;
        if (row < 0 || column < 0 || row >= conv.height || column >= conv.width)
          zero(to, plan.pixel_floats);
        else
          copy_pixel(input + row * args.input_strides[2] + column * args.input_strides[3], to);
      }
  }

  template <int64_t NV, int64_t PIXELS, bool PICKS>
  __attribute__((noinline)) void multiply_lanes(const float* from, int64_t pixel) const {
    vec sums[PIXELS][NV];
    unrolled<PIXELS>([&](auto i) { unrolled<NV>([&](auto v) { sums[i][v] = vec{}; }); });
    const float* filter = filters;
    const int64_t step = conv.stride_w * plan.pixel_floats;
    for (int64_t row = 0; row < conv.kernel_h; ++row)
      for (int64_t column = 0; column < conv.kernel_w; ++column) {
        const float* at =
            from + (row * conv.dilation_h * plan.band_width + column * conv.dilation_w) * plan.pixel_floats;
        for (int64_t c = 0; c < plan.group_channels; ++c, filter += NV * kWidth) {
          unrolled<NV>([&](auto v) {
            const vec weight = vload(filter + v * kWidth);
            unrolled<PIXELS>([&](auto i) {
              vec value = vload(at + i * step + v * kWidth);
              if constexpr (PICKS) value = vpick(value, picks + c * NV * kWidth + v * kWidth);
              sums[i][v] = sums[i][v] + value * weight;
            });
          });
          if constexpr (!PICKS) at += NV * kWidth;
        }
      }
    const auto finish = [&](auto i, auto v) __attribute__((always_inline)) {
      return (sums[i][v] - vload(vectors.centre + v * kWidth)) * vload(vectors.scale + v * kWidth) +
             vload(vectors.shift + v * kWidth);
    };
    vec values[PIXELS][NV];
    unrolled<PIXELS>([&](auto i) { unrolled<NV>([&](auto v) { values[i][v] = finish(i, v); }); });
    finish_tile<T, Floats, PIXELS, NV>(epilogue_of(pixel), values);
  }

  Tile epilogue_of(int64_t pixel) const {
    Tile tile{};
    tile.output = static_cast<T*>(args.output) + pixel * conv.filters + first;
    tile.residual_filters = std::clamp<int64_t>(args.residual_channels - first, 0, count);
    tile.residual = args.residual != nullptr && tile.residual_filters > 0
                        ? static_cast<const T*>(args.residual) + pixel * args.residual_channels + first
                        : nullptr;
    tile.output_stride = conv.filters, tile.residual_stride = args.residual_channels;
    tile.filters = count;
    tile.relu = args.relu;
    return tile;
  }

  template <int64_t NV, bool PICKS>
  void multiply_vectors(const float* from, int64_t pixel, int64_t pixels) const {
    switch (pixels) {
      case 1:
        return multiply_lanes<NV, 1, PICKS>(from, pixel);
      case 2:
        return multiply_lanes<NV, 2, PICKS>(from, pixel);
      case 3:
        return multiply_lanes<NV, 3, PICKS>(from, pixel);
      case 4:
        return multiply_lanes<NV, 4, PICKS>(from, pixel);
      case 5:
        return multiply_lanes<NV, 5, PICKS>(from, pixel);
      case 6:
        return multiply_lanes<NV, 6, PICKS>(from, pixel);
      default:
        return multiply_lanes<NV, 7, PICKS>(from, pixel);
    }
  }

  void multiply_row(const float* from, int64_t pixel, int64_t pixels) const {
#if RESFUSE_ISA_LANES >= 8
    if (plan.picks && plan.vectors == kPanelVectors) return multiply_vectors<kPanelVectors, true>(from, pixel, pixels);
#endif
    if (plan.vectors == 1) return multiply_vectors<1, false>(from, pixel, pixels);
    if constexpr (kPanelVectors > 1) multiply_vectors<kPanelVectors, false>(from, pixel, pixels);
  }
};

template <class T>
void conv_lanes(const ConvForward& args) {
  const int64_t threads = conv_threads(args.conv);
  const LanesPlan plan = plan_lanes(args, threads);
  const int64_t units = plan.blocks * args.conv.batch * plan.chunks;
  share_units(std::min(threads, units), plan.scratch_bytes(args.conv),
              [&](char* scratch, char*, std::atomic<int64_t>& next) { LanesWorker<T>(args, plan, scratch).run(next); });
}
