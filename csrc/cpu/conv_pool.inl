// A convolution with max pooling behind it, as in a ResNet's stem: the convolution's output, the largest tensor of such
// a network, stays in the cache, some rows at a time.

constexpr int64_t kPoolBandBytes = 384 << 10;  // of the rows between convolution and pooling

// The output rows that a row of the pooled output reads.
struct PooledRows {
  const Convolution& conv;
  const MaxPool& pool;
  int64_t first(int64_t row) const { return std::max<int64_t>(0, row * pool.stride_h - pool.padding_h); }
  int64_t last(int64_t row) const {
    return std::min(conv.out_height, row * pool.stride_h - pool.padding_h + pool.kernel_h);
  }
};

// The maximum of each window of one row; NaN where one of its values is NaN, as in PyTorch.
template <class T>
void pool_row(const Convolution& conv, const MaxPool& pool, const T* rows, int64_t count, T* output) {
  const int64_t filters = conv.filters, row_elements = conv.out_width * filters;
  for (int64_t column = 0; column < pool.out_width; ++column, output += filters) {
    const int64_t left = column * pool.stride_w - pool.padding_w;
    const int64_t begin = std::max<int64_t>(0, left), end = std::min(conv.out_width, left + pool.kernel_w);
    const auto maxima = [&](int64_t k, auto load) __attribute__((always_inline)) {
      vec most = splat(-std::numeric_limits<float>::infinity());
      for (int64_t row = 0; row < count; ++row)
        for (int64_t i = begin; i < end; ++i) {
          const vec value = load(rows + row * row_elements + i * filters + k);
          most = value > most ? value : most;
          most = value != value ? value : most;
        }
      return most;
    };
    int64_t k = 0;
    for (; k + kWidth <= filters; k += kWidth) vstore(output + k, maxima(k, [](const T* from) { return vload(from); }));
    if (k == filters) continue;
    const size_t bytes = (filters - k) * sizeof(T);
    T last[kWidth] = {};
    vstore(last, maxima(k, [&](const T* from) {
             std::memcpy(last, from, bytes);
             return vload(last);
           }));
    std::memcpy(output + k, last, bytes);
  }
}

// Runs of rows of the pooled output, each of one image.
template <class T, class Mul>
struct PoolWorker {
  const MaxPool& pool;
  const PooledRows rows;
  ConvForward args;  // writes to `band`
  ConvWorker<T, Mul> conv;
  T* const output;
  T* const band;
  const int64_t band_rows, row_elements;

  PoolWorker(const ConvForward& all, const MaxPool& pool, const ConvPlan& plan, int64_t band_rows, char* scratch)
      : pool(pool),
        rows{args.conv, pool},
        args(all),
        conv(args, plan, 1, scratch, nullptr),
        output(static_cast<T*>(all.output)),
        band(reinterpret_cast<T*>(scratch + plan.scratch_bytes())),
        band_rows(band_rows),
        row_elements(all.conv.out_width * all.conv.filters) {}

  void run(int64_t image, int64_t first, int64_t last) {
    const Convolution& shape = args.conv;
    int64_t kept = rows.first(first), computed = kept;  // the band has the rows [kept, computed)
    for (int64_t row = first; row < last; ++row) {
      const int64_t needed = rows.first(row), end = rows.last(row);
      if (end > computed) {
        computed = std::max(computed, needed);  // strides may pass over rows
        std::memmove(band, band + (needed - kept) * row_elements, (computed - needed) * row_elements * sizeof(T));
        kept = needed;
        const int64_t count = std::min(rows.last(last - 1), kept + band_rows) - computed;
        args.output = band - (image * shape.out_height + kept) * row_elements;
        conv.run_block(image, computed, count);
        computed += count;
      }
      pool_row(shape, pool, band + (needed - kept) * row_elements, end - needed,
               output + (image * pool.out_height + row) * pool.out_width * shape.filters);
    }
  }
};

template <class T, class Mul>
bool conv_pool(const ConvForward& args, const MaxPool& pool) {
  const Convolution& conv = args.conv;
  const int64_t threads = conv_threads(conv);
  ConvPlan plan = plan_conv(args, Mul::channels, false, threads);
  const int64_t row_bytes = conv.out_width * conv.filters * static_cast<int64_t>(sizeof(T));
  const int64_t band_rows = std::max(pool.kernel_h + pool.stride_h, kPoolBandBytes / row_bytes);
  if (plan.reading != Reading::banded || plan.blocks != 1 || plan.whole || conv.groups != 1 || args.residual != nullptr)
    return false;
  const int64_t high = (band_rows - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1;
  plan.input_bytes = high * plan.band_width * plan.pixel_words * 4 + 256;
  // Parts of an image compute some rows twice: no more of them than keep the threads busy.
  const int64_t parts = std::min(pool.out_height, ceil_div(2 * threads, conv.batch));
  const int64_t units = conv.batch * parts, bytes = plan.scratch_bytes() + band_rows * row_bytes + 64;
  share_units(std::min(threads, units), bytes, [&](char* scratch, std::atomic<int64_t>& next) {
    PoolWorker<T, Mul> worker(args, pool, plan, band_rows, scratch);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
      worker.run(unit / parts, part_begin(pool.out_height, parts, unit % parts),
                 part_begin(pool.out_height, parts, unit % parts + 1));
  });
  return true;
}
