// The micro-kernel: a tile of pixels times a panel of filters, and the epilogue.
//
//   output = act((sum - centre) scale + shift + residual),    centre = mean - conv_bias
//
// rather than sum scale + (shift - centre scale), which cancels where the mean is large.

// The reduction, cut off after so many words: sums of sums lose less to rounding than one long sum.  The rounding of
// bfloat16 is larger than that of any sum.
template <class T, class Mul>
constexpr int64_t kSerialWords = sizeof(T) == 2 || Mul::channels == 2 ? 512 : 128;

// Mean and M2 = sum (z - mean)^2 per filter of the pixels that a chunk has seen.
struct ChunkStatistics {
  double *mean, *m2;
  int64_t seen;
};

struct Tile {
  // Pixel i of group j lies at pixels[j] + i * pixel_bytes.
  const char* pixels[2];
  int64_t pixel_bytes;
  const float* panel;
  int64_t other_panel;  // floats from it to the next, where a tile has two
  int64_t tap_rows, tap_columns, tap_row_bytes, tap_column_bytes, run;  // as in ConvPlan
  // Epilogue, of rows that are output_stride and residual_stride elements apart.
  const float *centre, *scale, *shift;
  void* output;
  const void* residual;  // or null
  int64_t output_stride, residual_stride;
  int64_t filters, residual_filters;  // of the panel: to be written, that have a residual
  bool relu;
  const ChunkStatistics* statistics;  // or null
  // Memory that will be needed next, fetched to the L2 cache a line at each step; ahead_step 0: nothing.
  const char* ahead;
  int64_t ahead_step;
};

// Statistics of the tile's own pixels, merged into those of the chunk (Chan et al. 1979, as in bn_act.inl).
template <int64_t M>
RESFUSE_INLINE void merge_tile(const ChunkStatistics& statistics, int64_t offset, const vec (&values)[M]) {
  vec sum = {}, squares = {};
  unrolled<M>([&](auto i) { sum += values[i]; });
  const vec mean = sum * (1.0f / M);
  unrolled<M>([&](auto i) {
    const vec deviation = values[i] - mean;
    squares += deviation * deviation;
  });
  vec_f64 chunk_mean, chunk_m2;
  __builtin_memcpy(&chunk_mean, statistics.mean + offset, sizeof chunk_mean);
  __builtin_memcpy(&chunk_m2, statistics.m2 + offset, sizeof chunk_m2);
  const double seen = static_cast<double>(statistics.seen);
  const vec_f64 delta = __builtin_convertvector(mean, vec_f64) - chunk_mean;
  chunk_mean += delta * (M / (seen + M));
  chunk_m2 += __builtin_convertvector(squares, vec_f64) + delta * delta * (seen * M / (seen + M));
  __builtin_memcpy(statistics.mean + offset, &chunk_mean, sizeof chunk_mean);
  __builtin_memcpy(statistics.m2 + offset, &chunk_m2, sizeof chunk_m2);
}

// A panel that is not full, or a residual that ends inside of it.
template <class T, int64_t M, int64_t NV>
__attribute__((noinline)) void finish_partial(const Tile& tile, const vec (&values)[M][NV]) {
  T* output = static_cast<T*>(tile.output);
  const T* residual = static_cast<const T*>(tile.residual);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t v = 0; v < NV; ++v) {
      const int64_t offset = v * kWidth;
      const int64_t count = std::min(kWidth, tile.filters - offset);
      if (count <= 0) break;
      T row[kWidth] = {};
      vec value = values[i][v];
      if (residual != nullptr && tile.residual_filters > offset) {
        __builtin_memcpy(row, residual + i * tile.residual_stride + offset,
                         std::min(kWidth, tile.residual_filters - offset) * sizeof(T));
        value += vload(row);
      }
      vstore(row, tile.relu ? vrelu(value) : value);
      __builtin_memcpy(output + i * tile.output_stride + offset, row, count * sizeof(T));
    }
}

