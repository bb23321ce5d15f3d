// The gradient of the weight of a 3x3 convolution of stride 1, by the transposition of conv_winograd.inl.
//
// With the transformed pixels U = B^T d B of a tile, and the gradient g of its 2x2 outputs, a filter's gradient is
//   G^T (sum of U * (A g A^T) over all tiles) G,
// sixteen products of matrices, (filters x tiles) (tiles x channels): 4 multiplications for each output, not 9.
//
// Work is cut into units of (block of filters) x (block of channels) x (chunk of tiles).  Chunks depend on the shape
// alone, and their sums are added in order, so that the result does not depend on the number of threads.

constexpr int64_t kGradBlock = 64;  // filters, and channels, of a unit
constexpr int64_t kGradTiles = 32;  // that are transformed at once
constexpr int64_t kGradUnits = 16;  // at least, where there are tiles enough

struct WeightGradPlan {
  int64_t tiles_high, tiles_wide, tiles, runs;  // a run is kGradTiles tiles
  int64_t block_filters, block_channels, channel_blocks, blocks, chunks;
  int64_t sums, inputs, grads;  // floats

  explicit WeightGradPlan(const Convolution& conv) {
    tiles_high = ceil_div(conv.out_height, 2), tiles_wide = ceil_div(conv.out_width, 2);
    tiles = conv.batch * tiles_high * tiles_wide;
    runs = ceil_div(tiles, kGradTiles);
    block_filters = std::min(conv.filters, kGradBlock), block_channels = std::min(conv.channels, kGradBlock);
    channel_blocks = ceil_div(conv.channels, block_channels);
    blocks = ceil_div(conv.filters, block_filters) * channel_blocks;
    chunks = std::min(runs, ceil_div(kGradUnits, blocks));
    sums = 16 * block_filters * block_channels;
    // Of one product: not a multiple of 4 KB, where all sixteen would share the sets of the L1 cache.
    inputs = kGradTiles * block_channels + 16, grads = kGradTiles * block_filters + 16;
  }
  int64_t scratch() const { return 16 * (inputs + grads); }
};

template <class T>
class WeightGradWorker {
 public:
  WeightGradWorker(const ConvWeightGrad& args, const WeightGradPlan& plan, float* scratch)
      : args(args), plan(plan), inputs(scratch), grads(scratch + 16 * plan.inputs) {}

  void choose(int64_t block) {
    k = block / plan.channel_blocks * plan.block_filters, c = block % plan.channel_blocks * plan.block_channels;
    filters = std::min(plan.block_filters, conv.filters - k);
    channels = std::min(plan.block_channels, conv.channels - c);
  }

  // [16][filter][channel], of the tiles of a chunk.
  void add_up(int64_t chunk, float* sums) const {
    std::fill(sums, sums + plan.sums, 0.0f);
    const int64_t last = std::min(plan.tiles, part_begin(plan.runs, plan.chunks, chunk + 1) * kGradTiles);
    for (int64_t tile = part_begin(plan.runs, plan.chunks, chunk) * kGradTiles; tile < last; tile += kGradTiles) {
      const int64_t count = std::min(kGradTiles, last - tile);
      transform(tile, count);
      for (int64_t product = 0; product < 16; ++product) multiply(product, count, sums);
    }
  }

