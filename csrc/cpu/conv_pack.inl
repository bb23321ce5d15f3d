// Filters to panels and pixels to scratch, from tensors with any strides.

// ---- Filters.  A panel holds `width` filters (kWidth or kPanel): word k of all of them, then word k + 1; zeros beyond
// the last filter.  Words are ordered by (row, column, channel).

// Rows of a panel in the order in which the words of a filter lie in memory.
struct RowsInOrder {
  int64_t row = 0;
  RESFUSE_INLINE int64_t next() { return row++; }
};
struct RowsChannelsFirst {  // memory is (channel, row, column): contiguous weights of PyTorch
  int64_t taps, channels;
  int64_t tap = 0, channel = 0, row = 0;
  RESFUSE_INLINE int64_t next() {
    const int64_t now = row;
    row += channels;
    if (++tap == taps) tap = 0, row = ++channel;
    return now;
  }
};

#if RESFUSE_ISA_LANES == 16
RESFUSE_INLINE vec four_words(const char* from, int64_t stride) {  // of the filters 0, 4, 8 and 12
  __m512 words = _mm512_castps128_ps512(_mm_loadu_ps(reinterpret_cast<const float*>(from)));
  // A broadcast from memory is a load and a blend; GCC would make it a load and a shuffle, on the port that the
  // transposition needs.
  const auto insert = [&](auto lane) __attribute__((always_inline)) {
    const __mmask16 mask = static_cast<__mmask16>(0xf << 4 * lane);
    asm("vbroadcastf32x4 %1, %0%{%2%}"
        : "+v"(words)
        : "m"(*reinterpret_cast<const __m128_u*>(from + 4 * lane * stride)), "Yk"(mask));
  };
  insert(std::integral_constant<int64_t, 1>{});
  insert(std::integral_constant<int64_t, 2>{});
  insert(std::integral_constant<int64_t, 3>{});
  return (vec)words;
}
// Four words of each of kWidth filters, to four rows.
RESFUSE_INLINE void transpose_words(const char* from, int64_t stride, vec (&rows)[4]) {
  __m512 in[4];
  unrolled<4>([&](auto i) { in[i] = (__m512)four_words(from + i * stride, stride); });
  const __m512d a = (__m512d)_mm512_unpacklo_ps(in[0], in[1]), b = (__m512d)_mm512_unpacklo_ps(in[2], in[3]);
  const __m512d c = (__m512d)_mm512_unpackhi_ps(in[0], in[1]), d = (__m512d)_mm512_unpackhi_ps(in[2], in[3]);
  rows[0] = (vec)_mm512_unpacklo_pd(a, b);
  rows[1] = (vec)_mm512_unpackhi_pd(a, b);
  rows[2] = (vec)_mm512_unpacklo_pd(c, d);
  rows[3] = (vec)_mm512_unpackhi_pd(c, d);
}
#elif RESFUSE_ISA_LANES == 8
RESFUSE_INLINE void transpose_words(const char* from, int64_t stride, vec (&rows)[4]) {
  __m256 in[4];
  unrolled<4>([&](auto i) {
    const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(from + i * stride));
    const __m128 high = _mm_loadu_ps(reinterpret_cast<const float*>(from + (i + 4) * stride));
    in[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
  });
  const __m256d a = (__m256d)_mm256_unpacklo_ps(in[0], in[1]), b = (__m256d)_mm256_unpacklo_ps(in[2], in[3]);
  const __m256d c = (__m256d)_mm256_unpackhi_ps(in[0], in[1]), d = (__m256d)_mm256_unpackhi_ps(in[2], in[3]);
  rows[0] = (vec)_mm256_unpacklo_pd(a, b);
  rows[1] = (vec)_mm256_unpackhi_pd(a, b);
  rows[2] = (vec)_mm256_unpacklo_pd(c, d);
  rows[3] = (vec)_mm256_unpackhi_pd(c, d);
}
#else
RESFUSE_INLINE void transpose_words(const char* from, int64_t stride, vec (&rows)[4]) {
  float words[4][kWidth];
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    float four[4];
    __builtin_memcpy(four, from + lane * stride, sizeof four);
    unrolled<4>([&](auto i) { words[i][lane] = four[i]; });
  }
  unrolled<4>([&](auto i) { rows[i] = vload(words[i]); });
}
#endif

