// Small kernels that try the emulator itself: each makes one mistake, or uses one feature. `probe` runs one by name.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <functional>
#include <map>
#include <string>

#include "cuda/launch.cuh"
#include "tensor_map.h"

namespace {

namespace cg = cooperative_groups;
using resfuse::cuda::launch;

// ---- mistakes ----

__global__ void divergent_warp(float* out) {
  const float value = threadIdx.x;
  out[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(~0u, value, 1) : (__syncwarp(), value);
}

__global__ void deadlock(float* out) {
  threadIdx.x < 16 ? __syncwarp() : __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void lane_not_in_mask(float* out) { out[threadIdx.x] = __shfl_sync(0xffffu, out[threadIdx.x], 0); }

__global__ void misaligned_vector(float* out) {
  RESFUSE_DYNAMIC_SHARED(shared);
  out[threadIdx.x] = reinterpret_cast<const float4*>(shared + 4)->x;
}

__global__ void misaligned_copy(float* out) {
  RESFUSE_DYNAMIC_SHARED(shared);
  emu::cp_async(shared + 16 * threadIdx.x, out + 1, 16, 16);
}

__global__ void copy_beyond_shared(float* out) {
  RESFUSE_DYNAMIC_SHARED(shared);
  emu::cp_async(shared + 1024, out, 16, 16);
}

__global__ void index_beyond_array(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void write_beyond_shared(float*) {
  RESFUSE_DYNAMIC_SHARED(shared);
  reinterpret_cast<float*>(shared)[256 + threadIdx.x] = 1;
}

__global__ void missing_syncwarp(float* out) {
  RESFUSE_DYNAMIC_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void blocks_write_one_address(float* out) { out[threadIdx.x] = blockIdx.x; }

__global__ void some_blocks_skip_the_grid_barrier(float* out) {
  if (blockIdx.x != 1) cg::this_grid().sync();
  out[threadIdx.x] = 1;
}

__global__ void mbarrier_without_init(float*) { emu::mbarrier_arrive(0); }

__global__ void one_arrival_too_many(float*) {
  if (threadIdx.x == 0) emu::mbarrier_init(0, 31);
  __syncwarp();
  if (threadIdx.x == 0) emu::mbarrier_expect(0, 16);  // so that the phase does not end
  emu::mbarrier_arrive(0);
}

__global__ void wait_two_phases_behind(float*) {
  if (threadIdx.x > 0) return;
  emu::mbarrier_init(0, 1);
  for (int phase = 0; phase < 2; ++phase) emu::mbarrier_arrive(0);
  emu::mbarrier_wait(0, 0);
}

__global__ void bytes_that_never_come(float*) {
  if (threadIdx.x > 0) return;
  emu::mbarrier_init(0, 1);
  emu::mbarrier_arrive_expect(0, 16);
}

__global__ void barrier_of_other_size(float*) { emu::named_barrier(1, threadIdx.x < 32 ? 64 : 96, true); }

// ---- features: out[thread of the grid] is 1 where all is well ----

__global__ void shared_memory_starts_as_nan(float* out) {
  RESFUSE_DYNAMIC_SHARED(dynamic);
  __shared__ float fixed[64];
  const float value = reinterpret_cast<const float*>(dynamic)[threadIdx.x];
  out[blockIdx.x * blockDim.x + threadIdx.x] = isnan(value) && isnan(fixed[threadIdx.x]);
  fixed[threadIdx.x] = 0;  // of this block: the next one finds NaN again
}

__global__ void shared_memory_is_the_blocks_own(float* out) {
  __shared__ unsigned own;
  if (threadIdx.x == 0) own = blockIdx.x;
  cg::this_grid().sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = own == blockIdx.x;
}

__global__ void atomics(float* out, unsigned* counter) {
  __shared__ unsigned last;
  atomicAdd(&counter[1], 1u);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&counter[0], 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) {
    __threadfence();
    out[threadIdx.x] = counter[1] == gridDim.x * blockDim.x;
  }
}

__global__ void votes_and_shuffles(float* out) {
  const unsigned lane = threadIdx.x % 32;
  bool good = __ballot_sync(~0u, lane % 3 == 0) == 0x49249249u;
  good &= __any_sync(~0u, lane == 31) && !__all_sync(~0u, lane == 31) && __all_sync(~0u, 1);
  good &= __shfl_sync(~0u, lane, 37) == 5 && __shfl_sync(~0u, lane, 1, 8) == lane / 8 * 8 + 1;
  good &= __shfl_xor_sync(~0u, double(lane), 16) == (lane ^ 16);
  good &= __shfl_down_sync(~0u, lane, 4, 8) == (lane % 8 < 4 ? lane + 4 : lane);
  good &= __shfl_up_sync(~0u, lane, 1) == (lane > 0 ? lane - 1 : 0);
  if (lane < 8) good &= __shfl_xor_sync(0xffu, lane, 7) == 7 - lane;
  good &= __syncthreads_count(lane == 3) == int(blockDim.x / 32);
  good &= __syncthreads_or(threadIdx.x == 40) && !__syncthreads_and(threadIdx.x == 40);
  out[blockIdx.x * blockDim.x + threadIdx.x] = good;
}

__global__ void threads_that_returned_do_not_block(float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (threadIdx.x % 2) return;
  __syncwarp();
  __syncthreads();
}

__global__ void copies_arrive_when_waited_for(float* out, const float* ones) {
  RESFUSE_DYNAMIC_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared) + 4 * threadIdx.x;
  emu::cp_async(values, ones, 16, 16);
  emu::cp_async_commit();
  emu::cp_async(values + 256, ones, 16, 4);
  emu::cp_async_commit();
  const bool early = !isnan(values[0]);
  emu::cp_async_wait(1);
  const bool first = values[0] == 1 && values[3] == 1 && isnan(values[256]);
  emu::cp_async_wait(0);
  out[threadIdx.x] = !early && first && values[256] == 1 && values[257] == 0 && values[259] == 0;
}

// d = a b with a[m][k] and b[k][n] small integers; rows of 32 bytes of k, as every type has them. One warp.
template <emu::MmaType type, class T, bool transposed>
__global__ void matrix_product(float* out) {
  constexpr int kK = 32 / sizeof(T), kColumn = transposed ? 1 : kK, kRow = transposed ? 8 : 1;
  RESFUSE_DYNAMIC_SHARED(shared);
  T *a = reinterpret_cast<T*>(shared), *b = a + 16 * kK;  // b[n][k], or b[k][n] where it is transposed
  const auto a_at = [](int m, int k) { return static_cast<float>((3 * m + 5 * k) % 7 - 3); };
  const auto b_at = [](int k, int n) { return static_cast<float>((2 * k + 7 * n) % 5 - 2); };
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * kK; i += 32) a[i] = static_cast<T>(a_at(i / kK, i % kK));
  for (int i = lane; i < 8 * kK; i += 32) b[i % 8 * kColumn + i / 8 * kRow] = static_cast<T>(b_at(i / 8, i % 8));
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[2];
  float d[4] = {1, 1, 1, 1};
  emu::ldmatrix(a_fragment, reinterpret_cast<unsigned char*>(a + lane % 16 * kK) + lane / 16 * 16);
  if (transposed)
    emu::ldmatrix(b_fragment, b + lane % 16 * 8, true);
  else
    emu::ldmatrix(b_fragment, reinterpret_cast<unsigned char*>(b + lane % 8 * kK) + lane % 16 / 8 * 16);
  emu::mma<type>(d, a_fragment, b_fragment);
  bool good = true;
  for (int i = 0; i < 4; ++i) {
    float expected = 1;
    for (int k = 0; k < kK; ++k) expected += a_at(lane / 4 + i / 2 * 8, k) * b_at(k, lane % 4 * 2 + i % 2);
    good &= d[i] == expected;
  }
  out[lane] = good;
}

// The same with wgmma, b[k][n] with 64 columns: K-major operands in the second 32 bytes of each swizzled row, if it has
// so many.
template <emu::MmaType type, class T, int kSwizzle>
__global__ void warpgroup_product(float* out) {
  constexpr int kK = 32 / sizeof(T), kPitch = 16 << kSwizzle, kBegin = kPitch > 32 ? 32 : 0;
  RESFUSE_DYNAMIC_SHARED(shared);
  const auto a_at = [](int m, int k) { return static_cast<float>((3 * m + 5 * k) % 7 - 3); };
  const auto b_at = [](int n, int k) { return static_cast<float>((2 * k + 7 * n) % 5 - 2); };
  const auto fill = [&](unsigned start, const auto& value) {
    for (int i = threadIdx.x; i < 64 * kK; i += 128) {
      const unsigned address = start + i / kK * kPitch + kBegin + i % kK * sizeof(T);
      *reinterpret_cast<T*>(shared + emu::swizzled(address, kSwizzle)) = static_cast<T>(value(i / kK, i % kK));
    }
  };
  const unsigned b_start = 64 * kPitch;
  fill(0, a_at);
  fill(b_start, b_at);
  emu::fence_proxy_async();
  __syncthreads();
  const uint64_t layout = uint64_t{4 - kSwizzle} << 62 | uint64_t{8 * kPitch / 16} << 32;
  float d[32], *registers[32];
  for (int i = 0; i < 32; ++i) *(registers[i] = &d[i]) = 1;
  emu::wgmma_fence();
  emu::wgmma({type, 32, layout | kBegin / 16, layout | (b_start + kBegin) / 16, true, false, false}, registers);
  emu::wgmma_commit();
  bool good = isnan(d[0]) && isnan(d[31]);
  emu::wgmma_wait(0);
  for (int i = 0; i < 32; ++i) {
    const int m = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8,
              n = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    float expected = 1;
    for (int k = 0; k < kK; ++k) expected += a_at(m, k) * b_at(n, k);
    good &= d[i] == expected;
  }
  out[threadIdx.x] = good;
}

// A product of registers and shared memory that nothing has ordered before it.
__global__ void warpgroup_product_without(float*, bool registers_fence) {
  RESFUSE_DYNAMIC_SHARED(shared);
  shared[threadIdx.x] = 0;
  __syncthreads();
  float d[32] = {}, *registers[32];
  for (int i = 0; i < 32; ++i) registers[i] = &d[i];
  if (registers_fence) emu::wgmma_fence();
  const uint64_t layout = uint64_t{1} << 62 | uint64_t{64} << 32;
  emu::wgmma({emu::MmaType::bf16, 32, layout, layout, false, false, false}, registers);
  emu::wgmma_commit();
  emu::wgmma_wait(0);
}

__global__ void half_of_a_warp_multiplies(float* out) {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (threadIdx.x < 16) emu::mma<emu::MmaType::bf16>(d, a, b);
  out[threadIdx.x] = d[0];
}

// Rows of 64 bytes: those of one matrix lie in two of the eight groups of banks.
__global__ void matrix_rows_with_bank_conflicts(float* out) {
  RESFUSE_DYNAMIC_SHARED(shared);
  uint32_t registers[1];
  emu::ldmatrix(registers, shared + threadIdx.x % 8 * 64);
  out[threadIdx.x] = 1;
}

// The order in which warps pass: with seeds, not always that of their numbers.
__global__ void order_of_warps(float* out, unsigned* counter) {
  __syncthreads();
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = static_cast<float>(atomicAdd(counter, 1u));
}

std::string message;

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Runs a kernel; `out` has 256 elements of 1 behind it and `counter` two of 0. Returns what it threw, or null.
EXPORTED const char* probe(const char* name, float* out, unsigned* counter) {
  const dim3 warp(32), two_warps(64);
  const auto plain = [=](auto* kernel, unsigned blocks, dim3 block, bool cooperative = false) {
    launch(kernel, dim3(blocks), block, 1024, nullptr, cooperative, out);
  };
  const auto warpgroup = [](auto* kernel, auto... arguments) {
    launch(kernel, dim3(1), dim3(128), 16 << 10, nullptr, false, arguments...);
  };
  const std::map<std::string, std::function<void()>> probes{
      {"divergent_warp", [=] { plain(divergent_warp, 1, warp); }},
      {"deadlock", [=] { plain(deadlock, 1, warp); }},
      {"two_barriers", [=] { plain(two_barriers, 1, two_warps); }},
      {"lane_not_in_mask", [=] { plain(lane_not_in_mask, 1, warp); }},
      {"misaligned_vector", [=] { plain(misaligned_vector, 1, warp); }},
      {"misaligned_copy", [=] { plain(misaligned_copy, 1, warp); }},
      {"copy_beyond_shared", [=] { plain(copy_beyond_shared, 1, warp); }},
      {"index_beyond_array", [=] { plain(index_beyond_array, 1, warp); }},
      {"write_beyond_shared", [=] { plain(write_beyond_shared, 1, warp); }},
      {"missing_syncwarp", [=] { plain(missing_syncwarp, 1, warp); }},
      {"blocks_write_one_address", [=] { plain(blocks_write_one_address, 3, warp); }},
      {"some_blocks_skip_the_grid_barrier", [=] { plain(some_blocks_skip_the_grid_barrier, 3, warp, true); }},
      {"grid_barrier_without_cooperation", [=] { plain(some_blocks_skip_the_grid_barrier, 3, warp); }},
      {"too_many_blocks_to_cooperate", [=] { plain(some_blocks_skip_the_grid_barrier, 5, warp, true); }},
      {"too_many_threads", [=] { plain(deadlock, 1, dim3(1056)); }},
      {"too_much_shared_memory", [=] { launch(deadlock, dim3(1), warp, 228 << 10, nullptr, false, out); }},
      {"mbarrier_without_init", [=] { plain(mbarrier_without_init, 1, warp); }},
      {"one_arrival_too_many", [=] { plain(one_arrival_too_many, 1, warp); }},
      {"wait_two_phases_behind", [=] { plain(wait_two_phases_behind, 1, warp); }},
      {"bytes_that_never_come", [=] { plain(bytes_that_never_come, 1, warp); }},
      {"barrier_of_other_size", [=] { plain(barrier_of_other_size, 1, two_warps); }},
      {"wgmma_without_fence", [=] { warpgroup(warpgroup_product_without, out, false); }},
      {"wgmma_without_proxy_fence", [=] { warpgroup(warpgroup_product_without, out, true); }},
      {"no_blocks", [=] { plain(deadlock, 0, warp); }},
      {"shared_memory_starts_as_nan", [=] { plain(shared_memory_starts_as_nan, 3, two_warps); }},
      {"shared_memory_is_the_blocks_own", [=] { plain(shared_memory_is_the_blocks_own, 4, two_warps, true); }},
      {"atomics", [=] { launch(atomics, dim3(3), two_warps, 0, nullptr, false, out, counter); }},
      {"votes_and_shuffles", [=] { plain(votes_and_shuffles, 2, two_warps); }},
      {"threads_that_returned_do_not_block", [=] { plain(threads_that_returned_do_not_block, 2, two_warps); }},
      {"copies_arrive_when_waited_for",
       [=] { launch(copies_arrive_when_waited_for, dim3(1), two_warps, 2048, nullptr, false, out, out + 256); }},
      {"mma_bf16", [=] { plain(matrix_product<emu::MmaType::bf16, __nv_bfloat16, false>, 1, warp); }},
      {"mma_f16", [=] { plain(matrix_product<emu::MmaType::f16, __half, false>, 1, warp); }},
      {"mma_f16_transposed", [=] { plain(matrix_product<emu::MmaType::f16, __half, true>, 1, warp); }},
      {"mma_tf32", [=] { plain(matrix_product<emu::MmaType::tf32, float, false>, 1, warp); }},
      {"wgmma_bf16", [=] { warpgroup(warpgroup_product<emu::MmaType::bf16, __nv_bfloat16, 3>, out); }},
      {"wgmma_f16", [=] { warpgroup(warpgroup_product<emu::MmaType::f16, __half, 2>, out); }},
      {"wgmma_tf32", [=] { warpgroup(warpgroup_product<emu::MmaType::tf32, float, 1>, out); }},
      {"half_of_a_warp_multiplies", [=] { plain(half_of_a_warp_multiplies, 1, warp); }},
      {"matrix_rows_with_bank_conflicts", [=] { plain(matrix_rows_with_bank_conflicts, 1, warp); }},
      {"order_of_warps", [=] { launch(order_of_warps, dim3(1), dim3(256), 0, nullptr, false, out, counter); }},
  };
  try {
    probes.at(name)();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
