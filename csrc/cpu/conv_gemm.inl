// The general path: implicit GEMM over units of ConvPlan.

// Batch norm and the convolution's bias as (sum - centre) scale + shift, of `count` filters and zeros up to `padded`.
struct EpilogueVectors {
  float *centre, *scale, *shift;

  void fill(const ConvForward& args, int64_t first, int64_t count, int64_t padded) const {
    for (int64_t i = 0; i < padded; ++i) {
      const bool filter = i < count;
      const int64_t k = first + i;
      const float bias = filter && args.conv_bias.data != nullptr ? value_of(args.conv_bias, k) : 0.0f;
      if (!filter || args.running_var.data == nullptr) {
        centre[i] = 0, scale[i] = 1, shift[i] = bias;
        continue;
      }
      const float weight = args.bn_weight.data != nullptr ? value_of(args.bn_weight, k) : 1.0f;
      centre[i] = value_of(args.running_mean, k) - bias;
      scale[i] = static_cast<float>(weight / __builtin_sqrt(value_of(args.running_var, k) + args.eps));
      shift[i] = args.bn_bias.data != nullptr ? value_of(args.bn_bias, k) : 0.0f;
    }
  }
};

// Statistics of each chunk, which are merged in their order: the bits are the same whoever computed them.
struct ConvStatistics {
  const ConvPlan& plan;
  const Convolution& conv;
  const int64_t padded = plan.blocks * plan.block_filters;  // panels reach beyond the filters of a group
  std::vector<double> partial = std::vector<double>(plan.chunks * 2 * conv.groups * padded);

  ChunkStatistics of(int64_t chunk, int64_t group, int64_t filter, int64_t seen) {
    double* mean = partial.data() + (chunk * 2 * conv.groups + group) * padded + filter;
    return {mean, mean + conv.groups * padded, seen};
  }

  void merge_into(double* mean, double* m2) {
    std::fill(mean, mean + conv.filters, 0.0);
    std::fill(m2, m2 + conv.filters, 0.0);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t begin = plan.pixels_before(conv, plan.chunk_begin(chunk));
      const int64_t end = plan.pixels_before(conv, plan.chunk_begin(chunk + 1));
      const Merge merge(static_cast<double>(begin), static_cast<double>(end - begin));
      for (int64_t k = 0; k < conv.filters; ++k) {
        const ChunkStatistics other = of(chunk, k / plan.group_filters, k % plan.group_filters, 0);
        merge(mean[k], m2[k], *other.mean, *other.m2);
      }
    }
  }
};

// The units that one thread takes.
template <class T, class Mul>
struct ConvWorker {
  const ConvForward& args;
  const ConvPlan& plan;
  const Convolution& conv = args.conv;
  const int64_t threads;
  ConvStatistics* const partial_statistics;  // or null
  float *panels, *pixels;
  EpilogueVectors vectors;

  int64_t group = 0, filter_begin = 0, filter_end = 0;   // of the unit; filters of the group
  int64_t packed = -1;                                   // the group and block whose panels are there
  int64_t prepared = -1;                                 // the group whose pixels are there, where plan.whole
  int64_t chunk = 0, chunk_pixels = 0, chunk_pixel = 0;  // the pixels of the chunk, and the next of them
  const T* input = nullptr;                              // at the group's first channel
  struct {
    const char* at;
    int64_t left;
  } ahead[3] = {};
  int64_t aheads = 0;
  bool planned = false;  // what is fetched ahead does not depend on the tile

  ConvWorker(const ConvForward& args, const ConvPlan& plan, int64_t threads, char* scratch,
             ConvStatistics* partial_statistics)
      : args(args), plan(plan), threads(threads), partial_statistics(partial_statistics) {
    panels = reinterpret_cast<float*>(scratch);
    pixels = panels + plan.panel_bytes / 4 + 64;
    vectors.centre = pixels + plan.input_bytes / 4 + 64;
    vectors.scale = vectors.centre + plan.block_filters + kPanel;
    vectors.shift = vectors.scale + plan.block_filters + kPanel;
  }

