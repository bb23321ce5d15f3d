// Winograd's F(2x2, 3x3) for 3x3 kernels of stride 1: Lavin & Gray 2015 (arXiv:1509.09308), section 4.1.
//
// A tile of 4x4 pixels and a filter of 3x3 are transformed to sixteen numbers each; the products, summed over channels,
// are transformed to 2x2 outputs: 4 multiplications for each output instead of 9.  For all tiles and filters that is
// sixteen products of matrices, which multiply_tile computes.  It sums fewer products than the direct form, and is no
// less accurate.  A value that is not finite reaches more of a tile's outputs than it should: tiles with such outputs
// are computed again, directly.

struct WinogradPlan {
  int64_t tiles_high, tiles_wide, tiles, groups;  // a group of tiles makes a tile of multiply_tile
  int64_t panel, block_filters, blocks, chunks;
  bool whole;             // the transformed pixels of all tiles are kept from block to block
  int64_t channel_words;  // from one transformed pixel to the next
  int64_t filter_floats, taps_floats, pixel_floats;

  int64_t scratch_bytes() const {
    const int64_t products = 16 * kTilePixels * kPanel;
    return (filter_floats + taps_floats + (whole ? groups : 1) * pixel_floats + products + 9 * channel_words +
            3 * (block_filters + kPanel) + 2 * kPanel + 1024) *
           4;
  }
};

constexpr int64_t kWinogradChannels = 512;

inline bool takes_winograd(const ConvForward& args) {
  const Convolution& conv = args.conv;
  const int64_t tiles = conv.batch * ceil_div(conv.out_height, 2) * ceil_div(conv.out_width, 2);
  return conv.kernel_h == 3 && conv.kernel_w == 3 && conv.stride_h == 1 && conv.stride_w == 1 && conv.dilation_h == 1 &&
         conv.dilation_w == 1 && conv.groups == 1 && conv.channels % kWidth == 0 && conv.filters % kWidth == 0 &&
         conv.channels <= kWinogradChannels && args.input_strides[1] == 1 &&
         tiles >= (conv.channels <= 256 ? 49 : 98) &&  // fewer do not make up for transforming the filters
         (args.residual == nullptr || args.residual_channels == conv.filters);
}

inline WinogradPlan plan_winograd(const ConvForward& args, int64_t threads) {
  const Convolution& conv = args.conv;
  const int64_t l2 = l2_cache_bytes();
  WinogradPlan plan;
  plan.tiles_high = ceil_div(conv.out_height, 2);
  plan.tiles_wide = ceil_div(conv.out_width, 2);
  plan.tiles = conv.batch * plan.tiles_high * plan.tiles_wide;
  plan.groups = ceil_div(plan.tiles, kTilePixels);
  plan.channel_words = conv.channels + 16;  // not a multiple of 4 KB, where pixels would share the L1 cache's sets
  plan.pixel_floats = 16 * kTilePixels * plan.channel_words;
  plan.whole = conv.channels >= 256 && plan.groups * plan.pixel_floats * 4 <= l2;
  const int64_t panel = plan.panel = conv.filters % kPanel == 0 ? kPanel : kWidth;
  const int64_t most = plan.whole ? panel : std::max(panel, l2 / (64 * conv.channels) / panel * panel);
  plan.block_filters = ceil_div(conv.filters / panel, ceil_div(conv.filters, most)) * panel;
  plan.blocks = ceil_div(conv.filters, plan.block_filters);
  plan.chunks = plan.whole ? 1 : std::min(plan.groups, std::max(4 * threads, plan.groups / 8));
  plan.filter_floats = 16 * conv.channels * plan.block_filters;
  plan.taps_floats = 9 * conv.channels * plan.block_filters;
  return plan;
}

// Filters that all threads transform together before any of them multiplies, each panel once.
struct SharedFilters {
  const int64_t panels;  // 0: each thread transforms what it needs, when it needs it
  std::atomic<int64_t> taken{0}, done{0};

  explicit SharedFilters(int64_t panels) : panels(panels) {}

  // transform(panel) for those that this thread takes; returns when all are transformed.
  template <class F>
  void transform(F transform) {
    for (int64_t panel; (panel = taken.fetch_add(1, std::memory_order_relaxed)) < panels;) {
      transform(panel);
      done.fetch_add(1, std::memory_order_release);
    }
    while (done.load(std::memory_order_acquire) < panels) std::this_thread::yield();
  }
};

