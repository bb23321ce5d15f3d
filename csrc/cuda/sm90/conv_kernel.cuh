// A persistent, warp-specialised convolution for sm_90a from CUTLASS's collectives: its main loop (TMA im2col, wgmma)
// and its TMA epilogue, in a kernel layer of our own, because CUTLASS's convolutions for sm_90 are not persistent. As a
// GEMM: M = N OH OW, N = K, K = R S C. Where the input itself is that matrix (1x1, stride 1, no padding), CUTLASS's
// main loop of GEMMs loads it: plain boxes instead of im2col's pixels.
//
//   warp 0        loads the operands of all of the block's tiles, as far ahead as there are stages
//   warp 2        loads the residual
//   warps 4 - 11  two consumer warpgroups: multiply, then epilogue, while the loads of the next tile go on
//
// Warps 1 and 3 only complete the producers' warpgroup, which gives its registers to the consumers.
//
// This header is plain C++ but for CUTLASS: tests/emulator runs `Kernel::run` on the CPU.
#pragma once
#include <cutlass/kernel_hardware_info.hpp>  // which the collectives use without including it

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_mma.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "../../resfuse.h"
#include "../batch_statistics.cuh"
#include "bn_act_epilogue.cuh"
#include "conv_problem.cuh"
#include "tile_statistics.cuh"

namespace resfuse::sm90 {

// CUTLASS's convolutions refuse its own tags of persistent kernels; the main loop itself does not depend on them.
struct Persistent {};

// The tiles of a block: in inference every gridDim.x-th, those of neighbouring channels first. In training
// `tiles_per_part` neighbouring ones of the same channels, whose statistics become one part.
struct Schedule {
  int tiles_m, tiles_n, tiles_per_part;  // the last is 0 in inference

  // The grid: in inference no more than are resident.
  int blocks(int resident) const {
    if (tiles_per_part == 0) return cute::min(resident, tiles_m * tiles_n);
    return (tiles_m + tiles_per_part - 1) / tiles_per_part * tiles_n;
  }

  struct Range {
    int first, end, step;
  };
  CUTLASS_DEVICE Range range() const {
    const int block = blockIdx.x, tiles = tiles_m * tiles_n;
    if (tiles_per_part == 0) return {block, tiles, static_cast<int>(gridDim.x)};
    const int part = block / tiles_n, run = tiles_per_part * tiles_n;
    return {part * run + block % tiles_n, cute::min(tiles, (part + 1) * run), tiles_n};
  }
};

template <class Element_, int kTileN_, int kStages>
struct ConvKernel {
  using Element = Element_;
  // Of float32 TMA makes TF32. That it rounds is what CUTLASS's comments say, and to nearest even what Triton's tests
  // found on sm_120; NVIDIA does not document it. If it did not, wgmma would cut the last 13 bits off: then
  // first_contact.py leaves the kernel out.
  using Factor = cute::conditional_t<cute::is_same_v<Element, float>, cutlass::tfloat32_t, Element>;
  static constexpr int kTileN = kTileN_, kTileK = 128 / sizeof(Element), kThreads = kProducers + kConsumers;
  static constexpr int kVector = 16 / sizeof(Element);  // of which TMA wants multiples
  using TileMN = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>>;
  using Tile = decltype(cute::append(TileMN{}, cute::Shape<cute::Int<kTileK>>{}));  // K is (channels, S, R)
  using MatrixTile = decltype(cute::append(TileMN{}, cute::Int<kTileK>{}));
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;

  static constexpr auto kMajor = cute::GMMA::Major::K;
  using TiledMma =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Factor, Factor, float, Tile, kMajor, kMajor>(),
                                    cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  using Swizzled = cute::GMMA::Layout_K_SW128_Atom<Factor>;
  template <class Copy, int kRows>
  using Operand = cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<
      Copy, decltype(cute::tile_to_shape(Swizzled{},
                                         cute::Shape<cute::Int<kRows>, cute::Int<kTileK>, cute::Int<kStages>>{}))>;
  using Mainloop = cutlass::conv::collective::CollectiveConv<
      cutlass::conv::MainloopSm90TmaGmmaWarpSpecializedImplicitGemm<cutlass::conv::Operator::kFprop, kStages, 2,
                                                                    Cluster, Persistent>,
      Tile, Element, Element, TiledMma, Operand<cute::SM90_TMA_LOAD_IM2COL, kTileM>,
      Operand<cute::SM90_TMA_LOAD, kTileN>>;
  using Rows = cute::Stride<int64_t, cute::_1, int64_t>;
  // For its loads alone.
  using MatrixLoop =
      cutlass::gemm::collective::CollectiveMma<cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized<kStages, Cluster>,
                                               MatrixTile, Element, Rows, Element, Rows, TiledMma, cute::SM90_TMA_LOAD,
                                               Swizzled, void, cute::identity, cute::SM90_TMA_LOAD, Swizzled, void,
                                               cute::identity>;
  static_assert(cute::is_same_v<typename MatrixLoop::SmemLayoutA, typename Mainloop::SmemLayoutA> &&
                cute::is_same_v<typename MatrixLoop::SmemLayoutB, typename Mainloop::SmemLayoutB>);
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, MatrixTile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, cutlass::layout::RowMajor, kVector,
      Element, cutlass::layout::RowMajor, kVector, cutlass::epilogue::TmaWarpSpecializedCooperative,
      BnActEpilogue<kTileN>>::CollectiveOp;
  using MainPipe = typename Mainloop::MainloopPipeline;
  using LoadPipe = typename Epilogue::LoadPipeline;
  using StorePipe = typename Epilogue::StorePipeline;

