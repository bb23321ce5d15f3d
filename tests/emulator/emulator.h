// Test-only: lets a .cu kernel source compile with g++ and run on the CPU.
//   g++ -x c++ -include emulator.h -I<here> -I$CUDA_HOME/include kernel.cu cuda_emu.cpp
// Types (dim3, uint4, half, bfloat16, ...) are NVIDIA's own host headers; only the
// execution model is emulated. Each CUDA thread is a fiber, each block lives on one
// OS thread (so `__shared__` can be thread_local), see cuda_emu.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include <vector_types.h>
#include <vector_functions.h>
#include <driver_types.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>

#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __constant__
#undef __grid_constant__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __constant__
#define __grid_constant__

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emu {

// ---- runtime (cuda_emu.cpp, never compiled with a sanitizer) --------------------------
void launch(const std::function<void()>& body, dim3 grid, dim3 block, size_t smem, bool coop);
unsigned char* dyn_smem(size_t* bytes = nullptr);
[[noreturn]] void fail(const char* fmt, ...);          // aborts the launch, launch() throws
int barrier(int pred, const char* file, int line);     // returns the number of true preds
void grid_sync(const char* file, int line);
void fence();
// Warp collective: blocks until all live lanes of `mask` are here, then `fn` runs once on
// the operands of all lanes (op[l] is null for absent lanes) and all lanes go on.
using WarpFn = void (*)(void** op, unsigned mask);
void collective(unsigned mask, WarpFn fn, void* op, bool orders_memory = false);
unsigned lane();
struct Shfl { const void* in; void* out; size_t size; int src; };
void shfl_fn(void** op, unsigned mask);
struct Vote { unsigned pred, out; };
void vote_fn(void** op, unsigned mask);
struct Rows { const void* row; bool trans; const unsigned char* rows[4][2]; };
void rows_fn(void** op, unsigned mask);
struct Mma { const uint32_t *a, *b; float* d; };
enum class MmaType { bf16, f16, tf32 };
template <MmaType> void mma_fn(void** op, unsigned mask);

// ---- cp.async: data arrive only at wait_group; until then the target holds NaNs -------
struct Copy { void* dst; unsigned n, group; unsigned char data[16]; };
struct AsyncQueue { std::vector<Copy> q; unsigned committed = 0; };
AsyncQueue& async_queue();

inline void check_smem(const void* p, size_t n, const char* what) {
  size_t size;
  const unsigned char *s = dyn_smem(&size), *c = static_cast<const unsigned char*>(p);
  if (c < s || c + n > s + size) fail("%s: address is outside dynamic shared memory", what);
  if (reinterpret_cast<uintptr_t>(p) % n) fail("%s: misaligned shared address", what);
}
inline void cp_async(void* dst, const void* src, unsigned n, unsigned src_n) {
  check_smem(dst, n, "cp.async");
  if (src_n && reinterpret_cast<uintptr_t>(src) % n) fail("cp.async: misaligned global address");
  AsyncQueue& a = async_queue();
  Copy c{dst, n, a.committed, {}};
  std::memcpy(c.data, src, src_n);   // seen by ASan at the line of the kernel
  std::memset(dst, 0xFF, n);         // target undefined from now on (finds WAR hazards)
  a.q.push_back(c);
}
inline void cp_async_commit() { async_queue().committed++; }
inline void cp_async_wait(unsigned pending) {
  AsyncQueue& a = async_queue();
  size_t kept = 0;
  for (Copy& c : a.q)
    if (c.group + pending < a.committed) std::memcpy(c.dst, c.data, c.n);
    else a.q[kept++] = c;
  a.q.resize(kept);
}
template <int N> void ldmatrix(uint32_t (&r)[N], const void* row, bool trans = false) {
  if (lane() < N * 8) check_smem(row, 16, "ldmatrix");
  Rows x{row, trans, {}};
  collective(~0u, rows_fn, &x);
  const unsigned g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < N; i++)
    if (trans)
      for (int j = 0; j < 2; j++)
        std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * j, x.rows[i][j] + 2 * g, 2);
    else
      std::memcpy(&r[i], x.rows[i][0] + 4 * t, 4);
}
template <MmaType T> void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma m{a, b, d};
  collective(~0u, mma_fn<T>, &m);
}

template <class T> T shfl(unsigned mask, T v, int src, int width, bool inside) {
  const int l = int(lane()), base = l & ~(width - 1);
  T out{};
  Shfl s{&v, &out, sizeof(T), inside && src >= base && src < base + width ? src : l};
  collective(mask, shfl_fn, &s);
  return out;
}
inline unsigned vote(unsigned mask, bool p) {
  Vote v{p, 0};
  collective(mask, vote_fn, &v);
  return v.out;
}
template <class T, class F> T rmw(T* p, F f) {   // any 1/2/4/8-byte T
  T old, now;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do { now = f(old); }
  while (!__atomic_compare_exchange(p, &old, &now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace emu

// ---- CUDA built-ins --------------------------------------------------------------------
#define EMU_HERE const char *f = __builtin_FILE(), int l = __builtin_LINE()
inline void __syncthreads(EMU_HERE) { emu::barrier(0, f, l); }
inline int __syncthreads_count(int p, EMU_HERE) { return emu::barrier(p != 0, f, l); }
inline int __syncthreads_or(int p, EMU_HERE) { return emu::barrier(p != 0, f, l) != 0; }
inline int __syncthreads_and(int p, EMU_HERE) { return emu::barrier(p == 0, f, l) == 0; }
inline void __syncwarp(unsigned m = ~0u) { emu::collective(m, [](void**, unsigned) {}, nullptr, true); }
template <class T> T __shfl_sync(unsigned m, T v, int s, int w = 32) {
  return emu::shfl(m, v, (int(emu::lane()) & ~(w - 1)) + (s & (w - 1)), w, true);
}
template <class T> T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  return emu::shfl(m, v, int(emu::lane()) ^ x, w, true);
}
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  return emu::shfl(m, v, int(emu::lane() + d), w, d < 32);
}
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  return emu::shfl(m, v, int(emu::lane()) - int(d), w, d < 32);
}
inline unsigned __ballot_sync(unsigned m, int p) { return emu::vote(m, p != 0); }
inline int __any_sync(unsigned m, int p) { return emu::vote(m, p != 0) != 0; }
inline int __all_sync(unsigned m, int p) { return emu::vote(m, p == 0) == 0; }
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T, class U> T atomicAdd(T* p, U v) { return emu::rmw(p, [=](T o) { return T(o + T(v)); }); }
template <class T, class U> T atomicMax(T* p, U v) { return emu::rmw(p, [=](T o) { return o < T(v) ? T(v) : o; }); }
template <class T, class U> T atomicExch(T* p, U v) { return emu::rmw(p, [=](T) { return T(v); }); }
template <class T> T atomicCAS(T* p, T c, T v) { return emu::rmw(p, [=](T o) { return o == c ? v : o; }); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
using std::max;
using std::min;
#undef EMU_HERE