  // Writes the gradients of kWidth filters of the block, from `row` on, from the sums of all chunks; false if one is
  // not finite.
  bool finish(int64_t row, const float* sums) const {
    vec check = {};
    for (int64_t i = row; i < std::min(row + kWidth, filters); ++i)
      for (int64_t channel = 0; channel < channels; channel += kWidth) {
        vec totals[16];
        unrolled<16>([&](auto product) {
          const float* from = sums + (product * plan.block_filters + i) * plan.block_channels + channel;
          totals[product] = vload(from);
          for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) totals[product] += vload(from + chunk * plan.sums);
        });
        check += write_filter(k + i, c + channel, totals);
      }
    bool finite = true;
    for (int64_t lane = 0; lane < kWidth; ++lane) finite &= check[lane] == 0.0f;
    return finite;
  }

 private:
  const ConvWeightGrad& args;
  const WeightGradPlan& plan;
  const Convolution& conv = args.conv;
  float *inputs, *grads;                            // [16][tile][channel, or filter]
  int64_t k = 0, c = 0, filters = 0, channels = 0;  // of the block

  void transform(int64_t tile, int64_t count) const {
    int64_t image = tile / (plan.tiles_high * plan.tiles_wide);
    int64_t row = tile / plan.tiles_wide % plan.tiles_high, column = tile % plan.tiles_wide;
    for (int64_t i = 0; i < count; ++i) {
      transform_input(image, 2 * row - conv.padding_h, 2 * column - conv.padding_w, inputs + i * plan.block_channels);
      transform_grad(image, 2 * row, 2 * column, grads + i * plan.block_filters);
      if (++column < plan.tiles_wide) continue;
      column = 0;
      if (++row == plan.tiles_high) row = 0, ++image;
    }
  }

  void transform_input(int64_t image, int64_t top, int64_t left, float* to) const {
    static const T zeros[kGradBlock] = {};
    const T* outside = zeros;
    const T* first =
        static_cast<const T*>(args.input) + c + ((image * conv.height + top) * conv.width + left) * conv.channels;
    const int64_t down = conv.width * conv.channels;
    const T* pixels[16];
    unrolled<4>([&](auto r) {
      unrolled<4>([&](auto s) {
        const bool inside = top + r >= 0 && top + r < conv.height && left + s >= 0 && left + s < conv.width;
        pixels[4 * r + s] = inside ? first + r * down + s * conv.channels : outside;
      });
    });
    fetch_pixels(first + 4 * down + conv.channels, down, conv.channels, channels);
    transform_tile(pixels, channels, to, plan.inputs);
  }

  // A g A^T
  void transform_grad(int64_t image, int64_t top, int64_t left, float* to) const {
    const int64_t down = conv.out_width * conv.filters;
    const T* upper =
        static_cast<const T*>(args.grad_output) + k + (image * conv.out_height + top) * down + left * conv.filters;
    const bool has_lower = top + 1 < conv.out_height, has_right = left + 1 < conv.out_width;
    fetch_pixels(upper + 2 * down, down, conv.filters, filters);
    for (int64_t i = 0; i < filters; i += kWidth) {
      vec rows[4][2];
      unrolled<2>([&](auto j) {
        const bool there = j == 0 || has_right;
        const vec g0 = there ? vload(upper + j * conv.filters + i) : vec{};
        const vec g1 = there && has_lower ? vload(upper + down + j * conv.filters + i) : vec{};
        rows[0][j] = g0, rows[1][j] = g0 + g1, rows[2][j] = g0 - g1, rows[3][j] = -g1;
      });
      unrolled<4>([&](auto j) {
        float* row = to + 4 * j * plan.grads + i;
        vstore(row, rows[j][0]);
        vstore(row + plan.grads, rows[j][0] + rows[j][1]);
        vstore(row + 2 * plan.grads, rows[j][0] - rows[j][1]);
        vstore(row + 3 * plan.grads, -rows[j][1]);
      });
    }
  }

  void multiply(int64_t product, int64_t count, float* sums) const {
    const float *input = inputs + product * plan.inputs, *grad = grads + product * plan.grads;
    sums += product * plan.block_filters * plan.block_channels;
    const int64_t full = channels / kPanel * kPanel;
    for (int64_t i = 0; i < filters; i += kWidth / kPanelVectors)
      for (int64_t j = 0; j < full; j += kPanel)
        multiply_rows<kPanelVectors>(input + j, grad + i, count, sums + i * plan.block_channels + j);
    for (int64_t i = 0; full < channels && i < filters; i += kWidth)
      multiply_rows<1>(input + full, grad + i, count, sums + i * plan.block_channels + full);
  }

  // kWidth / NV filters, NV x kWidth channels; sums of sums lose less to rounding than one long sum.
  template <int64_t NV>
  void multiply_rows(const float* input, const float* grad, int64_t count, float* to) const {
    constexpr int64_t rows = kWidth / NV;
    vec sums[rows][NV];
    unrolled<rows>([&](auto i) { unrolled<NV>([&](auto v) { sums[i][v] = vec{}; }); });
    for (; count > 0; --count, input += plan.block_channels, grad += plan.block_filters) {
      vec values[NV];
      unrolled<NV>([&](auto v) { values[v] = vload(input + v * kWidth); });
      unrolled<rows>([&](auto i) {
        const vec one = splat(grad[i]);
        unrolled<NV>([&](auto v) { sums[i][v] += one * values[v]; });
      });
    }
    unrolled<rows>([&](auto i) {
      unrolled<NV>([&](auto v) {
        float* at = to + i * plan.block_channels + v * kWidth;
        vstore(at, vload(at) + sums[i][v]);
      });
    });
  }

  // G^T m G, to the gradients of kWidth channels of a filter; what is returned is zero where all are finite.
  vec write_filter(int64_t filter, int64_t channel, const vec (&m)[16]) const {
    const WeightStrides& stride = args.strides;
    T* to = static_cast<T*>(args.grad_weight) + filter * stride.filter + channel * stride.channel;
    const auto times_g = [](vec m0, vec m1, vec m2, vec m3, vec(&out)[3]) __attribute__((always_inline)) {
      const vec even = (m1 + m2) * 0.5f;
      out[0] = m0 + even, out[1] = (m1 - m2) * 0.5f, out[2] = even + m3;
    };
    vec columns[4][3], check = {};
    unrolled<4>([&](auto j) { times_g(m[j], m[4 + j], m[8 + j], m[12 + j], columns[j]); });
    unrolled<3>([&](auto r) {
      vec taps[3];
      times_g(columns[0][r], columns[1][r], columns[2][r], columns[3][r], taps);
      unrolled<3>([&](auto s) {
        check += taps[s] * 0.0f;
        T* at = to + r * stride.row + s * stride.column;
        if (stride.channel == 1) return vstore(at, taps[s]);
        T values[kWidth];
        vstore(values, taps[s]);
        for (int64_t i = 0; i < kWidth; ++i) at[i * stride.channel] = values[i];
      });
    });
    return check;
  }
};

