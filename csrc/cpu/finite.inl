// What a primitive whose ReLU maps NaN to 0 needs around it (see resfuse/backends/cpu_conv.py).

// Exponent all ones: infinite or NaN.
template <class T>
RESFUSE_INLINE i32x16 not_finite(const T* values, Full lanes) {
  const u32x16 bits = (u32x16)load(values, lanes);
  return (bits & 0x7f800000u) == 0x7f800000u;
}

template <class T>
bool rows_live_typed(const RowsLive& args) {
  const T* values = static_cast<const T*>(args.values);
  std::atomic<bool> live{true};
  parallel_for(0, args.rows, ceil_div(kGrain, args.channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && live.load(std::memory_order_relaxed); ++row) {
      const T* pixel = values + row * args.channels;
      bool found = false;
      for (int64_t c = 0; c < args.channels && !found; ++c) {
        const float value = load(pixel + c, Part{1})[0];
        found = value > 0.0f && value <= std::numeric_limits<float>::max();
      }
      if (!found) live.store(false, std::memory_order_relaxed);
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
    if (output != nullptr) std::memcpy(output + begin, input + begin, (end - begin) * sizeof(T));
    i32x16 bad = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) bad |= not_finite(input + i, Full{});
    bool any = false;
    for (; i < end; ++i) any |= !std::isfinite(load(input + i, Part{1})[0]);
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
