// Batch norm + residual + ReLU, forward and backward, for NHWC ("rows" of C channels) and NCHW ("planes" of one
// channel).
//
// Traffic in training: forward reads the input twice (statistics, apply) and the residual once, writes the output once.
// Backward reads grad_output and input twice and writes grad_input; the ReLU's mask comes from the input.  With a
// residual it comes from the output, which the first pass reads, and this writes g = masked grad_output, which is the
// residual's gradient and which the second pass reads in place of grad_output.
//
// Every sum runs over tiles of at most 32 rows that fit the L2 cache, in float; tiles are merged in double.  The
// partition into tiles and chunks depends on the shape alone, so results do not depend on the number of threads.

constexpr int64_t kTileBytes = 128 * 1024;
constexpr int64_t kMaxChunks = 64;

struct Tiling {
  int64_t rows, channels;
  int64_t tile_rows, chunk_rows, chunks;

  explicit Tiling(const Activation& shape) : rows(shape.batch * shape.pixels), channels(shape.channels) {
    const int64_t fitting = kTileBytes / (channels * static_cast<int64_t>(sizeof(float)));
    tile_rows = fitting < 8 ? 8 : fitting > 32 ? 32 : fitting;
    const int64_t tiles = ceil_div(rows, tile_rows);
    chunk_rows = ceil_div(tiles, tiles < kMaxChunks ? tiles : kMaxChunks) * tile_rows;
    chunks = ceil_div(rows, chunk_rows);
  }
  int64_t chunk_begin(int64_t chunk) const { return chunk * chunk_rows; }
  int64_t chunk_end(int64_t chunk) const { return chunk + 1 < chunks ? (chunk + 1) * chunk_rows : rows; }
};

// Calls f(begin, end) for each tile of a chunk.
template <class F>
RESFUSE_INLINE void each_tile(const Tiling& tiling, int64_t chunk, F f) {
  const int64_t end = tiling.chunk_end(chunk);
  for (int64_t row = tiling.chunk_begin(chunk); row < end; row += tiling.tile_rows)
    f(row, row + tiling.tile_rows < end ? row + tiling.tile_rows : end);
}

// Merges (count, mean, m2) of two sets of values: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise
// algorithm for computing sample variances".  The counts are those of all channels, so the divisions are done once.
struct Merge {
  double share, cross;  // of the other set's mean, of the squared difference of the means

  Merge(double count, double other_count)
      : share(other_count / (count + other_count)), cross(count * other_count / (count + other_count)) {}

  RESFUSE_INLINE void operator()(double& mean, double& m2, double other_mean, double other_m2) const {
    const double delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * delta * cross;
  }
};

// Sums over the rows [begin, end) of a tile, R rows at a time: f(offset of the element, channel, lanes, terms) gives
// the N terms of an element, `sums` holds N vectors.  More rows save loads and stores of the sums, which lie in the L1
// cache; but every row of every tensor is a stream, and beyond about four streams the hardware prefetches no longer.
template <int64_t N, int64_t R, class F>
RESFUSE_INLINE void add_rows(int64_t channels, int64_t begin, int64_t end, float* sums, F f) {
  const auto add = [&](int64_t row, auto rows) __attribute__((always_inline)) {
    each_block(channels, [&](int64_t c, auto lanes) {
      f32x16 terms[decltype(rows)::value][N];
      for (int64_t r = 0; r < decltype(rows)::value; ++r) f((row + r) * channels + c, c, lanes, terms[r]);
      for (int64_t n = 0; n < N; ++n) {
        f32x16 sum = terms[0][n];
        for (int64_t r = 1; r < decltype(rows)::value; ++r) sum += terms[r][n];
        store(sums + n * channels + c, load(sums + n * channels + c, lanes) + sum, lanes);
      }
    });
  };
  int64_t row = begin;
  for (; row + R <= end; row += R) add(row, std::integral_constant<int64_t, R>{});
  for (; row < end; ++row) add(row, std::integral_constant<int64_t, 1>{});
}