// Adds the residual, applies the ReLU, and writes the tile.
template <class T, class Mul, int64_t M, int64_t NV>
RESFUSE_INLINE void finish_tile(const Tile& tile, vec (&values)[M][NV]) {
  T* output = static_cast<T*>(tile.output);
  const T* residual = static_cast<const T*>(tile.residual);
  const bool partial = tile.filters < NV * kWidth || (residual != nullptr && tile.residual_filters < NV * kWidth);
  if (__builtin_expect(partial, 0)) {
    vec copies[M][NV];  // their address is taken: `values` stay in registers
    unrolled<M>([&](auto i) { unrolled<NV>([&](auto v) { copies[i][v] = values[i][v]; }); });
    return finish_partial<T, M, NV>(tile, copies);
  }
  if (residual != nullptr)
    unrolled<M>([&](auto i) {
      unrolled<NV>([&](auto v) { values[i][v] += vload(residual + i * tile.residual_stride + v * kWidth); });
    });
  if (tile.relu) unrolled<M>([&](auto i) { unrolled<NV>([&](auto v) { values[i][v] = vrelu(values[i][v]); }); });
  unrolled<M>([&](auto i) {
    unrolled<NV>([&](auto v) { Mul::store(output + i * tile.output_stride + v * kWidth, values[i][v]); });
  });
}

// GROUPS x ROWS pixels, NV x kWidth filters.
template <class T, class Mul, int64_t NV, int64_t GROUPS, int64_t ROWS>
__attribute__((noinline)) void multiply_tile(const Tile& tile) {
  constexpr int64_t M = GROUPS * ROWS, width = NV * kWidth;
  // Filters of two neighbouring panels lie in both.
  constexpr bool two_panels = NV == 2 * kPanelVectors;
  constexpr int64_t panel_step = two_panels ? kPanel : width;
  const auto vector_offset = [other = tile.other_panel](auto v) __attribute__((always_inline)) {
    constexpr int64_t at = v;
    return two_panels && at >= kPanelVectors ? other + (at - kPanelVectors) * kWidth : at * kWidth;
  };
  T* output = static_cast<T*>(tile.output);
  const T* residual = static_cast<const T*>(tile.residual);
  // The epilogue's lines arrive while the reduction runs.
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < M; ++i)
    for (int64_t f = 0; f < width; f += line) {
      __builtin_prefetch(output + i * tile.output_stride + f, 1);
      if (residual != nullptr) __builtin_prefetch(residual + i * tile.residual_stride + f);
    }

  vec sums[M][NV];
  unrolled<M>([&](auto i) { unrolled<NV>([&](auto v) { sums[i][v] = vec{}; }); });
  float earlier[M * width];  // sums that were cut off
  bool cut = false;
  int64_t room = kSerialWords<T, Mul>;
  const float* panel = tile.panel;
  const char* ahead = tile.ahead;
  const int64_t pixel = tile.pixel_bytes, ahead_step = tile.ahead_step;
  for (int64_t tap_row = 0; tap_row < tile.tap_rows; ++tap_row)
    for (int64_t tap_column = 0; tap_column < tile.tap_columns; ++tap_column) {
      const int64_t tap = tap_row * tile.tap_row_bytes + tap_column * tile.tap_column_bytes;
      const char *first = tile.pixels[0] + tap, *second = tile.pixels[1] + tap;
      for (int64_t left = tile.run; left > 0;) {
        if (room == 0) {
          unrolled<M>([&](auto i) {
            unrolled<NV>([&](auto v) {
              float* at = earlier + i * width + v * kWidth;
              vstore(at, cut ? vload(at) + sums[i][v] : sums[i][v]);
              sums[i][v] = vec{};
            });
          });
          cut = true;
          room = kSerialWords<T, Mul>;
        }
        const int64_t steps = std::min(left, room);
        left -= steps;
        room -= steps;
        int64_t pixel3 = pixel * 3, pixel5 = pixel * 5;
        asm("" : "+r"(pixel3), "+r"(pixel5));  // kept in registers: every address is then base + register * {1, 2, 4}
        const auto pixel_offset = [=](auto i) __attribute__((always_inline)) {
          constexpr int64_t at = i;
          return at == 3 ? pixel3 : at == 5 ? pixel5 : at == 6 ? pixel3 * 2 : pixel * at;
        };
        const char* end = first + steps * 4;
        do {
          vec filters[NV];
          unrolled<NV>([&](auto v) {
            filters[v] = vload(panel + vector_offset(v));
            if (v * kWidth % 16 == 0) __builtin_prefetch(panel + 16 * panel_step + vector_offset(v));
          });
          __builtin_prefetch(ahead, 0, 2);
          ahead += ahead_step;
          unrolled<ROWS>([&](auto i) {
            unrolled<NV>(
                [&](auto v) { sums[i][v] = Mul::multiply_add(sums[i][v], first + pixel_offset(i), filters[v]); });
          });
          if constexpr (GROUPS == 2) {
            unrolled<ROWS>([&](auto i) {
              unrolled<NV>([&](auto v) {
                sums[ROWS + i][v] = Mul::multiply_add(sums[ROWS + i][v], second + pixel_offset(i), filters[v]);
              });
            });
            second += 4;
          }
          first += 4;
          panel += panel_step;
        } while (first != end);
      }
    }
  if (cut)
    unrolled<M>([&](auto i) { unrolled<NV>([&](auto v) { sums[i][v] += vload(earlier + i * width + v * kWidth); }); });

  unrolled<NV>([&](auto v) {
    const vec centre = vload(tile.centre + v * kWidth), scale = vload(tile.scale + v * kWidth);
    const vec shift = vload(tile.shift + v * kWidth);
    unrolled<M>([&](auto i) { sums[i][v] = (sums[i][v] - centre) * scale + shift; });
  });
  if (tile.statistics != nullptr)
    unrolled<NV>([&](auto v) {
      vec values[M];
      unrolled<M>([&](auto i) { values[i] = as_stored(output, sums[i][v]); });
      merge_tile<M>(*tile.statistics, v * kWidth, values);
    });
  finish_tile<T, Mul, M, NV>(tile, sums);
}