  void run(std::atomic<int64_t>& next) {
    const int64_t units = plan.units(conv);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      const int64_t block = unit / plan.chunks;  // of all groups
      group = block / plan.blocks;
      filter_begin = block % plan.blocks * plan.block_filters;
      filter_end = std::min(filter_begin + plan.block_filters, plan.group_filters);
      input = static_cast<const T*>(args.input) + group * plan.group_channels * args.input_strides[1];
      if (block != packed) pack(block);
      plan_ahead(block, unit + threads);
      chunk = unit % plan.chunks;
      run_chunk(plan.chunk_begin(chunk), plan.chunk_begin(chunk + 1));
    }
  }

  // Output rows of an image where all filters are one block.
  void run_block(int64_t image, int64_t row, int64_t count) {
    filter_end = plan.group_filters;
    input = static_cast<const T*>(args.input);
    if (packed != 0) pack(0);
    chunk_pixel = 0, chunk_pixels = count * conv.out_width;
    run_rows(image, row, count);
  }

 private:
  // Calls f(filters, number, panel, its width) for each panel of a block.
  template <class F>
  void each_panel(F f) const {
    each_panel(kPanel, f);
  }
  template <class F>
  void each_panel(int64_t most, F f) const {
    for (int64_t k = filter_begin; k < filter_end;) {
      const int64_t left = filter_end - k, filters = std::min(left < most ? kPanel : most, left);
      f(k, filters, panels + (k - filter_begin) * plan.depth,
        filters <= kWidth   ? kWidth
        : filters <= kPanel ? kPanel
                            : most);
      k += filters;
    }
  }

  const char* filter_memory(int64_t of_group, int64_t filter) const {
    const int64_t element = args.weight_dtype == DType::float32 ? 4 : 2;
    return static_cast<const char*>(args.weight) +
           (of_group * args.weight_strides.group + filter * args.weight_strides.filter) * element;
  }

  void pack(int64_t block) {
    each_panel([&](int64_t k, int64_t filters, float* panel, int64_t width) {
      const char* from = filter_memory(group, k);
      if (args.weight_dtype == DType::bfloat16)
        pack_panel<Mul>(args, plan, reinterpret_cast<const bf16*>(from), filters, panel, width);
      else if constexpr (Mul::channels == 1)
        pack_panel<Mul>(args, plan, reinterpret_cast<const float*>(from), filters, panel, width);
    });
    vectors.fill(args, group * plan.group_filters + filter_begin, filter_end - filter_begin,
                 ceil_div(filter_end - filter_begin, kPanel) * kPanel);
    packed = block;
  }

  // While it multiplies, the kernel fetches what comes next to the L2 cache: the filters of another block, or the rows
  // that a later unit of this one copies.
  void plan_ahead(int64_t block, int64_t unit) {
    const int64_t later = unit / plan.chunks;
    planned = false;
    if (later != block) {
      planned = later < conv.groups * plan.blocks && args.weight_strides.filter >= plan.depth;
      if (!planned) return;
      const int64_t first = later % plan.blocks * plan.block_filters;
      const char* from = filter_memory(later / plan.blocks, first);
      const char* to = filter_memory(later / plan.blocks, std::min(first + plan.block_filters, plan.group_filters));
      ahead[0] = {from, to - from};
    } else if (plan.reading == Reading::banded && plan.blocks > 1 && !plan.whole) {
      planned = true;
      const int64_t item = plan.chunk_begin(unit % plan.chunks), in_image = item % plan.items_per_image;
      const int64_t top = std::max<int64_t>(0, in_image * plan.item_rows * conv.stride_h - conv.padding_h);
      const int64_t row = args.input_strides[2] * static_cast<int64_t>(sizeof(T));
      const T* image = input + item / plan.items_per_image * args.input_strides[0];
      ahead[0] = {reinterpret_cast<const char*>(image) + top * row,
                  plan.input_bytes / (plan.band_width * plan.pixel_words * 4) * row};
    }
    aheads = planned;
  }

  // Otherwise what the next tile reads and writes.
  void fetch_next_tile(int64_t pixel) {
    aheads = 0;
    if (chunk_pixel >= chunk_pixels) return;
    const auto add = [&](const void* tensor, int64_t row) {
      const int64_t bytes = row * static_cast<int64_t>(sizeof(T));
      ahead[aheads++] = {static_cast<const char*>(tensor) + pixel * bytes, kTilePixels * bytes};
    };
    if (plan.dense && !plan.whole && conv.groups == 1) add(args.input, args.input_strides[3]);
    if (plan.reading == Reading::direct_rows && conv.groups == 1) {
      const int64_t rows = pixel / conv.out_width, image = rows / conv.out_height, row = rows % conv.out_height;
      const T* from = input + image * args.input_strides[0] + row * conv.stride_h * args.input_strides[2];
      const int64_t bytes = conv.stride_w * args.input_strides[3] * static_cast<int64_t>(sizeof(T));
      ahead[aheads++] = {reinterpret_cast<const char*>(from) + pixel % conv.out_width * bytes, kTilePixels * bytes};
    }
    if (plan.blocks > 1 || conv.groups > 1) return;
    if (args.residual != nullptr) add(args.residual, args.residual_channels);
    add(args.output, conv.filters);
  }

  // One tile times all panels of the block.
  void tile(const void* first, const void* second, int64_t pixel_bytes, int64_t pixel, int64_t groups, int64_t rows) {
    if (!planned) fetch_next_tile(pixel + groups * rows);
    int64_t next = 0;
    Tile tile;
    tile.pixels[0] = static_cast<const char*>(first);
    tile.pixels[1] = static_cast<const char*>(second);
    tile.pixel_bytes = pixel_bytes;
    tile.tap_rows = plan.tap_rows, tile.tap_columns = plan.tap_columns, tile.run = plan.run;
    tile.tap_row_bytes = plan.tap_row_bytes, tile.tap_column_bytes = plan.tap_column_bytes;
    tile.output_stride = conv.filters, tile.residual_stride = args.residual_channels;
    tile.relu = args.relu;
    tile.other_panel = plan.depth * kPanel;
    each_panel(plan.aliases ? 2 * kPanel : kPanel, [&](int64_t k, int64_t filters, const float* panel, int64_t width) {
      const int64_t at = group * plan.group_filters + k, local = k - filter_begin;
      tile.panel = panel;
      tile.centre = vectors.centre + local, tile.scale = vectors.scale + local, tile.shift = vectors.shift + local;
      tile.output = static_cast<T*>(args.output) + pixel * conv.filters + at;
      tile.filters = filters;
      tile.residual_filters = std::clamp<int64_t>(args.residual_channels - at, 0, filters);
      tile.residual = args.residual != nullptr && tile.residual_filters > 0
                          ? static_cast<const T*>(args.residual) + pixel * args.residual_channels + at
                          : nullptr;
      ChunkStatistics here;
      tile.statistics = nullptr;
      if (partial_statistics != nullptr) {
        here = partial_statistics->of(chunk, group, k, chunk_pixel);
        tile.statistics = &here;
      }
      const bool fetch = next < aheads;
      tile.ahead = fetch ? ahead[next].at : reinterpret_cast<const char*>(panel);
      tile.ahead_step = fetch ? 64 : 0;
      multiply<T, Mul>(tile, width, groups, rows);
      if (fetch) {
        ahead[next].at += plan.depth * 64;
        ahead[next].left -= plan.depth * 64;
        if (ahead[next].left <= 0) ++next;
      }
    });
    if (planned && next > 0) aheads = 0;
    chunk_pixel += groups * rows;
  }

  // `count` pixels that are evenly spaced in memory.
  void tiles(const void* first, int64_t pixel_bytes, int64_t pixel, int64_t count) {
    const char* at = static_cast<const char*>(first);
    while (count > 0) {
      const int64_t now = plan.aliases ? std::min(count, kTileRows) : tile_pixels(count);
      const int64_t groups = now >= 8 ? 2 : 1, rows = now / groups;
      tile(at, at + rows * pixel_bytes, pixel_bytes, pixel, groups, rows);
      at += now * pixel_bytes;
      pixel += now;
      count -= now;
    }
  }

  void run_chunk(int64_t first, int64_t last) {
    chunk_pixel = 0;
    if (plan.reading == Reading::banded || plan.reading == Reading::direct_rows) {
      chunk_pixels = plan.pixels_before(conv, last) - plan.pixels_before(conv, first);
      for (int64_t item = first; item < last;) {
        const int64_t image = item / plan.items_per_image, in_image = item % plan.items_per_image;
        const int64_t items = std::min(last - item, plan.items_per_image - in_image);
        const int64_t row = in_image * plan.item_rows;
        run_rows(image, row, std::min(items * plan.item_rows, conv.out_height - row));
        item += items;
      }
      return;
    }
    const int64_t begin = plan.pixels_before(conv, first), end = plan.pixels_before(conv, last);
    chunk_pixels = end - begin;
    if (plan.reading == Reading::direct)
      return tiles(input + begin * args.input_strides[3], args.input_strides[3] * sizeof(T), begin, end - begin);
    for (int64_t pixel = begin; pixel < end; pixel += kTilePixels) {
      const int64_t count = std::min(kTilePixels, end - pixel);
      float* windows = pixels + (plan.whole ? pixel * plan.window_words : 0);
      if (prepared != group)
        for (int64_t i = 0; i < count; ++i)
          copy_window<Mul>(args, plan, input, pixel + i, windows + i * plan.window_words);
      tiles(windows, plan.window_words * 4, pixel, count);
    }
    if (plan.whole) prepared = group;
  }

  // Output rows of an image, one or, where they are short, two at a time.
  void run_rows(int64_t image, int64_t row, int64_t count) {
    const T* from = input + image * args.input_strides[0];
    const char* first = reinterpret_cast<const char*>(from + row * conv.stride_h * args.input_strides[2]);
    int64_t down = conv.stride_h * args.input_strides[2] * static_cast<int64_t>(sizeof(T));
    int64_t right = conv.stride_w * args.input_strides[3] * static_cast<int64_t>(sizeof(T));
    if (plan.reading == Reading::banded) {
      if (prepared != group) copy_band<Mul>(args, plan, from, row, count, pixels);
      if (plan.whole) prepared = group;
      first = reinterpret_cast<const char*>(pixels);
      down = conv.stride_h * plan.band_width * plan.pixel_words * 4;
      right = conv.stride_w * plan.pixel_words * 4;
    }
    const int64_t columns = conv.out_width;
    int64_t pixel = (image * conv.out_height + row) * columns;
    for (int64_t i = 0; i < count;) {
      if (plan.item_rows == 2 && !plan.aliases && count - i >= 2 && columns >= 4) {
        tile(first, first + down, right, pixel, 2, columns);
        i += 2, pixel += 2 * columns, first += 2 * down;
      } else {
        tiles(first, right, pixel, columns);
        ++i, pixel += columns, first += down;
      }
    }
  }
};

