// What a primitive whose ReLU maps NaN to 0 needs around it (see resfuse/backends/cpu_conv.py).

// Exponent all ones: infinite or NaN.
template <class T, class Lanes>
RESFUSE_INLINE i32x16 not_finite(const T* values, Lanes lanes) {
  const u32x16 bits = (u32x16)load(values, lanes);
  return (bits & 0x7f800000u) == 0x7f800000u;
}

// Lanes that hold a positive finite number: its bits lie between those of 0 and of infinity.
template <class T, class Lanes>
RESFUSE_INLINE bool any_live(const T* values, Lanes lanes) {
  const i32x16 bits = (i32x16)load(values, lanes);
  const i32x16 live = (bits > 0) & (bits < 0x7f800000);
  int32_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= live[lane];
  return any != 0;
}

template <class T>
bool rows_live_typed(const RowsLive& args) {
  const T* values = static_cast<const T*>(args.values);
  const int64_t channels = args.channels;
  std::atomic<bool> live{true};
  parallel_for(0, args.rows, ceil_div(kGrain, kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* pixel = values + row * channels;
      // The first sixteen channels nearly always settle it; a second look goes through the rest.
      bool found = channels >= kLanes ? any_live(pixel, Full{}) : any_live(pixel, Part{channels});
      for (int64_t c = kLanes; c < channels && !found; c += kLanes)
        found = c + kLanes <= channels ? any_live(pixel + c, Full{}) : any_live(pixel + c, Part{channels - c});
      if (!found) {
        live.store(false, std::memory_order_relaxed);
        return;
      }
    }
  });
  return live.load();
}

template <class T>
bool copy_finite_typed(const CopyFinite& args) {
  const T* input = static_cast<const T*>(args.input);
  T* output = static_cast<T*>(args.output);
  std::atomic<bool> finite{true};
  parallel_for(0, args.numel, kGrain, [&](int64_t begin, int64_t end) {
    if (output != nullptr) __builtin_memcpy(output + begin, input + begin, (end - begin) * sizeof(T));
    i32x16 bad = {};
    each_block(end - begin, [&](int64_t i, auto lanes) { bad |= not_finite(input + begin + i, lanes); });
    bool any = false;
    for (int64_t lane = 0; lane < kLanes; ++lane) any |= bad[lane] != 0;
    if (any) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

bool rows_live(const RowsLive& args) {
  return with_type(args.dtype,
                   [&](auto* type) { return rows_live_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

bool copy_finite(const CopyFinite& args) {
  return with_type(args.dtype,
                   [&](auto* type) { return copy_finite_typed<std::remove_pointer_t<decltype(type)>>(args); });
}