// One pass.  A tile's deviations are taken from the mean of what the chunk has seen before it (the first tile's from
// its own first estimate), so that their squares do not cancel: with f the fraction of the values seen, the centre is
// off by at most sigma / sqrt(f (1 - f)).
template <class T>
void statistics_rows(const Activation& shape, const T* input, double* mean, double* m2) {
  const Tiling tiling(shape);
  const int64_t channels = shape.channels;
  std::vector<double> partial(2 * tiling.chunks * channels);
  parallel_for(0, tiling.chunks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> buffer(3 * channels);
    float *centre = buffer.data(), *sums = centre + channels;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double *chunk_mean = partial.data() + 2 * chunk * channels, *chunk_m2 = chunk_mean + channels;
      double seen = 0;
      each_tile(tiling, chunk, [&](int64_t begin, int64_t end) {
        const double count = static_cast<double>(end - begin), inverse = 1.0 / count;
        const Merge merge(seen, count);
        std::fill(buffer.begin(), buffer.end(), 0.0f);
        if (seen == 0) {
          add_rows<1, 4>(channels, begin, end, centre,
                         [&](int64_t i, int64_t, auto lanes, f32x16* terms) { terms[0] = load(input + i, lanes); });
          for (int64_t c = 0; c < channels; ++c) centre[c] *= static_cast<float>(inverse);
        } else {
          for (int64_t c = 0; c < channels; ++c) centre[c] = static_cast<float>(chunk_mean[c]);
        }
        add_rows<2, 4>(channels, begin, end, sums, [&](int64_t i, int64_t c, auto lanes, f32x16* terms) {
          terms[0] = load(input + i, lanes) - load(centre + c, lanes);
          terms[1] = terms[0] * terms[0];
        });
        for (int64_t c = 0; c < channels; ++c) {
          const double deviation = sums[c] * inverse;
          merge(chunk_mean[c], chunk_m2[c], centre[c] + deviation, sums[channels + c] - sums[c] * deviation);
        }
        seen += count;
      });
    }
  });
  std::fill(mean, mean + channels, 0.0);
  std::fill(m2, m2 + channels, 0.0);
  for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk) {
    const double *chunk_mean = partial.data() + 2 * chunk * channels, *chunk_m2 = chunk_mean + channels;
    const Merge merge(static_cast<double>(tiling.chunk_begin(chunk)),
                      static_cast<double>(tiling.chunk_end(chunk) - tiling.chunk_begin(chunk)));
    for (int64_t c = 0; c < channels; ++c) merge(mean[c], m2[c], chunk_mean[c], chunk_m2[c]);
  }
}

// f(plane offset, end) for tiles of each plane of one channel.
template <class F>
RESFUSE_INLINE void each_plane_tile(const Activation& shape, int64_t channel, F f) {
  constexpr int64_t tile = 1024;  // 64 additions to each of the sixteen lanes
  for (int64_t image = 0; image < shape.batch; ++image) {
    const int64_t plane = (image * shape.channels + channel) * shape.pixels;
    for (int64_t i = 0; i < shape.pixels; i += tile)
      f(plane + i, plane + (i + tile < shape.pixels ? i + tile : shape.pixels));
  }
}

RESFUSE_INLINE double total(f32x16 lanes) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// sum of f(offset, lanes) over [begin, end); f must return 0 in lanes beyond the end.
template <class F>
RESFUSE_INLINE double sum_range(int64_t begin, int64_t end, F f) {
  f32x16 even = {}, odd = {};
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    even += f(i, Full{});
    odd += f(i + kLanes, Full{});
  }
  each_block(end - i, [&](int64_t offset, auto lanes) { even += f(i + offset, lanes); });
  return total(even + odd);
}

RESFUSE_INLINE f32x16 keep(f32x16 value, Full) { return value; }
RESFUSE_INLINE f32x16 keep(f32x16 value, Part part) {
  f32x16 kept = {};
  __builtin_memcpy(&kept, &value, part.lanes * sizeof(float));
  return kept;
}