// To the cache: 2x2 pixels that the next row of tiles adds.  They are farther away than the hardware looks ahead.
template <class T>
RESFUSE_INLINE void fetch_pixels(const T* from, int64_t down, int64_t right, int64_t channels) {
  for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(T)))
    for (const int64_t at : {c, c + right, c + down, c + down + right}) __builtin_prefetch(from + at);
}

// B^T d B of a tile of 4x4 pixels, for all channels; the sixteen results lie `stride` floats apart.
template <class T>
RESFUSE_INLINE void transform_tile(const T* const (&pixels)[16], int64_t channels, float* to, int64_t stride) {
  for (int64_t c = 0; c < channels; c += kWidth) {
    vec rows[4][4];
    unrolled<4>([&](auto j) {
      const vec d0 = vload(pixels[j] + c), d1 = vload(pixels[4 + j] + c);
      const vec d2 = vload(pixels[8 + j] + c), d3 = vload(pixels[12 + j] + c);
      rows[0][j] = d0 - d2, rows[1][j] = d1 + d2, rows[2][j] = d2 - d1, rows[3][j] = d1 - d3;
    });
    unrolled<4>([&](auto j) {
      float* row = to + 4 * j * stride + c;
      vstore(row, rows[j][0] - rows[j][2]);
      vstore(row + stride, rows[j][1] + rows[j][2]);
      vstore(row + 2 * stride, rows[j][2] - rows[j][1]);
      vstore(row + 3 * stride, rows[j][1] - rows[j][3]);
    });
  }
}

// NV x kWidth filters make a panel.
template <class T, int64_t NV>
struct WinogradWorker {
  static constexpr int64_t kFilters = NV * kWidth;
  const ConvForward& args;
  const WinogradPlan& plan;
  const ConvPlan& direct;  // of the windows of tiles that are computed directly
  const Convolution& conv = args.conv;
  float *filters, *taps, *pixels, *products;  // filters and pixels are transformed, taps are the filters as they were
  float *window, *ones, *zeros;
  EpilogueVectors vectors;
  int64_t filter_begin = 0, filter_end = 0;

  WinogradWorker(const ConvForward& args, const WinogradPlan& plan, const ConvPlan& direct, char* scratch)
      : args(args), plan(plan), direct(direct) {
    filters = reinterpret_cast<float*>(scratch);
    taps = filters + plan.filter_floats + 64;
    pixels = taps + plan.taps_floats + 64;
    products = pixels + (plan.whole ? plan.groups : 1) * plan.pixel_floats + 64;
    window = products + 16 * kTilePixels * kFilters + 64;
    ones = window + 9 * plan.channel_words;
    zeros = ones + kFilters;
    vectors.centre = zeros + kFilters;
    vectors.scale = vectors.centre + plan.block_filters + kFilters;
    vectors.shift = vectors.scale + plan.block_filters + kFilters;
    std::fill(ones, ones + kFilters, 1.0f);
    std::fill(zeros, zeros + kFilters, 0.0f);
  }