// kWidth filters of `count` contiguous elements each, which begin `stride` elements apart.
template <class Mul, class T, class Rows>
__attribute__((noinline)) void pack_contiguous(const T* from, int64_t stride, int64_t count, float* panel,
                                               int64_t width, Rows rows) {
  constexpr bool widen = sizeof(T) == 2 && Mul::channels == 1;
  constexpr int64_t step = 16 / static_cast<int64_t>(sizeof(T));
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
  int64_t k = 0;
  for (; k + step <= count; k += step) {
    const char* here = reinterpret_cast<const char*>(from + k);
    if (k % 16 == 0)
      for (int64_t filter = 0; filter < kWidth; ++filter) __builtin_prefetch(here + filter * bytes + 1024);
    vec words[4];
    transpose_words(here, bytes, words);
    for (int64_t i = 0; i < 4; ++i) {
      if constexpr (widen) {  // the first of two bfloat16 is in the low half
        vstore(panel + rows.next() * width, (vec)((vec_u32)words[i] << 16));
        vstore(panel + rows.next() * width, (vec)((vec_u32)words[i] & 0xffff0000u));
      } else {
        vstore(panel + rows.next() * width, words[i]);
      }
    }
  }
  if (k == count) return;
  for (; k < count; k += Mul::channels) {
    const int64_t row = rows.next();
    for (int64_t filter = 0; filter < kWidth; ++filter) {
      if constexpr (Mul::channels == 1)
        panel[row * width + filter] = scalar(from[filter * stride + k]);
      else
        __builtin_memcpy(panel + row * width + filter, from + filter * stride + k, 4);
    }
  }
}

// One word of a filter, whatever the strides.
template <class Mul, class T>
RESFUSE_INLINE float word_at(const T* from, int64_t channel_stride, int64_t word, int64_t channels) {
  if constexpr (Mul::channels == 1) {
    return scalar(from[word * channel_stride]);
  } else {
    bf16 pair[2] = {from[2 * word * channel_stride], {0}};
    if (2 * word + 1 < channels) pair[1] = from[(2 * word + 1) * channel_stride];
    float both;
    __builtin_memcpy(&both, pair, 4);
    return both;
  }
}

// The same word of kWidth filters that are neighbours in memory.
template <class Mul, class T>
RESFUSE_INLINE vec words_at(const T* from, int64_t channel_stride, int64_t word, int64_t channels) {
  if constexpr (Mul::channels == 1) {
    return vload(from + word * channel_stride);
  } else {
    const vec_u32 low = (vec_u32)vload(from + 2 * word * channel_stride) >> 16;
    return 2 * word + 1 < channels ? (vec)(low | (vec_u32)vload(from + (2 * word + 1) * channel_stride)) : (vec)low;
  }
}

// The panel of `filters` filters from `from` on.
template <class Mul, class T>
void pack_panel(const ConvForward& args, const ConvPlan& plan, const T* from, int64_t filters, float* panel,
                int64_t width) {
  const Convolution& conv = args.conv;
  const WeightStrides& stride = args.weight_strides;
  const int64_t channels = plan.group_channels, words = plan.channel_words, taps = conv.kernel_h * conv.kernel_w;
  const bool aligned_words = channels % Mul::channels == 0;
  const bool channels_last = stride.channel == 1 && (conv.kernel_w == 1 || stride.column == channels) &&
                             (conv.kernel_h == 1 || stride.row == conv.kernel_w * channels);
  const bool channels_first = (channels == 1 || stride.channel == taps) && (conv.kernel_w == 1 || stride.column == 1) &&
                              (conv.kernel_h == 1 || stride.row == conv.kernel_w);
  int64_t packed = 0;
  if (aligned_words && (channels_last || (channels_first && Mul::channels == 1)))
    for (; packed + kWidth <= filters; packed += kWidth) {
      const T* here = from + packed * stride.filter;
      if (channels_last)
        pack_contiguous<Mul>(here, stride.filter, taps * channels, panel + packed, width, RowsInOrder{});
      else
        pack_contiguous<Mul>(here, stride.filter, taps * channels, panel + packed, width,
                             RowsChannelsFirst{taps, channels});
    }
  if (packed == width) return;
  for (int64_t row = 0; row < conv.kernel_h; ++row)
    for (int64_t column = 0; column < conv.kernel_w; ++column) {
      const T* tap = from + row * stride.row + column * stride.column;
      float* to = panel + (row * conv.kernel_w + column) * words * width;
      for (int64_t word = 0; word < words; ++word, to += width) {
        int64_t filter = packed;
        if (stride.filter == 1)
          for (; filter + kWidth <= filters; filter += kWidth)
            vstore(to + filter, words_at<Mul>(tap + filter, stride.channel, word, channels));
        for (; filter < filters; ++filter)
          to[filter] = word_at<Mul>(tap + filter * stride.filter, stride.channel, word, channels);
        for (; filter < width; ++filter) to[filter] = 0;
      }
    }
}

