// Chooses how a convolution is computed.

template <class T>
void conv_typed(const ConvForward& args) {
  if (takes_lanes(args)) return conv_lanes<T>(args);
#ifdef RESFUSE_ISA_PAIRS
  if constexpr (sizeof(T) == 2)
    if (args.products == BFloat16Products::pairs && args.weight_dtype == DType::bfloat16)
      return takes_few<T, Pairs>(args) ? conv_few<T, Pairs>(args) : conv_gemm<T, Pairs>(args);
#endif
  if (takes_winograd(args)) return conv_winograd<T>(args);
#if RESFUSE_ISA_LANES == 16
  if (takes_few<T, Floats>(args)) return conv_few<T, Floats>(args);
#endif
  conv_gemm<T, Floats>(args);
}

void conv_forward(const ConvForward& args) {
  const Convolution& conv = args.conv;
  const auto run = [&](const ConvForward& some) {
    with_type(conv.dtype, [&](auto* type) { conv_typed<std::remove_pointer_t<decltype(type)>>(some); });
  };
  const bool pairs = conv.dtype == DType::bfloat16 && args.products == BFloat16Products::pairs;
  if (args.statistics == nullptr || !(takes_lanes(args) || (takes_winograd(args) && !pairs))) return run(args);
  // These paths are faster by more than another look at their output costs.
  ConvForward alone = args;
  alone.statistics = nullptr;
  run(alone);
  const Activation shape = {conv.batch, conv.filters, conv.out_height * conv.out_width, true, conv.dtype};
  statistics(shape, args.output, args.statistics, args.statistics + conv.filters);
}

bool conv_pool_forward(const ConvForward& args, const Pooling& pool) {
  if (takes_lanes(args)) return false;
  return with_type(args.conv.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#ifdef RESFUSE_ISA_PAIRS
    if constexpr (sizeof(T) == 2)
      if (args.products == BFloat16Products::pairs && args.weight_dtype == DType::bfloat16)
        return conv_pool<T, Pairs>(args, pool);
#endif
    // Winograd's path gains more than a pass over its output costs.
    return !takes_winograd(args) && conv_pool<T, Floats>(args, pool);
  });
}

// The best time of a tile of bfloat16 by either way of multiplying, for the same number of products.
double multiply_seconds(BFloat16Products products) {
  constexpr int64_t depth = 256;
  std::vector<float> pixels(kTilePixels * depth), panel((depth + 32) * kPanel), vectors(kPanel);
  std::vector<bf16> output(kTilePixels * kPanel);
  Tile tile{};
  tile.pixels[0] = reinterpret_cast<const char*>(pixels.data());
  tile.pixels[1] = tile.pixels[0] + kTileRows * depth * 4;
  tile.pixel_bytes = depth * 4;
  tile.panel = panel.data();
  tile.tap_rows = tile.tap_columns = 1;
  tile.run = products == BFloat16Products::pairs ? depth / 2 : depth;
  tile.centre = tile.scale = tile.shift = vectors.data();
  tile.output = output.data();
  tile.output_stride = tile.filters = kPanel;
  double best = 1;
  for (int64_t i = 0; i < 40; ++i) {
    const auto start = std::chrono::steady_clock::now();
#ifdef RESFUSE_ISA_PAIRS
    if (products == BFloat16Products::pairs)
      multiply<bf16, Pairs>(tile, kPanel, 2, kTileRows);
    else
#endif
      multiply<bf16, Floats>(tile, kPanel, 2, kTileRows);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}
