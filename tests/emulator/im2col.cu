// The operand of a convolution as csrc/cuda/sm90 has TMA load it, by its tensor map and coordinates, against the
// indices of the convolution: host code, which is fast enough for the shapes of real networks.
#include <memory>
#include "cuda/sm90/conv_kernel.cuh"

#include "tensor_map.h"

namespace {

using Kernel = resfuse::sm90::ConvKernel<cutlass::bfloat16_t, 64, 7>;

// Of one tile and step: 64 channels, from `first_channel` on, of the tap (r, s) for 128 output pixels.
long wrong_values(const resfuse::Convolution& conv, const uint16_t* x, const std::vector<emu::Row>& rows, int64_t pixel,
                  int64_t r, int64_t s, int64_t first_channel) {
  long wrong = 0;
  for (const emu::Row& row : rows) {
    const int64_t image = pixel / (conv.out_height * conv.out_width);
    const int64_t y = pixel / conv.out_width % conv.out_height * conv.stride_h - conv.padding_h + r * conv.dilation_h;
    const int64_t column = pixel % conv.out_width * conv.stride_w - conv.padding_w + s * conv.dilation_w;
    const bool inside = image < conv.batch && y >= 0 && y < conv.height && column >= 0 && column < conv.width;
    const uint16_t* source = x + ((image * conv.height + y) * conv.width + column) * conv.channels + first_channel;
    for (uint32_t i = 0; i < 64; ++i) {
      const uint16_t expected = inside && first_channel + i < conv.channels ? source[i] : 0;
      const bool exists = 2 * i >= row.first && 2 * i < row.last;
      wrong += expected != (exists ? reinterpret_cast<const uint16_t*>(row.memory)[i] : 0);
    }
    pixel += 1;
  }
  return wrong;
}

}  // namespace

// Of all values that are loaded, how many are wrong; -1 where the kernel refuses the convolution.
extern "C" __attribute__((visibility("default"))) long wrong_loaded_values(const resfuse::Convolution& conv) {
  using namespace cute;
  if (!Kernel::can_implement(conv)) return -1;
  std::vector<uint16_t> x(conv.batch * conv.height * conv.width * conv.channels),
      w(conv.filters * conv.kernel_h * conv.kernel_w * conv.channels);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i * 7919 % 30011 + 1;
  std::vector<uint16_t> y(conv.batch * conv.out_height * conv.out_width * conv.filters);
  resfuse::sm90::ConvForward args{conv};
  args.input = x.data();
  args.weight = w.data();
  args.output = y.data();
  const auto params = std::make_unique<typename Kernel::Params>(Kernel::params(args));
  long wrong = 0;
  const auto check = [&](const auto& tma, const auto& operand, const auto& rows) {  // (pixel, channel, tile, step)
    const emu::TensorMap& map = emu::tensor_map(reinterpret_cast<uintptr_t>(tma.get_tma_descriptor()));
    const auto steps = shape<3>(operand);
    const int64_t chunks = (conv.channels + 63) / 64;
    for (int tile = 0; tile < size<2>(operand); ++tile) {
      const auto loads = tma.get_slice(Int<0>{}).partition_S(operand(_, _, idx2crd(tile, shape<2>(operand)), _));
      auto step = make_coord_iterator(steps);
      for (int64_t i = 0; i < params->steps; ++i, ++step)  // channels, then S, then R
        wrong += wrong_values(conv, x.data(), rows(map, loads(_, _, _, *step)(Int<0>{})), tile * int64_t{128},
                              i / chunks / conv.kernel_w, i / chunks % conv.kernel_w, i % chunks * 64);
    }
  };
  if (params->is_matrix) {
    typename Kernel::MatrixLoop loop;
    const auto operand = get<0>(loop.load_init(Kernel::matrix_shape(params->shape), params->matrix));
    check(params->matrix.tma_load_a, operand(_, _, _, _, 0), [](const auto& map, const auto& coordinate) {
      const int at[] = {get<0>(coordinate), get<1>(coordinate), get<2>(coordinate)};
      return emu::tiled_rows(map, at);
    });
  } else {
    typename Kernel::Mainloop loop;
    const auto operand = get<0>(loop.load_init(params->shape, params->mainloop));
    check(params->mainloop.tma_load_a, operand, [](const auto& map, const auto& coordinate) {
      const auto [c, wh, n, sr] = coordinate;
      const int at[] = {c, get<0>(wh), get<1>(wh), n}, offsets[] = {get<0>(sr), get<1>(sr)};
      return emu::im2col_rows(map, at, offsets);
    });
  }
  return wrong;
}
