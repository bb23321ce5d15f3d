// How a convolution is cut up.
//
// Work is cut into units of (group) x (block of filters) x (chunk of pixels), which threads take one after another: a
// thread that something else slows down takes fewer.  The filters of a block are packed when a thread first needs them,
// into panels [reduction][filter] that stay in its L2 cache while it walks over pixels.  A tile of pixels keeps the
// whole reduction in registers, so that the epilogue is applied once, and no partial sums go to memory.

constexpr int64_t kTileRows = 7, kTilePixels = 2 * kTileRows;  // pixels of a tile: two groups, each evenly spaced

// How the pixels of a tile are read.
enum class Reading {
  direct_rows,  // in place, a row of the output at a time
  direct,       // in place, all pixels of the tensor evenly spaced
  banded,       // from a zero-padded copy of the input rows that a chunk reads
  gathered,     // from copies of the windows of a tile
};

struct ConvPlan {
  Reading reading;
  bool whole;    // few pixels: a thread prepares all of them once and then walks over filters
  bool aliases;  // read in place, pixels share the sets of the L1 cache: tiles are of few pixels and two panels
  bool dense;    // 1x1 without stride or padding on an input whose pixels are evenly spaced in memory
  int64_t group_channels, group_filters, channel_words, depth;  // depth: words of the reduction
  int64_t pixels;
  int64_t block_filters, blocks;
  int64_t item_pixels, item_rows, items_per_image, items, chunks;       // a chunk is a run of items
  int64_t pixel_words, band_width, window_words;                        // scratch: of a pixel, a row, a window
  int64_t tap_rows, tap_columns, tap_row_bytes, tap_column_bytes, run;  // the reduction: runs of words
  int64_t panel_bytes, input_bytes;

  int64_t units(const Convolution& conv) const { return conv.groups * blocks * chunks; }
  int64_t chunk_begin(int64_t chunk) const { return part_begin(items, chunks, chunk); }
  // Pixels of the output before an item.
  int64_t pixels_before(const Convolution& conv, int64_t item) const {
    if (items_per_image == 0) return std::min(item * item_pixels, pixels);
    const int64_t row = std::min(item % items_per_image * item_rows, conv.out_height);
    return (item / items_per_image * conv.out_height + row) * conv.out_width;
  }
  int64_t scratch_bytes() const { return panel_bytes + input_bytes + 3 * 4 * (block_filters + kPanel) + 4096; }
};

// The parts of a processor's L2 cache that panels, bands and a whole small input may fill.
struct CacheShares {
  int64_t panels, band, whole;
  explicit CacheShares(int64_t l2) : panels(l2 * 5 / 8), band(l2 * 3 / 16), whole(l2 * 7 / 16) {}
};

