// A visitor for CUTLASS's TMA epilogues (an "EVT" of one node): output = act(accumulator scale + shift + residual) with
// a scale and a shift per output channel in shared memory. On sm_90 our kernel writes them before each tile, and the
// output is rounded by CUTLASS. On sm_100, whose kernel is CUTLASS's, the visitor does both: `Element` says to what.
#pragma once
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "../../resfuse.h"
#include "../batch_statistics.cuh"

namespace resfuse::sm90 {

// Of one output channel.
struct ChannelTerms {
  float conv_bias, mean, variance, weight, bias;
};

// The tensors of the convolution's bias and of batch norm, raw.
struct ChannelVectors {
  ChannelVector conv_bias, mean, variance, weight, bias;
  float eps;

  template <class Element>
  static CUTLASS_DEVICE float value(const ChannelVector& vector, int channel, float absent) {
    if (vector.data == nullptr) return absent;
    if (vector.dtype == DType::float32) return static_cast<const float*>(vector.data)[channel];
    return static_cast<float>(static_cast<const Element*>(vector.data)[channel]);
  }

  template <class Element>
  CUTLASS_DEVICE ChannelTerms terms(int channel) const {
    return {value<Element>(conv_bias, channel, 0.f), value<Element>(mean, channel, 0.f),
            value<Element>(variance, channel, 1.f), value<Element>(weight, channel, 1.f),
            value<Element>(bias, channel, 0.f)};
  }

  CUTLASS_DEVICE void scale_and_shift(const ChannelTerms& raw, float& scale, float& shift) const {
    const bool normalised = variance.data != nullptr;
    scale = normalised ? raw.weight * cuda::inverse_deviation(raw.variance, eps) : raw.weight;
    shift = fmaf(raw.conv_bias - raw.mean, scale, raw.bias);
  }
};

template <int kTileN, class Element = void>
struct BnActEpilogue : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  static constexpr bool kSm100 = !cute::is_void_v<Element>;

  // At run time, and not as template arguments: each combination would compile for a minute.
  struct Arguments {
    bool residual, relu;
    ChannelVectors vectors;
  };
  using Params = Arguments;
  // On sm_100 the operands follow, whose descriptors say that they lie at multiples of 1024 bytes.
  struct alignas(kSm100 ? 1024 : 16) SharedStorage {
    float scale[kTileN], shift[kTileN];
  };

  Params params;
  float *scale, *shift;

  BnActEpilogue() = default;
  CUTLASS_HOST_DEVICE BnActEpilogue(const Params& params, const SharedStorage& shared)
      : params(params), scale(const_cast<float*>(shared.scale)), shift(const_cast<float*>(shared.shift)) {}

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }

  // CUTLASS calls the residual C.
  CUTLASS_DEVICE bool is_producer_load_needed() const { return params.residual; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return params.residual; }

  template <class Shared, class Registers, class Residual>
  struct Callbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    Params params;
    Shared shared_scale, shared_shift;
    Registers scale, shift;
    const Residual& residual;

    CUTLASS_DEVICE Callbacks(const Params& params, const Shared& shared_scale, const Shared& shared_shift,
                             const Registers& like, const Residual& residual)
        : params(params),
          shared_scale(shared_scale),
          shared_shift(shared_shift),
          scale(like),
          shift(like),
          residual(residual) {}

    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }  // other threads have written scale and shift

    CUTLASS_DEVICE void begin_loop(int epi_m, int epi_n) {
      using namespace cute;
      if (epi_m > 0) return;  // the same channels as before
      copy_aligned(filter_zeros(shared_scale(_, _, _, epi_m, epi_n)), filter(scale));
      copy_aligned(filter_zeros(shared_shift(_, _, _, epi_m, epi_n)), filter(shift));
    }

    template <int kSize>
    CUTLASS_DEVICE auto visit(const cutlass::Array<float, kSize>& acc, int part, int, int) {
      using Values = cutlass::Array<typename Residual::value_type, kSize>;
      cutlass::Array<float, kSize> output;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) output[i] = fmaf(acc[i], scale(part * kSize + i), shift(part * kSize + i));
      if (params.residual) {
        const Values added = cute::recast<Values>(residual)(part);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) output[i] += static_cast<float>(added[i]);
      }
      if (params.relu) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) output[i] = output[i] <= 0.f ? 0.f : output[i];  // NaN stays NaN
      }
      return cutlass::NumericArrayConverter<cute::conditional_t<kSm100, Element, float>, float, kSize>{}(output);
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    using namespace cute;
    if constexpr (kSm100) {  // whose former values nobody reads any more since the last tile's stores
      const int first = get<1>(args.tile_coord_mnkl) * kTileN, filters = get<1>(args.problem_shape_mnkl);
      for (int i = args.thread_idx; i < kTileN; i += size(args.tiled_copy))
        if (first + i < filters)
          params.vectors.scale_and_shift(params.vectors.template terms<Element>(first + i), scale[i], shift[i]);
    }
    const auto mine = [&](float* vector) {  // (copy, copy_m, copy_n, epi_m, epi_n)
      const auto rows = make_tensor(make_smem_ptr(vector), make_shape(size<0>(args.tile_shape_mnk), Int<kTileN>{}),
                                    make_stride(_0{}, _1{}));
      return cutlass::epilogue::fusion::detail::sm90_partition_for_epilogue<kReferenceSource>(
          rows, args.epi_tile, args.tiled_copy, args.thread_idx);
    };
    const auto shared_scale = mine(scale), shared_shift = mine(shift);
    const auto like = make_tensor_like<float>(take<0, 3>(shared_scale));
    return Callbacks<remove_cvref_t<decltype(shared_scale)>, remove_cvref_t<decltype(like)>,
                     remove_cvref_t<decltype(args.tCrC)>>(params, shared_scale, shared_shift, like, args.tCrC);
  }
};

// The parameters of a collective epilogue with this visitor, for m pixels of n channels; encodes its tensor maps.
template <class Epilogue>
typename Epilogue::Params epilogue_params(const ConvForward& args, int m, int n) {
  using Element = typename Epilogue::ElementD;
  const auto stride = cute::make_stride(int64_t{n}, cute::_1{}, int64_t{0});
  auto* y = static_cast<Element*>(args.output);
  const bool residual = args.residual != nullptr;
  const auto* c = residual ? static_cast<const Element*>(args.residual) : y;  // a tensor map needs an address
  const ChannelVectors vectors{args.conv_bias, args.running_mean, args.running_var,
                               args.bn_weight, args.bn_bias,      static_cast<float>(args.eps)};
  return Epilogue::to_underlying_arguments(cute::make_shape(m, n, 64, 1),
                                           {{residual, args.relu, vectors}, c, stride, y, stride}, nullptr);
}

}  // namespace resfuse::sm90
