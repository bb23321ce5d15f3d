// add_relu: one pass; reads two tensors and writes one, forward as backward.

template <class T>
void add_relu_forward_typed(const AddReluForward& args) {
  const T *input = static_cast<const T*>(args.input), *residual = static_cast<const T*>(args.residual);
  T* output = static_cast<T*>(args.output);
  parallel_for(0, args.numel, kGrain, [=](int64_t begin, int64_t end) {
    each_block(end - begin, [&](int64_t i, auto lanes) {
      store(output + begin + i, relu(load(input + begin + i, lanes) + load(residual + begin + i, lanes)), lanes);
    });
  });
}

template <class T>
void add_relu_backward_typed(const AddReluBackward& args) {
  const T *grad_output = static_cast<const T*>(args.grad_output), *output = static_cast<const T*>(args.output);
  T* grad_input = static_cast<T*>(args.grad_input);
  parallel_for(0, args.numel, kGrain, [=](int64_t begin, int64_t end) {
    each_block(end - begin, [&](int64_t i, auto lanes) {
      const f32x16 grad = load(grad_output + begin + i, lanes);
      store(grad_input + begin + i, relu_mask(grad, load(output + begin + i, lanes)), lanes);
    });
  });
}

void add_relu_forward(const AddReluForward& args) {
  with_type(args.dtype, [&](auto* type) { add_relu_forward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}

void add_relu_backward(const AddReluBackward& args) {
  with_type(args.dtype, [&](auto* type) { add_relu_backward_typed<std::remove_pointer_t<decltype(type)>>(args); });
}