  // `first`: the scratch of the first thread, where shared filters lie.
  void run(std::atomic<int64_t>& next, SharedFilters& shared, char* first) {
    int64_t packed = -1;
    bool prepared = false;
    if (shared.panels > 0) {
      filter_end = conv.filters;
      filters = reinterpret_cast<float*>(first);
      taps = filters + plan.filter_floats + 64;
      shared.transform([&](int64_t panel) { transform_filters(panel * kFilters, (panel + 1) * kFilters); });
      vectors.fill(args, 0, conv.filters, conv.filters);
      packed = 0;
    }
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < plan.blocks * plan.chunks;) {
      const int64_t block = unit / plan.chunks, chunk = unit % plan.chunks;
      filter_begin = block * plan.block_filters;
      filter_end = std::min(conv.filters, filter_begin + plan.block_filters);
      if (block != packed) {
        transform_filters(filter_begin, filter_end);
        vectors.fill(args, filter_begin, filter_end - filter_begin, filter_end - filter_begin);
      }
      packed = block;
      const int64_t last = part_begin(plan.groups, plan.chunks, chunk + 1);
      for (int64_t group = part_begin(plan.groups, plan.chunks, chunk); group < last; ++group) {
        float* to = pixels + (plan.whole ? group * plan.pixel_floats : 0);
        const int64_t first = group * kTilePixels, count = std::min(kTilePixels, plan.tiles - first);
        if (!prepared)
          for (int64_t i = 0; i < count; ++i) transform_pixels(first + i, to + i * plan.channel_words);
        for (int64_t k = filter_begin; k < filter_end; k += kFilters) {
          multiply_group(to, filters + (k - filter_begin) * 16 * conv.channels, count);
          for (int64_t i = 0; i < count; ++i) finish(first + i, products + i * kFilters, k);
        }
      }
      prepared = plan.whole;
    }
  }

 private:
  // G g G^T, for all channels of these filters of the block: [panel][16][channel][filter].
  void transform_filters(int64_t begin, int64_t end) const {
    const int64_t count = conv.channels * kFilters;
    for (int64_t k = begin; k < end; k += kFilters) {
      float* from = taps + (k - filter_begin) * 9 * conv.channels;
      const int64_t at = k * args.weight_strides.filter;
      if (args.weight_dtype == DType::float32)
        pack_panel<Floats>(args, direct, static_cast<const float*>(args.weight) + at, kFilters, from, kFilters);
      else
        pack_panel<Floats>(args, direct, static_cast<const bf16*>(args.weight) + at, kFilters, from, kFilters);
      float* to = filters + (k - filter_begin) * 16 * conv.channels;
      for (int64_t i = 0; i < count; i += kWidth) {
        vec columns[4][3];
        unrolled<3>([&](auto j) {
          const vec g0 = vload(from + j * count + i), g1 = vload(from + (3 + j) * count + i);
          const vec g2 = vload(from + (6 + j) * count + i);
          const vec even = (g0 + g2) * 0.5f, odd = g1 * 0.5f;
          columns[0][j] = g0, columns[1][j] = even + odd, columns[2][j] = even - odd, columns[3][j] = g2;
        });
        unrolled<4>([&](auto j) {
          const vec even = (columns[j][0] + columns[j][2]) * 0.5f, odd = columns[j][1] * 0.5f;
          float* row = to + 4 * j * count + i;
          vstore(row, columns[j][0]);
          vstore(row + count, even + odd);
          vstore(row + 2 * count, even - odd);
          vstore(row + 3 * count, columns[j][2]);
        });
      }
    }
  }

  // The image, row and column of a tile's first output.
  void place(int64_t tile, int64_t& image, int64_t& row, int64_t& column) const {
    image = tile / (plan.tiles_high * plan.tiles_wide);
    row = tile / plan.tiles_wide % plan.tiles_high * 2;
    column = tile % plan.tiles_wide * 2;
  }

  // B^T d B of a tile: [16][tile][channel].
  void transform_pixels(int64_t tile, float* to) const {
    static const T outside[kWinogradChannels] = {};
    int64_t image, top, left;
    place(tile, image, top, left);
    top -= conv.padding_h, left -= conv.padding_w;
    const int64_t down = args.input_strides[2], right = args.input_strides[3];
    const T* first = static_cast<const T*>(args.input) + image * args.input_strides[0] + top * down + left * right;
    const T* from[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t row = top + i / 4, column = left + i % 4;
      const bool inside = row >= 0 && column >= 0 && row < conv.height && column < conv.width;
      from[i] = inside ? first + i / 4 * down + i % 4 * right : outside;
    }
    fetch_pixels(first + 4 * down + right, down, right, conv.channels);
    transform_tile(from, conv.channels, to, kTilePixels * plan.channel_words);
  }

  // products: [16][tile][filter].
  void multiply_group(const float* from, const float* panel, int64_t count) const {
    Tile tile{};
    tile.pixel_bytes = plan.channel_words * 4;
    tile.tap_rows = tile.tap_columns = 1;
    tile.run = conv.channels;
    tile.centre = tile.shift = zeros, tile.scale = ones;
    tile.output_stride = tile.filters = kFilters;
    for (int64_t j = 0; j < 16; ++j)
      for (int64_t i = 0; i < count;) {
        const int64_t now = tile_pixels(count - i), groups = now >= 8 ? 2 : 1, rows = now / groups;
        const float* first = from + (j * kTilePixels + i) * plan.channel_words;
        tile.pixels[0] = reinterpret_cast<const char*>(first);
        tile.pixels[1] = reinterpret_cast<const char*>(first + rows * plan.channel_words);
        tile.panel = panel + j * conv.channels * kFilters;
        tile.output = products + (j * kTilePixels + i) * kFilters;
        multiply<float, Floats>(tile, kFilters, groups, rows);
        i += now;
      }
  }

  // A^T m A, and the epilogue, of the filters [k, k + kFilters).
  void finish(int64_t tile, const float* from, int64_t k) const {
    int64_t image, top, left;
    place(tile, image, top, left);
    const int64_t stride = kTilePixels * kFilters;
    vec outputs[2][2][NV], check = {};
    unrolled<NV>([&](auto v) {
      vec sums[2][4];
      unrolled<4>([&](auto j) {
        const float* column = from + j * stride + v * kWidth;
        const vec m0 = vload(column), m1 = vload(column + 4 * stride);
        const vec m2 = vload(column + 8 * stride), m3 = vload(column + 12 * stride);
        sums[0][j] = m0 + m1 + m2, sums[1][j] = m1 - m2 - m3;
      });
      unrolled<2>([&](auto r) {
        outputs[r][0][v] = sums[r][0] + sums[r][1] + sums[r][2];
        outputs[r][1][v] = sums[r][1] - sums[r][2] - sums[r][3];
        check += (outputs[r][0][v] + outputs[r][1][v]) * 0.0f;  // NaN where one of them is not finite
      });
    });
    bool finite = true;
    for (int64_t lane = 0; lane < kWidth; ++lane) finite &= check[lane] == 0.0f;
    unrolled<2>([&](auto r) {
      unrolled<2>([&](auto o) {
        if (top + r >= conv.out_height || left + o >= conv.out_width) return;
        const int64_t pixel = (image * conv.out_height + top + r) * conv.out_width + left + o;
        if (finite)
          store_output(pixel, k, outputs[r][o]);
        else
          multiply_directly(pixel, k);
      });
    });
  }

  RESFUSE_INLINE void store_output(int64_t pixel, int64_t k, const vec (&sums)[NV]) const {
    const int64_t at = pixel * conv.filters + k, local = k - filter_begin;
    unrolled<NV>([&](auto v) {
      const int64_t f = v * kWidth;
      const vec centre = vload(vectors.centre + local + f), scale = vload(vectors.scale + local + f);
      vec value = (sums[v] - centre) * scale + vload(vectors.shift + local + f);
      if (args.residual != nullptr) value += vload(static_cast<const T*>(args.residual) + at + f);
      vstore(static_cast<T*>(args.output) + at + f, args.relu ? vrelu(value) : value);
    });
  }

  __attribute__((noinline)) void multiply_directly(int64_t pixel, int64_t k) const {
    const int64_t at = pixel * conv.filters + k, local = k - filter_begin;
    copy_window<Floats>(args, direct, static_cast<const T*>(args.input), pixel, window);
    Tile tile{};
    tile.pixels[0] = tile.pixels[1] = reinterpret_cast<const char*>(window);
    tile.panel = taps + local * 9 * conv.channels;
    tile.tap_rows = tile.tap_columns = 1;
    tile.run = 9 * conv.channels;
    tile.centre = vectors.centre + local, tile.scale = vectors.scale + local, tile.shift = vectors.shift + local;
    tile.output = static_cast<T*>(args.output) + at;
    tile.residual = args.residual != nullptr ? static_cast<const T*>(args.residual) + at : nullptr;
    tile.output_stride = tile.residual_stride = conv.filters;
    tile.filters = tile.residual_filters = kFilters;
    tile.relu = args.relu;
    multiply<T, Floats>(tile, kFilters, 1, 1);
  }
};

template <class T, int64_t NV>
void conv_winograd(const ConvForward& args, const WinogradPlan& plan, int64_t threads) {
  const ConvPlan direct = plan_conv(args, 1, false, 1);
  const int64_t workers = std::min(threads, plan.blocks * plan.chunks);
  SharedFilters shared(workers > 1 && plan.blocks == 1 ? args.conv.filters / plan.panel : 0);
  share_units(workers, plan.scratch_bytes(), [&](char* scratch, char* first, std::atomic<int64_t>& next) {
    WinogradWorker<T, NV>(args, plan, direct, scratch).run(next, shared, first);
  });
}

template <class T>
void conv_winograd(const ConvForward& args) {
  const int64_t threads = conv_threads(args.conv);
  const WinogradPlan plan = plan_winograd(args, threads);
  plan.panel == kPanel ? conv_winograd<T, kPanelVectors>(args, plan, threads)
                       : conv_winograd<T, 1>(args, plan, threads);
}