// `words_in_place`: the words of the reduction lie in the input as the kernel reads them.
inline ConvPlan plan_conv(const ConvForward& args, int64_t channels_per_word, bool words_in_place, int64_t threads) {
  const Convolution& conv = args.conv;
  const CacheShares cache(l2_cache_bytes());
  const bool keeps_statistics = args.statistics != nullptr;
  // Statistics are merged chunk by chunk: for the same bits with any number of threads, chunks do not depend on it.
  const int64_t sharers = keeps_statistics ? 16 : threads;
  ConvPlan plan{};
  const int64_t rows = conv.out_height, columns = conv.out_width;
  const bool pointwise = conv.kernel_h == 1 && conv.kernel_w == 1 && conv.padding_h == 0 && conv.padding_w == 0;
  plan.group_channels = conv.channels / conv.groups;
  plan.group_filters = conv.filters / conv.groups;
  plan.channel_words = ceil_div(plan.group_channels, channels_per_word);
  plan.depth = conv.kernel_h * conv.kernel_w * plan.channel_words;
  plan.pixels = conv.batch * rows * columns;

  const int64_t column_stride = args.input_strides[3], element = conv.dtype == DType::float32 ? 4 : 2;
  plan.dense = pointwise && conv.stride_h == 1 && conv.stride_w == 1 &&
               args.input_strides[2] == conv.width * column_stride &&
               args.input_strides[0] == conv.height * args.input_strides[2];
  // Pixels that lie a multiple of 4 KB apart share the sets of the L1 cache, which holds seven, but not fourteen.
  plan.aliases = column_stride * conv.stride_w * element % 4096 == 0;
  const bool tall = kWidth == 16 && plan.group_filters % (2 * kPanel) == 0;
  const bool in_place = words_in_place && pointwise && (!plan.aliases || tall);
  plan.aliases &= in_place;
  if (in_place && plan.dense)
    plan.reading = Reading::direct;
  else if (in_place && columns > 3)
    plan.reading = Reading::direct_rows;
  else if (pointwise || columns <= 3)
    plan.reading = Reading::gathered;
  else
    plan.reading = Reading::banded;
  const bool by_rows = plan.reading == Reading::banded || plan.reading == Reading::direct_rows;

  plan.window_words = plan.depth + 16;
  plan.pixel_words = plan.channel_words >= 256 ? plan.channel_words + 16 : plan.channel_words;
  plan.band_width = (columns - 1) * conv.stride_w + (conv.kernel_w - 1) * conv.dilation_w + 1;
  plan.tap_rows = plan.tap_columns = 1;
  plan.run = plan.depth;
  if (plan.reading == Reading::banded) {
    plan.tap_rows = conv.kernel_h;
    plan.tap_row_bytes = conv.dilation_h * plan.band_width * plan.pixel_words * 4;
    const bool one_run = plan.pixel_words == plan.channel_words && conv.dilation_w == 1;
    plan.tap_columns = one_run ? 1 : conv.kernel_w;
    plan.tap_column_bytes = conv.dilation_w * plan.pixel_words * 4;
    plan.run = one_run ? conv.kernel_w * plan.channel_words : plan.channel_words;
  }
  const auto band_bytes = [&](int64_t output_rows) {
    const int64_t high = (output_rows - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1;
    return high * plan.band_width * plan.pixel_words * 4 + 256;
  };
  const int64_t all_bytes = plan.reading == Reading::banded     ? band_bytes(rows)
                            : plan.reading == Reading::gathered ? (plan.pixels + kTilePixels) * plan.window_words * 4
                                                                : 0;

  const int64_t panels = ceil_div(plan.group_filters, kPanel), granule = plan.aliases ? 2 * kPanel : kPanel;
  const int64_t most = std::max(granule, cache.panels / (plan.depth * 4) / granule * granule);
  plan.item_rows = by_rows ? columns <= kTileRows ? 2 : 1 : 0;
  plan.items_per_image = by_rows ? ceil_div(rows, plan.item_rows) : 0;
  plan.item_pixels = by_rows ? 0 : kTilePixels;
  plan.items = by_rows ? conv.batch * plan.items_per_image : ceil_div(plan.pixels, kTilePixels);
  plan.whole = plan.pixels <= 256 && panels * conv.groups >= 2 * sharers && all_bytes <= cache.whole &&
               (!by_rows || conv.batch == 1) && !keeps_statistics;
  if (plan.whole) {
    plan.block_filters = granule;
    while (plan.block_filters * 2 <= most && plan.pixels * plan.depth * plan.block_filters < 2000000 &&
           plan.group_filters * conv.groups / (plan.block_filters * 2) >= 2 * sharers)
      plan.block_filters *= 2;
    plan.chunks = 1;
    plan.input_bytes = all_bytes;
  } else {
    const int64_t blocks = ceil_div(plan.group_filters, most);
    plan.block_filters = ceil_div(ceil_div(plan.group_filters, blocks), granule) * granule;
    int64_t chunks =
        std::max(ceil_div(4 * sharers, conv.groups), plan.pixels * plan.depth * plan.block_filters / 12000000);
    if (plan.reading == Reading::banded) {
      const int64_t row_bytes = plan.band_width * plan.pixel_words * 4;
      const int64_t high = (conv.kernel_h - 1) * conv.dilation_h + 1;
      const int64_t band_rows = std::max<int64_t>(1, (cache.band / row_bytes - high) / conv.stride_h + 1);
      chunks = std::max(chunks, conv.batch * rows / band_rows);
    }
    if (keeps_statistics) chunks = std::min<int64_t>(chunks, 256);
    plan.chunks = std::min(ceil_div(chunks, sharers) * sharers, plan.items);
    const int64_t chunk_rows = std::min(rows, ceil_div(plan.items, plan.chunks) * plan.item_rows);
    plan.input_bytes = plan.reading == Reading::banded     ? band_bytes(chunk_rows)
                       : plan.reading == Reading::gathered ? kTilePixels * plan.window_words * 4
                                                           : 0;
  }
  plan.blocks = ceil_div(plan.group_filters, plan.block_filters);
  plan.panel_bytes = plan.block_filters * plan.depth * 4;
  return plan;
}