template <class T>
void statistics_planes(const Activation& shape, const T* input, double* mean, double* m2) {
  parallel_for(0, shape.channels, ceil_div(kGrain, shape.batch * shape.pixels), [&](int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; ++channel) {
      double count = 0;
      mean[channel] = m2[channel] = 0;
      each_plane_tile(shape, channel, [&](int64_t begin, int64_t end) {
        const double tile = static_cast<double>(end - begin);
        const double sum = sum_range(begin, end, [&](int64_t i, auto lanes) { return load(input + i, lanes); });
        const float centre = static_cast<float>(sum / tile);
        f32x16 deviations = {};
        const double squares = sum_range(begin, end, [&](int64_t i, auto lanes) {
          const f32x16 deviation = keep(load(input + i, lanes) - centre, lanes);
          deviations += deviation;
          return deviation * deviation;
        });
        const double deviation = total(deviations), correction = deviation / tile;
        Merge(count, tile)(mean[channel], m2[channel], centre + correction, squares - deviation * correction);
        count += tile;
      });
    }
  });
}

void statistics(const Activation& shape, const void* input, double* mean, double* m2) {
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (shape.channels_last)
      statistics_rows(shape, static_cast<const T*>(input), mean, m2);
    else
      statistics_planes(shape, static_cast<const T*>(input), mean, m2);
  });
}

void bn_statistics(const BnStatistics& args) {
  const int64_t channels = args.shape.channels;
  std::vector<double> wide(2 * channels);
  statistics(args.shape, args.input, wide.data(), wide.data() + channels);
  for (int64_t c = 0; c < channels; ++c) {
    args.mean[c] = static_cast<float>(wide[c]);
    args.m2[c] = static_cast<float>(wide[channels + c]);
  }
}

// f(offset, lanes, of) for all elements, in blocks of one row or plane: of(vector) is the value of a vector per
// channel.
template <class F>
void each_element(const Activation& shape, F f) {
  const int64_t channels = shape.channels, pixels = shape.pixels;
  if (shape.channels_last) {
    parallel_for(0, shape.batch * pixels, ceil_div(kGrain, channels), [&](int64_t first, int64_t last) {
      const F local = f;  // whose pointers no store can change
      for (int64_t row = first; row < last; ++row)
        each_block(channels, [&](int64_t c, auto lanes) {
          local(row * channels + c, lanes,
                [=](const float* vector) __attribute__((always_inline)) { return load(vector + c, lanes); });
        });
    });
  } else {
    parallel_for(0, shape.batch * channels, ceil_div(kGrain, pixels), [&](int64_t first, int64_t last) {
      const F local = f;
      for (int64_t plane = first; plane < last; ++plane) {
        const int64_t c = plane % channels;
        each_block(pixels, [&](int64_t i, auto lanes) {
          local(plane * pixels + i, lanes,
                [=](const float* vector) __attribute__((always_inline)) { return vector[c]; });
        });
      }
    });
  }
}

// (x - mean) scale + bias, not x scale + (bias - mean scale): the latter cancels where the mean is large.  Forward's
// arithmetic, and backward's where it computes the output again.
struct Affine {
  const float *mean, *scale, *bias;

  template <class Of>
  RESFUSE_INLINE f32x16 operator()(f32x16 x, Of of) const {
    return (x - of(mean)) * of(scale) + of(bias);
  }
};

// Its vectors; scale = invstd weight.
struct AffineVectors {
  std::vector<float> scale, bias;

  AffineVectors(int64_t channels, const float* invstd, const float* weight, const float* bias_or_null)
      : scale(invstd, invstd + channels), bias(channels, 0.0f) {
    for (int64_t c = 0; c < channels && weight != nullptr; ++c) scale[c] *= weight[c];
    for (int64_t c = 0; c < channels && bias_or_null != nullptr; ++c) bias[c] = bias_or_null[c];
  }
  Affine with(const float* mean) const { return {mean, scale.data(), bias.data()}; }
};

template <class T>
void apply_typed(const BnApply& args) {
  const AffineVectors vectors(args.shape.channels, args.invstd, args.weight, args.bias);
  const Affine affine = vectors.with(args.mean);
  const T *input = static_cast<const T*>(args.input), *residual = static_cast<const T*>(args.residual);
  T* output = static_cast<T*>(args.output);
  const bool with_relu = args.relu;
  each_element(args.shape, [=](int64_t i, auto lanes, auto of) __attribute__((always_inline)) {
    f32x16 value = affine(load(input + i, lanes), of);
    if (residual != nullptr) value += load(residual + i, lanes);
    store(output + i, with_relu ? relu(value) : value, lanes);
  });
}

