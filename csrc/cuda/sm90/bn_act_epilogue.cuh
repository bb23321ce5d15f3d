// A visitor for CUTLASS's TMA epilogue (an "EVT" of one node): output = act(accumulator scale + shift + residual) with
// a scale and a shift per output channel, which the kernel writes to shared memory before each tile.
#pragma once
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

namespace resfuse::sm90 {

template <int kTileN>
struct BnActEpilogue : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  // At run time, and not as template arguments: each combination would compile for a minute.
  struct Arguments {
    bool residual, relu;
  };
  using Params = Arguments;
  struct SharedStorage {
    alignas(16) float scale[kTileN], shift[kTileN];
  };

  Params params;
  float *scale, *shift;

  BnActEpilogue() = default;
  CUTLASS_HOST_DEVICE BnActEpilogue(const Params& params, SharedStorage& shared)
      : params(params), scale(shared.scale), shift(shared.shift) {}

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
    CUTLASS_DEVICE cutlass::Array<float, kSize> visit(const cutlass::Array<float, kSize>& acc, int part, int, int) {
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
      return output;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    using namespace cute;
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

}  // namespace resfuse::sm90