  struct SharedStorage {
    struct Tensors : cute::aligned_struct<1024, cute::_1> {
      typename Mainloop::TensorStorage mainloop;
      typename Epilogue::TensorStorage epilogue;
    } tensors;
    StatisticsScratch<kTileN> statistics;
    alignas(16) typename Mainloop::PipelineStorage main_pipe;
    alignas(16) typename Epilogue::PipelineStorage load_pipe;
  };
  static_assert(sizeof(SharedStorage) <= 226 * 1024);  // what launch.cuh requests of the 227 KiB of sm_90

  using ShapeMNKL = decltype(cutlass::conv::detail::get_linearized_problem_shape_MNKL(Problem{}));
  struct Params {
    ShapeMNKL shape;
    int steps;       // of the main loop
    bool is_matrix;  // which of the next two is used
    typename Mainloop::Params mainloop;
    typename MatrixLoop::Params matrix;
    typename Epilogue::Params epilogue;
    Schedule schedule;
    float* parts;  // training: [parts][mean, M2][filters]
  };

  static bool can_implement(const Convolution& conv) { return Mainloop::can_implement(problem(conv), {}); }

  static CUTLASS_HOST_DEVICE auto matrix_shape(const ShapeMNKL& shape) {
    return cute::make_shape(cute::get<0>(shape), cute::get<1>(shape), cute::get<0>(cute::get<2>(shape)), 1);
  }

  // Encodes the tensor maps.
  static Params params(const ConvForward& args) {
    const Convolution& conv = args.conv;
    const Problem p = problem(conv);
    const auto shape = cutlass::conv::detail::get_linearized_problem_shape_MNKL(p);
    const int m = cute::get<0>(shape), n = cute::get<1>(shape);
    const auto* x = static_cast<const Element*>(args.input);
    const auto* w = static_cast<const Element*>(args.weight);
    const bool is_matrix = conv.kernel_h * conv.kernel_w == 1 && conv.stride_h * conv.stride_w == 1 &&
                           conv.padding_h + conv.padding_w == 0;
    const Rows rows(conv.channels, {}, 0);
    return {shape,
            static_cast<int>((conv.channels + kTileK - 1) / kTileK * conv.kernel_h * conv.kernel_w),
            is_matrix,
            is_matrix ? typename Mainloop::Params{} : Mainloop::to_underlying_arguments(p, {x, w}, nullptr),
            is_matrix ? MatrixLoop::to_underlying_arguments(matrix_shape(shape), {x, rows, w, rows}, nullptr)
                      : typename MatrixLoop::Params{},
            epilogue_params<Epilogue>(args, m, n),
            {(m + kTileM - 1) / kTileM, (n + kTileN - 1) / kTileN, args.tiles_per_part},
            args.parts};
  }

  static CUTLASS_DEVICE MainPipe main_pipe(const Params& params, SharedStorage& shared, bool producer, bool loads) {
    using Category = typename MainPipe::ThreadCategory;
    typename MainPipe::Params p;
    p.role = loads ? Category::Producer : producer ? Category::NonParticipant : Category::Consumer;
    p.is_leader = threadIdx.x % 128 == 0;
    p.num_consumers = kConsumers;
    p.transaction_bytes = params.mainloop.tma_transaction_bytes;
    return MainPipe(shared.main_pipe, p, Cluster{});
  }

  static CUTLASS_DEVICE LoadPipe load_pipe(const Params& params, SharedStorage& shared, bool producer, bool loads) {
    using Category = typename LoadPipe::ThreadCategory;
    typename LoadPipe::Params p;
    p.role = loads ? Category::Producer : producer ? Category::NonParticipant : Category::Consumer;
    p.dst_blockid = 0;
    p.producer_arv_count = 32;
    p.consumer_arv_count = kConsumers;
    p.transaction_bytes = params.epilogue.tma_transaction_bytes;
    return LoadPipe(shared.load_pipe, p);
  }

