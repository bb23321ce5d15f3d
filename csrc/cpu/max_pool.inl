// Max pooling of NHWC tensors, with the position of each maximum in its window in one byte.
//
// Backward makes the input's gradient row by row, each by one thread: the windows that contain a row add their
// gradients where their maxima are, in their order, which is PyTorch's.  What it adds to stays in the L1 cache.

using vec_u8 = uint8_t __attribute__((vector_size(kWidth)));

using AllLanes = std::integral_constant<int64_t, kWidth>;

// f(offset, lanes) for [0, count), a register of channels at a time.
template <class F>
RESFUSE_INLINE void each_register(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) f(i, AllLanes{});
  if (i < count) f(i, count - i);
}
template <class T>
RESFUSE_INLINE vec read(const T* from, AllLanes) {
  return vload(from);
}
template <class T>
RESFUSE_INLINE void write(T* to, vec value, AllLanes) {
  vstore(to, value);
}
template <class T>
RESFUSE_INLINE vec read(const T* from, int64_t lanes) {
  T values[kWidth] = {};
  __builtin_memcpy(values, from, lanes * sizeof(T));
  return vload(values);
}
template <class T>
RESFUSE_INLINE void write(T* to, vec value, int64_t lanes) {
  T values[kWidth];
  vstore(values, value);
  __builtin_memcpy(to, values, lanes * sizeof(T));
}
// By way of 16 bits: GCC converts bytes to words and back one by one.
template <class Lanes>
RESFUSE_INLINE vec_i32 read_bytes(const uint8_t* from, Lanes lanes) {
  vec_u8 bytes = {};
  __builtin_memcpy(&bytes, from, lanes);
  return (vec_i32) __builtin_convertvector(__builtin_convertvector(bytes, vec_u16), vec_u32);
}
template <class Lanes>
RESFUSE_INLINE void write_bytes(uint8_t* to, vec_i32 value, Lanes lanes) {
  const vec_u8 bytes = __builtin_convertvector(__builtin_convertvector((vec_u32)value, vec_u16), vec_u8);
  __builtin_memcpy(to, &bytes, lanes);
}

// One dimension of a window: its elements are start + step dilation, for step in [first, last).
struct Window {
  int64_t start, first, last;

  Window(const PoolAxis& axis, int64_t out) : start(out * axis.stride - axis.padding) {
    first = start < 0 ? ceil_div(-start, axis.dilation) : 0;
    last = std::min(axis.kernel, ceil_div(axis.size - start, axis.dilation));
  }
};

template <class T>
void max_pool_forward_typed(const MaxPoolForward& args) {
  const PoolAxis rows = args.pool.rows, columns = args.pool.columns;
  const int64_t channels = args.pool.channels;
  parallel_for(
      0, args.pool.batch * rows.out, ceil_div(kGrain, columns.out * channels), [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const Window high(rows, row % rows.out);
          const T* image = static_cast<const T*>(args.input) + row / rows.out * rows.size * columns.size * channels;
          for (int64_t column = 0; column < columns.out; ++column) {
            const Window wide(columns, column);
            const int64_t to = (row * columns.out + column) * channels;
            each_register(channels, [=](int64_t c, auto lanes) __attribute__((always_inline)) {
              vec best = splat(-std::numeric_limits<float>::infinity());
              vec_i32 position = vec_i32{} + static_cast<int32_t>(high.first * columns.kernel + wide.first);
              for (int64_t r = high.first; r < high.last; ++r)
                for (int64_t s = wide.first; s < wide.last; ++s) {
                  const int64_t pixel =
                      (high.start + r * rows.dilation) * columns.size + wide.start + s * columns.dilation;
                  const vec value = read(image + pixel * channels + c, lanes);
                  const auto better = (value > best) | (value != value);  // the first of several; NaN before all
                  best = better ? value : best;
                  position = better ? vec_i32{} + static_cast<int32_t>(r * columns.kernel + s) : position;
                }
              write(static_cast<T*>(args.output) + to + c, best, lanes);
              write_bytes(args.positions + to + c, position, lanes);
            });
          }
        }
      });
}

template <class T>
void max_pool_backward_typed(const MaxPoolBackward& args) {
  const PoolAxis rows = args.pool.rows, columns = args.pool.columns;
  const int64_t channels = args.pool.channels, width = columns.size * channels;
  parallel_for(0, args.pool.batch * rows.size, ceil_div(kGrain, width), [=](int64_t begin, int64_t end) {
    std::vector<float> buffer(std::is_same_v<T, float> ? 0 : width);
    for (int64_t row = begin; row < end; ++row) {
      T* grad_input = static_cast<T*>(args.grad_input) + row * width;
      float* sums = buffer.data();
      if constexpr (std::is_same_v<T, float>) sums = grad_input;
      std::fill(sums, sums + width, 0.0f);
      const int64_t high = row % rows.size + rows.padding, reach = rows.dilation * (rows.kernel - 1);
      const int64_t first = high > reach ? ceil_div(high - reach, rows.stride) : 0;
      for (int64_t out = first; out < rows.out && out * rows.stride <= high; ++out) {
        if ((high - out * rows.stride) % rows.dilation != 0) continue;
        const auto step = static_cast<int32_t>((high - out * rows.stride) / rows.dilation * columns.kernel);
        const int64_t from = (row / rows.size * rows.out + out) * columns.out * channels;
        for (int64_t column = 0; column < columns.out; ++column) {
          const Window window(columns, column);
          const T* grad_output = static_cast<const T*>(args.grad_output) + from + column * channels;
          const uint8_t* positions = args.positions + from + column * channels;
          each_register(channels, [=](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vec grad = read(grad_output + c, lanes);
            const vec_i32 position = read_bytes(positions + c, lanes);
            const auto add = [=](int64_t s) __attribute__((always_inline)) {
              float* to = sums + (window.start + s * columns.dilation) * channels + c;
              write(to, read(to, lanes) + (position == step + static_cast<int32_t>(s) ? grad : vec{}), lanes);
            };
            if (window.first == 0 && window.last == 3)
              add(0), add(1), add(2);
            else
              for (int64_t s = window.first; s < window.last; ++s) add(s);
          });
        }
      }
      if constexpr (!std::is_same_v<T, float>)
        each_register(width, [=](int64_t i, auto lanes) { write(grad_input + i, read(sums + i, lanes), lanes); });
    }
  });
}

void max_pool_forward(const MaxPoolForward& args) {
  with_type(args.pool.dtype, [&](auto* type) { max_pool_forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void max_pool_backward(const MaxPoolBackward& args) {
  with_type(args.pool.dtype, [&](auto* type) { max_pool_backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}