// Threads that a convolution is worth.
inline int64_t conv_threads(const Convolution& conv) {
  const int64_t work = conv.batch * conv.out_height * conv.out_width * conv.kernel_h * conv.kernel_w * conv.channels /
                       conv.groups * conv.filters;
  return work < 2 * kSmallestShare ? 1 : std::min<int64_t>(work / kSmallestShare, get_num_threads());
}

// f(scratch, counter of the units that have been taken) for each of so many threads.
template <class F>
void share_units(int64_t threads, int64_t scratch_bytes, const F& f) {
  const int64_t share = ceil_div(scratch_bytes, 4096) * 4096;
  char* scratch = scratch_memory(share * threads);
  std::atomic<int64_t> next{0};
  run_threads(threads, [&](int64_t thread) { f(scratch + thread * share, next); });
}

template <class T, class Mul>
void conv_gemm(const ConvForward& args) {
  const int64_t* strides = args.input_strides;
  // Pairs are read in place where they lie in whole words.
  const bool whole_words =
      strides[0] % Mul::channels == 0 && strides[2] % Mul::channels == 0 && strides[3] % Mul::channels == 0 &&
      args.conv.channels / args.conv.groups % Mul::channels == 0 && reinterpret_cast<uintptr_t>(args.input) % 4 == 0;
  const bool words_in_place = strides[1] == 1 && sizeof(T) * Mul::channels == 4 && whole_words;
  const int64_t wanted = conv_threads(args.conv);
  const ConvPlan plan = plan_conv(args, Mul::channels, words_in_place, wanted);
  const int64_t threads = std::min(wanted, plan.units(args.conv));
  std::optional<ConvStatistics> statistics;
  if (args.statistics != nullptr) statistics.emplace(ConvStatistics{plan, args.conv});
  share_units(threads, plan.scratch_bytes(), [&](char* scratch, std::atomic<int64_t>& next) {
    ConvWorker<T, Mul>(args, plan, threads, scratch, statistics ? &*statistics : nullptr).run(next);
  });
  if (statistics) statistics->merge_into(args.statistics, args.statistics + args.conv.filters);
}
