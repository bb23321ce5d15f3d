// A convolution with max pooling behind it, as in a ResNet's stem: the convolution's output, the largest tensor of such
// a network, stays in the cache, some rows at a time.

constexpr int64_t kPoolBandBytes = 384 << 10;  // of the rows between convolution and pooling

// The elements of a dimension that a window reads: [begin, end).
struct Extent {
  int64_t begin, end;

  Extent(const PoolAxis& axis, int64_t out) {
    const Window window(axis, out);
    begin = window.start + window.first * axis.dilation;
    end = window.start + (window.last - 1) * axis.dilation + 1;
  }
};

// The maximum of each window of one row; NaN where one of its values is NaN, as in PyTorch.
template <class T>
void pool_row(const Pooling& pool, const T* input, int64_t row, T* output) {
  const PoolAxis &rows = pool.rows, &columns = pool.columns;
  const Extent high(rows, row);
  for (int64_t column = 0; column < columns.out; ++column, output += pool.channels) {
    const Extent wide(columns, column);
    each_register(pool.channels, [=](int64_t c, auto lanes) __attribute__((always_inline)) {
      vec most = splat(-std::numeric_limits<float>::infinity());
      for (int64_t i = high.begin; i < high.end; i += rows.dilation)
        for (int64_t j = wide.begin; j < wide.end; j += columns.dilation) {
          const vec value = read(input + (i * columns.size + j) * pool.channels + c, lanes);
          most = value > most ? value : most;
          most = value != value ? value : most;
        }
      write(output + c, most, lanes);
    });
  }
}

// Runs of rows of the pooled output, each of one image.
template <class T, class Mul>
struct PoolWorker {
  const Pooling& pool;
  ConvForward args;  // writes to `band`
  ConvWorker<T, Mul> conv;
  T* const output;
  T* const band;
  const int64_t band_rows, row_elements;

  PoolWorker(const ConvForward& all, const Pooling& pool, const ConvPlan& plan, int64_t band_rows, char* scratch)
      : pool(pool),
        args(all),
        conv(args, plan, 1, scratch, nullptr),
        output(static_cast<T*>(all.output)),
        band(reinterpret_cast<T*>(scratch + plan.scratch_bytes())),
        band_rows(band_rows),
        row_elements(all.conv.out_width * all.conv.filters) {}

  void run(int64_t image, int64_t first, int64_t last) {
    const PoolAxis& rows = pool.rows;
    const auto top = [&](int64_t row) { return std::max<int64_t>(0, row * rows.stride - rows.padding); };
    const auto bottom = [&](int64_t row) {
      return std::min(rows.size, row * rows.stride - rows.padding + (rows.kernel - 1) * rows.dilation + 1);
    };
    int64_t kept = top(first), computed = kept;  // the band has the rows [kept, computed)
    for (int64_t row = first; row < last; ++row) {
      if (bottom(row) > computed) {
        const int64_t needed = top(row);
        computed = std::max(computed, needed);  // strides may pass over rows
        std::memmove(band, band + (needed - kept) * row_elements, (computed - needed) * row_elements * sizeof(T));
        kept = needed;
        const int64_t count = std::min(bottom(last - 1), kept + band_rows) - computed;
        args.output = band - (image * pool.rows.size + kept) * row_elements;
        conv.run_block(image, computed, count);
        computed += count;
      }
      pool_row(pool, band - kept * row_elements, row,
               output + (image * pool.rows.out + row) * pool.columns.out * pool.channels);
    }
  }
};

template <class T, class Mul>
bool conv_pool(const ConvForward& args, const Pooling& pool) {
  const Convolution& conv = args.conv;
  const int64_t threads = conv_threads(conv);
  ConvPlan plan = plan_conv(args, Mul::channels, false, threads);
  if (plan.reading != Reading::banded || plan.blocks != 1 || plan.whole || conv.groups != 1 || args.residual != nullptr)
    return false;
  const int64_t row_bytes = conv.out_width * conv.filters * static_cast<int64_t>(sizeof(T));
  const int64_t least = (pool.rows.kernel - 1) * pool.rows.dilation + 1 + pool.rows.stride;
  const int64_t band_rows = std::max(least, kPoolBandBytes / row_bytes);
  const int64_t high = (band_rows - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1;
  plan.input_bytes = high * plan.band_width * plan.pixel_words * 4 + 256;
  // Parts of an image compute some rows twice: no more of them than keep the threads busy.
  const int64_t parts = std::min(pool.rows.out, ceil_div(2 * threads, conv.batch));
  const int64_t units = conv.batch * parts, bytes = plan.scratch_bytes() + band_rows * row_bytes + 64;
  share_units(std::min(threads, units), bytes, [&](char* scratch, char*, std::atomic<int64_t>& next) {
    PoolWorker<T, Mul> worker(args, pool, plan, band_rows, scratch);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
      worker.run(unit / parts, part_begin(pool.rows.out, parts, unit % parts),
                 part_begin(pool.rows.out, parts, unit % parts + 1));
  });
  return true;
}