void bn_apply(const BnApply& args) {
  with_type(args.shape.dtype, [&](auto* type) { apply_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void bn_eval_forward(const BnEvalForward& args) {
  std::vector<float> invstd(args.apply.shape.channels);
  for (int64_t c = 0; c < args.apply.shape.channels; ++c)
    invstd[c] = static_cast<float>(1.0 / std::sqrt(args.running_var[c] + args.eps));
  BnApply apply = args.apply;
  apply.invstd = invstd.data();
  bn_apply(apply);
}

void bn_train_forward(const BnTrainForward& args) {
  const Activation& shape = args.apply.shape;
  const int64_t channels = shape.channels;
  const double count = static_cast<double>(shape.batch * shape.pixels);
  std::vector<double> wide(args.statistics != nullptr ? 0 : 2 * channels);
  const double* known = args.statistics;
  if (known == nullptr) {
    statistics(shape, args.apply.input, wide.data(), wide.data() + channels);
    known = wide.data();
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = known[c], m2 = known[channels + c];
    args.mean[c] = static_cast<float>(mean);
    args.invstd[c] = static_cast<float>(1.0 / std::sqrt(m2 / count + args.eps));
    if (args.running_mean != nullptr) {
      args.running_mean[c] = static_cast<float>((1 - args.momentum) * args.running_mean[c] + args.momentum * mean);
      args.running_var[c] =
          static_cast<float>((1 - args.momentum) * args.running_var[c] + args.momentum * (m2 / (count - 1)));
    }
  }
  bn_apply(args.apply);
}

// What a ReLU passes of a gradient g, by its output, by the input that makes it again, or without a ReLU all of it.
template <class T>
struct OutputMask {
  static constexpr bool reads_input = false;
  const T* output;

  template <class Lanes, class Of>
  RESFUSE_INLINE f32x16 operator()(f32x16 g, f32x16, int64_t i, Lanes lanes, Of) const {
    return relu_mask(g, load(output + i, lanes));
  }
};

template <class T>
struct InputMask {
  static constexpr bool reads_input = true;
  Affine affine;
  // What is not greater is zero as a T: half of the least bfloat16 is rounded to even.
  static constexpr float kZero = std::is_same_v<T, bf16> ? 0x1p-134f : 0.0f;

  template <class Lanes, class Of>
  RESFUSE_INLINE f32x16 operator()(f32x16 g, f32x16 x, int64_t, Lanes, Of of) const {
    return relu_mask(g, affine(x, of), kZero);
  }
};

struct NoMask {
  static constexpr bool reads_input = false;

  template <class Lanes, class Of>
  RESFUSE_INLINE f32x16 operator()(f32x16 g, f32x16, int64_t, Lanes, Of) const {
    return g;
  }
};

template <class T, class F>
void with_mask(const BnMask& args, const Affine& affine, F f) {
  if (!args.relu)
    f(NoMask{});
  else if (args.output != nullptr)
    f(OutputMask<T>{static_cast<const T*>(args.output)});
  else
    f(InputMask<T>{affine});
}

template <class T, class Mask>
void backward_reduce_rows(const BnBackwardReduce& args, const Mask mask) {
  const Tiling tiling(args.shape);
  const int64_t channels = args.shape.channels;
  const T *input = static_cast<const T*>(args.input), *grad_output = static_cast<const T*>(args.mask.grad_output);
  const float* mean = args.mask.mean;
  T* masked = static_cast<T*>(args.masked);
  std::vector<double> partial(2 * tiling.chunks * channels);
  parallel_for(0, tiling.chunks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> buffer(2 * channels);
    const auto terms_of = [=](int64_t i, int64_t c, auto lanes, f32x16* terms) __attribute__((always_inline)) {
      const auto of = [=](const float* vector) __attribute__((always_inline)) { return load(vector + c, lanes); };
      const f32x16 x = load(input + i, lanes), g = mask(load(grad_output + i, lanes), x, i, lanes, of);
      if (masked != nullptr) store(masked + i, g, lanes);
      terms[0] = g;
      terms[1] = g * (x - of(mean));
    };
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double* sums = partial.data() + 2 * chunk * channels;
      each_tile(tiling, chunk, [&](int64_t begin, int64_t end) {
        std::fill(buffer.begin(), buffer.end(), 0.0f);
        add_rows<2, 1>(channels, begin, end, buffer.data(), terms_of);
        for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += buffer[c];
      });
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double sum_g = 0, sum_gx = 0;
    for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk) {
      sum_g += partial[2 * chunk * channels + c];
      sum_gx += partial[(2 * chunk + 1) * channels + c];
    }
    args.sum_g[c] = static_cast<float>(sum_g);
    args.sum_g_xhat[c] = static_cast<float>(sum_gx * args.mask.invstd[c]);
  }
}

template <class T, class Mask>
void backward_reduce_planes(const BnBackwardReduce& args, const Mask mask) {
  const Activation& shape = args.shape;
  const T *input = static_cast<const T*>(args.input), *grad_output = static_cast<const T*>(args.mask.grad_output);
  T* masked = static_cast<T*>(args.masked);
  parallel_for(0, shape.channels, ceil_div(kGrain, shape.batch * shape.pixels), [&](int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; ++channel) {
      const float mean = args.mask.mean[channel];
      const auto of = [=](const float* vector) __attribute__((always_inline)) { return vector[channel]; };
      double sum_g = 0, sum_gx = 0;
      each_plane_tile(shape, channel, [&](int64_t begin, int64_t end) {
        f32x16 tile_g = {}, tile_gx = {};
        each_block(end - begin, [&](int64_t offset, auto lanes) {
          const int64_t i = begin + offset;
          const f32x16 x = load(input + i, lanes), g = mask(load(grad_output + i, lanes), x, i, lanes, of);
          if (masked != nullptr) store(masked + i, g, lanes);
          tile_g += g;
          tile_gx += keep(g * (x - mean), lanes);
        });
        sum_g += total(tile_g);
        sum_gx += total(tile_gx);
      });
      args.sum_g[channel] = static_cast<float>(sum_g);
      args.sum_g_xhat[channel] = static_cast<float>(sum_gx * args.mask.invstd[channel]);
    }
  });
}

void bn_backward_reduce(const BnBackwardReduce& args) {
  const AffineVectors vectors(args.shape.channels, args.mask.invstd, args.mask.weight, args.mask.bias);
  with_type(args.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_mask<T>(args.mask, vectors.with(args.mask.mean), [&](auto mask) {
      if (args.shape.channels_last)
        backward_reduce_rows<T>(args, mask);
      else
        backward_reduce_planes<T>(args, mask);
    });
  });
}