// How many of the next `left` evenly spaced pixels make a tile: 14 while there are many, then even shares.
RESFUSE_INLINE int64_t tile_pixels(int64_t left) {
  if (left <= kTileRows || left == kTilePixels) return left;
  if (left < kTilePixels) return left % 2 == 0 ? left : (left + 1) / 2;
  const int64_t share = ceil_div(left, ceil_div(left, kTilePixels));
  return share + share % 2;
}

// The pixels of a tile are one group, up to seven, or two groups of at least four.
template <class T, class Mul, int64_t NV>
RESFUSE_INLINE void multiply_pixels(const Tile& tile, int64_t groups, int64_t rows) {
  if constexpr (NV <= kPanelVectors)
    if (groups == 2) switch (rows) {
        case 4:
          return multiply_tile<T, Mul, NV, 2, 4>(tile);
        case 5:
          return multiply_tile<T, Mul, NV, 2, 5>(tile);
        case 6:
          return multiply_tile<T, Mul, NV, 2, 6>(tile);
        default:
          return multiply_tile<T, Mul, NV, 2, 7>(tile);
      }
  switch (rows) {
    case 1:
      return multiply_tile<T, Mul, NV, 1, 1>(tile);
    case 2:
      return multiply_tile<T, Mul, NV, 1, 2>(tile);
    case 3:
      return multiply_tile<T, Mul, NV, 1, 3>(tile);
    case 4:
      return multiply_tile<T, Mul, NV, 1, 4>(tile);
    case 5:
      return multiply_tile<T, Mul, NV, 1, 5>(tile);
    case 6:
      return multiply_tile<T, Mul, NV, 1, 6>(tile);
    default:
      return multiply_tile<T, Mul, NV, 1, 7>(tile);
  }
}

// The filters of a tile: one vector, a panel, or with up to seven pixels two panels.
template <class T, class Mul>
RESFUSE_INLINE void multiply(const Tile& tile, int64_t width, int64_t groups, int64_t rows) {
#if RESFUSE_ISA_LANES == 16
  if (width == 2 * kPanel) return multiply_pixels<T, Mul, 2 * kPanelVectors>(tile, 1, rows);
#endif
  if (width == kWidth) return multiply_pixels<T, Mul, 1>(tile, groups, rows);
  if constexpr (kPanelVectors > 1) multiply_pixels<T, Mul, kPanelVectors>(tile, groups, rows);
}
