// Kernels that pass over an activation twice, because the second pass needs sums over all of it: one cooperative launch
// with a grid barrier in the middle, or two launches.
#pragma once
#include "reduce.cuh"

namespace resfuse::cuda {

// One block per multiprocessor: fewer parts mean less to merge.
constexpr int kTwoPassThreads = 512;

// A block's shared memory: a Vector per channel of the tile, scratch for merging Values, and the items that are kept.
//
//   | vectors [channels of a tile] | scratch | kept [items][threads] ...
template <class T, int N, class Vector, class Value>
struct TwoPassShared {
  using Word = typename Elements<T, N>::Word;
  Vector* vectors;
  Value* scratch;
  Word* kept;

  __device__ TwoPassShared(unsigned char* shared, const ChannelTiles& t)
      : vectors(reinterpret_cast<Vector*>(shared)),
        scratch(reinterpret_cast<Value*>(shared + vector_bytes())),
        kept(reinterpret_cast<Word*>(shared + fixed_bytes(t))) {}

  static __host__ __device__ size_t vector_bytes() { return kTileChannels * sizeof(Vector); }

  static __host__ __device__ size_t fixed_bytes(const ChannelTiles& t) {
    return vector_bytes() +
           (merge_bytes<Value>(t.slots, t.members, t.lanes) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  }
};

// Launches kernel(args, tiles, items that are kept, phase); each kept item is `words` words per thread. With
// `parts_known`, the workspace has what the first pass computes.
template <class T, int N, class Vector, class Value, class Args>
void launch_two_pass(void (*kernel)(Args, ChannelTiles, int, Phase), const Args& args, int words, void* stream,
                     bool parts_known = false) {
  using Shared = TwoPassShared<T, N, Vector, Value>;
  const size_t limit = shared_memory_limit();
  const ChannelTiles t = cut(args.shape, N, kTwoPassThreads, resident_blocks(kernel, kTwoPassThreads, limit));
  const auto run = [&](Phase phase, int kept, size_t bytes) {
    const bool cooperative = phase == Phase::both && t.parts > 1;
    return launch(kernel, dim3(t.grid()), dim3(t.threads()), bytes, stream, cooperative, args, t, kept, phase);
  };
  const size_t fixed = Shared::fixed_bytes(t), item = words * sizeof(typename Shared::Word) * t.threads();
  if (!parts_known && args.launches != 2 && (t.parts == 1 || can_cooperate())) {
    const int kept = item == 0 ? 0 : std::min(t.most_steps(), static_cast<int>((limit - fixed) / item));
    if (run(Phase::both, kept, fixed + kept * item)) return;
  }
  if (!parts_known) run(Phase::first, 0, fixed);
  run(Phase::second, 0, fixed);
}

// Calls function(T{}, N) with the element type of an activation and the number of elements to read at a time.
template <class Function>
void with_elements(const Activation& shape, bool all_aligned, const Function& function) {
  with_dtype(shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (has_vectors<T>(shape, all_aligned)) {
      function(element, std::integral_constant<int, kVectorSize<T>>{});
    } else {
      function(element, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace resfuse::cuda