template <class T, class Mask>
void backward_apply_typed(const BnBackwardApply& args, const Affine& affine, const Mask mask) {
  const int64_t channels = args.shape.channels;
  const T *input = static_cast<const T*>(args.input), *grad_output = static_cast<const T*>(args.mask.grad_output);
  T* grad_input = static_cast<T*>(args.grad_input);
  const float *mean = affine.mean, *scale = affine.scale;
  // grad_input = scale (g - mean_g - (input - mean) slope)
  std::vector<float> terms(2 * channels, 0.0f);
  float *mean_g = terms.data(), *slope = mean_g + channels;
  for (int64_t c = 0; c < channels && args.count > 0; ++c) {
    mean_g[c] = static_cast<float>(args.sum_g[c] / args.count);
    slope[c] = static_cast<float>(args.sum_g_xhat[c] / args.count * args.mask.invstd[c]);
  }
  const bool batch_statistics = args.count > 0;
  each_element(args.shape, [=](int64_t i, auto lanes, auto of) __attribute__((always_inline)) {
    f32x16 x = {};
    if (batch_statistics || Mask::reads_input) x = load(input + i, lanes);
    f32x16 g = mask(load(grad_output + i, lanes), x, i, lanes, of);
    if (batch_statistics) g = g - of(mean_g) - (x - of(mean)) * of(slope);
    store(grad_input + i, g * of(scale), lanes);
  });
}

void bn_backward_apply(const BnBackwardApply& args) {
  const AffineVectors vectors(args.shape.channels, args.mask.invstd, args.mask.weight, args.mask.bias);
  const Affine affine = vectors.with(args.mask.mean);
  with_type(args.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_mask<T>(args.mask, affine, [&](auto mask) { backward_apply_typed<T>(args, affine, mask); });
  });
}
