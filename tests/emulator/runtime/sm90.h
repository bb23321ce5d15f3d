// What sm_90 adds: the calls that stand for its PTX in the headers of cutlass.py. Addresses of shared memory are 32-bit
// numbers, as in PTX.
#pragma once
#include <initializer_list>

#include "runtime.h"
#include "tensor_core.h"

namespace emu {

uint32_t shared_address(const void* pointer);
unsigned char* shared_pointer(uint32_t address, size_t bytes);

// ---- mbarriers: a phase ends when all arrivals and all bytes that it expects are there ----
void mbarrier_init(uint32_t barrier, uint32_t count);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier);
void mbarrier_expect(uint32_t barrier, uint32_t bytes);
bool mbarrier_done(uint32_t barrier, uint32_t parity);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  mbarrier_expect(barrier, bytes);
  mbarrier_arrive(barrier);
}
inline void mbarrier_arrive_remote(uint32_t barrier, uint32_t block) {
  block == 0 ? mbarrier_arrive(barrier) : fail("an mbarrier of block %u of the cluster: there are no clusters", block);
}
// Also try_wait, which need not suspend the thread.
inline void mbarrier_test(uint32_t barrier, uint32_t parity, uint32_t& done, uint32_t predicate = 1) {
  done = predicate && mbarrier_done(barrier, parity);
}

// ---- warps ----
void named_barrier(uint32_t id, uint32_t threads, bool wait);
uint32_t elected(uint32_t mask);  // a lane, always the same one of a mask
inline void elect(uint32_t mask, uint32_t& lane_elected, uint32_t& predicate) {
  lane_elected = elected(mask);
  if (lane() == lane_elected) predicate = 1;
}
void setmaxnreg_inc(uint32_t registers);
void setmaxnreg_dec(uint32_t registers);

// ---- TMA: bytes move at a drawn moment; until then a load's target is NaN ----
void prefetch_tensor_map(uint64_t map);
void tma_load(uint64_t map, std::initializer_list<int> at, std::initializer_list<int> im2col_offsets, uint32_t target,
              uint32_t barrier);
void tma_store(uint64_t map, std::initializer_list<int> at, uint32_t source);
void tma_store_commit();
void tma_store_wait(uint32_t pending_groups);
void fence_proxy_async();

// ---- wgmma: operands are read at a drawn moment; accumulators are NaN until wait_group ----
struct Wgmma {
  MmaType type;
  int registers;  // of each thread, float
  uint64_t a, b;  // descriptors of operands in shared memory
  bool accumulate;
  bool negated, transposed;  // which is not emulated
};
void wgmma(const Wgmma& operation, float* const* accumulators);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(uint32_t pending_groups);

// `modifiers` are the factors of a and b, 1 or -1, and for types of 16 bits whether they are transposed.
template <MmaType type, class... Float>
void wgmma(uint64_t a, uint64_t b, int accumulate, std::initializer_list<int> modifiers, Float&... accumulators) {
  float* const pointers[] = {&accumulators...};
  const int* modifier = modifiers.begin();
  const bool negated = modifier[0] != 1 || modifier[1] != 1;
  const bool transposed = modifiers.size() > 2 && (modifier[2] || modifier[3]);
  wgmma({type, sizeof...(Float), a, b, accumulate != 0, negated, transposed}, pointers);
}

// ---- ldmatrix and stmatrix, with registers of their own names ----
template <bool transposed, class... Register>
void ldmatrix_from(uint32_t row, Register&... registers) {
  uint32_t values[sizeof...(Register)];
  ldmatrix(values, shared_pointer(row, 16), transposed);
  const uint32_t* value = values;
  ((registers = *value++), ...);
}
template <class... Register>
void stmatrix(uint32_t row, const Register&... registers) {
  const uint32_t values[] = {registers...};
  store_matrices(values, shared_pointer(row, 16));
}

}  // namespace emu

inline size_t __cvta_generic_to_shared(const void* pointer) { return emu::shared_address(pointer); }