template <class T>
bool conv_weight_grad_typed(const ConvWeightGrad& args) {
  const WeightGradPlan plan(args.conv);
  const int64_t units = plan.blocks * plan.chunks, threads = std::min(conv_threads(args.conv), units);
  const bool whole = plan.chunks == 1;  // a thread needs the sums of a unit only while it works on that
  const int64_t kept = whole ? threads : units, parts = plan.block_filters / kWidth;
  float* sums = reinterpret_cast<float*>(scratch_memory(4 * (kept * plan.sums + threads * plan.scratch())));
  std::atomic<int64_t> next{0}, next_part{0};
  std::atomic<bool> finite{true};
  const auto worker = [&](int64_t thread) {
    return WeightGradWorker<T>(args, plan, sums + kept * plan.sums + thread * plan.scratch());
  };
  run_threads(threads, [&](int64_t thread) {
    WeightGradWorker<T> own = worker(thread);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      float* to = sums + (whole ? thread : unit) * plan.sums;
      own.choose(unit / plan.chunks);
      own.add_up(unit % plan.chunks, to);
      for (int64_t part = 0; whole && part < parts; ++part)
        if (!own.finish(part * kWidth, to)) finite = false;
    }
  });
  if (whole) return finite;
  run_threads(threads, [&](int64_t thread) {
    WeightGradWorker<T> own = worker(thread);
    for (int64_t part; (part = next_part.fetch_add(1, std::memory_order_relaxed)) < plan.blocks * parts;) {
      own.choose(part / parts);
      if (!own.finish(part % parts * kWidth, sums + part / parts * plan.chunks * plan.sums)) finite = false;
    }
  });
  return finite;
}

bool conv_weight_grad(const ConvWeightGrad& args) {
  return with_type(args.conv.dtype,
                   [&](auto* type) { return conv_weight_grad_typed<std::remove_pointer_t<decltype(type)>>(args); });
}