  // The operands of all of the block's tiles.
  template <class Loop, class Shape>
  static CUTLASS_DEVICE void load(Loop loop, const typename Loop::Params& maps, const Shape& shape,
                                  const Params& params, MainPipe& pipe, SharedStorage& shared) {
    using namespace cute;
    auto& memory = reinterpret_cast<typename Loop::TensorStorage&>(shared.tensors.mainloop);
    const auto inputs = loop.load_init(shape, maps);
    const auto shape_m = cute::shape<2>(get<0>(inputs));
    const auto steps = cute::shape<3>(get<0>(inputs));  // iterators refer to it
    const typename Schedule::Range tiles = params.schedule.range();
    const int tiles_n = params.schedule.tiles_n;
    auto state = cutlass::make_producer_start_state<MainPipe>();
    for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
      const auto at = make_coord(idx2crd(tile / tiles_n, shape_m), tile % tiles_n, _, Int<0>{});
      loop.load(maps, pipe, state, inputs, at, make_coord_iterator(steps), params.steps, 0, 0, memory);
      state.advance(params.steps);
    }
    loop.load_tail(pipe, state);
  }

  static CUTLASS_DEVICE void run(const Params& params, char* memory) {
    using namespace cute;
    auto& shared = *reinterpret_cast<SharedStorage*>(memory);
    const int warp = cutlass::canonical_warp_idx_sync(), lane = cutlass::canonical_lane_idx();
    const bool producer = warp < kProducers / 32;
    if (warp == 0 && elect_one_sync()) {
      if (params.is_matrix)
        MatrixLoop::prefetch_tma_descriptors(params.matrix);
      else
        Mainloop::prefetch_tma_descriptors(params.mainloop);
      Epilogue::prefetch_tma_descriptors(params.epilogue);
    }
    MainPipe main_pipe = ConvKernel::main_pipe(params, shared, producer, warp == 0);
    LoadPipe load_pipe = ConvKernel::load_pipe(params, shared, producer, warp == 2);
    __syncthreads();  // the barriers are initialised

    TiledMma mma;
    Mainloop mainloop;
    Epilogue epilogue(params.epilogue, shared.tensors.epilogue);
    const int steps = params.steps;
    const typename Schedule::Range tiles = params.schedule.range();
    const int tiles_n = params.schedule.tiles_n;
    const auto coordinate = [&](int tile) { return make_coord(tile / tiles_n, tile % tiles_n, _, Int<0>{}); };
    if (producer) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      if (warp == 0) {
        if (params.is_matrix)
          load(MatrixLoop{}, params.matrix, matrix_shape(params.shape), params, main_pipe, shared);
        else
          load(mainloop, params.mainloop, params.shape, params, main_pipe, shared);
      } else if (warp == 2 && epilogue.is_producer_load_needed()) {
        auto state = cutlass::make_producer_start_state<LoadPipe>();
        for (int tile = tiles.first; tile < tiles.end; tile += tiles.step)
          state = epilogue.load(load_pipe, state, params.shape, Tile{}, coordinate(tile), mma, lane,
                                shared.tensors.epilogue);
        epilogue.load_tail(load_pipe, state);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      typename Mainloop::PipelineState state;
      typename Epilogue::LoadPipelineState load_state;
      auto store_state = cutlass::make_producer_start_state<StorePipe>();
      StorePipe store_pipe({true});
      auto& terms = shared.tensors.epilogue.thread;
      const ChannelVectors& vectors = params.epilogue.thread.vectors;
      const int thread = threadIdx.x - kProducers, filters = get<1>(params.shape);
      cuda::Moments moments;
      for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
        const int filter = tile % tiles_n * kTileN + thread;
        const bool has_channel = thread < kTileN && filter < filters;
        ChannelTerms raw{0.f, 0.f, 0.f, 0.f, 0.f};
        if (has_channel)  // before the products, behind which the latency hides
          raw = vectors.template terms<Element>(filter);
        Tensor acc = partition_fragment_C(mma, take<0, 2>(Tile{}));
        mainloop.mma(main_pipe, state, acc, steps, thread, shared.tensors.mainloop, params.mainloop);
        mainloop.mma_tail(main_pipe, state, steps);
        state.advance(steps);
        if (thread < kTileN)  // whose former values nobody reads any more since the last tile's stores
          vectors.scale_and_shift(raw, terms.scale[thread], terms.shift[thread]);
        if (params.parts != nullptr) {
          const int left = get<0>(params.shape) - tile / tiles_n * kTileM, rows = left < kTileM ? left : kTileM;
          float mean, m2;
          tile_statistics<Element>(acc, terms.shift, rows, shared.statistics, mean, m2);
          moments.merge({static_cast<float>(rows), mean, m2});
        }
        auto states = epilogue.store(load_pipe, load_state, store_pipe, store_state, params.shape, Tile{},
                                     coordinate(tile), acc, mma, thread, shared.tensors.epilogue);
        load_state = get<0>(states);
        store_state = get<1>(states);
      }
      epilogue.store_tail(load_pipe, load_state, store_pipe, store_state);
      const int filter = blockIdx.x % tiles_n * kTileN + thread;
      if (params.parts != nullptr && thread < kTileN && filter < filters) {
        float* part = params.parts + static_cast<int64_t>(blockIdx.x / tiles_n) * 2 * filters + filter;
        part[0] = moments.mean;
        part[filters] = moments.m2 + moments.m2_low;
      }
    }
  }
};

}  // namespace resfuse::sm90