// ---- Pixels.

// `count` contiguous elements.
template <class Mul, class T>
RESFUSE_INLINE void copy_run(const T* from, float* to, int64_t count) {
  if constexpr (Mul::channels == 2) {
    __builtin_memcpy(to, from, count * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) vstore(to + i, vload(from + i));
    for (; i < count; ++i) to[i] = scalar(from[i]);
  }
}

// `columns` pixels of a group of channels.
template <class Mul, class T>
void copy_pixels(const ConvForward& args, const ConvPlan& plan, const T* from, int64_t columns, int64_t column_stride,
                 float* to, int64_t pixel_words) {
  const int64_t channel_stride = args.input_strides[1], channels = plan.group_channels;
  if (channel_stride == 1 && channels % Mul::channels == 0) {
    if (column_stride == channels && pixel_words == plan.channel_words)
      return copy_run<Mul>(from, to, columns * channels);
    for (int64_t column = 0; column < columns; ++column)
      copy_run<Mul>(from + column * column_stride, to + column * pixel_words, channels);
    return;
  }
  constexpr int64_t block = 16;  // pixels: a cache line of each channel, where channels are planes
  for (int64_t first = 0; first < columns; first += block)
    for (int64_t word = 0; word < plan.channel_words; ++word)
      for (int64_t column = first; column < std::min(columns, first + block); ++column)
        to[column * pixel_words + word] = word_at<Mul>(from + column * column_stride, channel_stride, word, channels);
}

RESFUSE_INLINE void zero(float* to, int64_t words) { __builtin_memset(to, 0, words * 4); }

// The zero-padded input rows that the output rows [first, first + count) of an image read.
template <class Mul, class T>
void copy_band(const ConvForward& args, const ConvPlan& plan, const T* image, int64_t first, int64_t count, float* to) {
  const Convolution& conv = args.conv;
  const int64_t words = plan.pixel_words, width = plan.band_width;
  const int64_t high = (count - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1;
  const int64_t left = std::min(conv.padding_w, width);
  const int64_t inside = std::max<int64_t>(0, std::min(conv.width, width - left));
  for (int64_t i = 0; i < high; ++i, to += width * words) {
    const int64_t row = first * conv.stride_h - conv.padding_h + i;
    if (row < 0 || row >= conv.height) {
      zero(to, width * words);
      continue;
    }
    zero(to, left * words);
    copy_pixels<Mul>(args, plan, image + row * args.input_strides[2], inside, args.input_strides[3], to + left * words,
                     words);
    zero(to + (left + inside) * words, (width - left - inside) * words);
  }
}

// The window of one output pixel.
template <class Mul, class T>
void copy_window(const ConvForward& args, const ConvPlan& plan, const T* input, int64_t pixel, float* to) {
  const Convolution& conv = args.conv;
  const int64_t per_image = conv.out_height * conv.out_width;
  const T* image = input + pixel / per_image * args.input_strides[0];
  const int64_t top = pixel % per_image / conv.out_width * conv.stride_h - conv.padding_h;
  const int64_t left = pixel % conv.out_width * conv.stride_w - conv.padding_w;
  for (int64_t r = 0; r < conv.kernel_h; ++r)
    for (int64_t s = 0; s < conv.kernel_w; ++s, to += plan.channel_words) {
      const int64_t row = top + r * conv.dilation_h, column = left + s * conv.dilation_w;
      if (row < 0 || column < 0 || row >= conv.height || column >= conv.width)
        zero(to, plan.channel_words);
      else
        copy_pixels<Mul>(args, plan, image + row * args.input_strides[2] + column * args.input_strides[3], 1, 0, to,
                         plan.channel_words);
    }
}
