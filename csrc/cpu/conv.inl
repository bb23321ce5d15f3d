// Chooses how a convolution is computed.

template <class T>
void conv_typed(const ConvForward& args) {
#ifdef RESFUSE_ISA_PAIRS
  if constexpr (sizeof(T) == 2)
    if (args.pairs && args.weight_dtype == DType::bfloat16) return conv_gemm<T, Pairs>(args);
#endif
  conv_gemm<T, Floats>(args);
}

void conv_forward(const ConvForward& args) {
  with_type(args.conv.dtype, [&](auto* type) { conv_typed<std::remove_pointer_t<decltype(type)>>(args); });
}
