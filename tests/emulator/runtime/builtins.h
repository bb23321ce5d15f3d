// CUDA's built-in functions: those that the kernels use, and their nearest neighbours.
#pragma once
#include <cmath>
#include <cstring>

#include "runtime.h"
#include "warp.h"

// ---- barriers and fences ----
#define EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(EMU_CALLER) { emu::barrier(false, file, line); }
inline int __syncthreads_count(int predicate, EMU_CALLER) { return emu::barrier(predicate != 0, file, line); }
inline int __syncthreads_or(int predicate, EMU_CALLER) { return emu::barrier(predicate != 0, file, line) != 0; }
inline int __syncthreads_and(int predicate, EMU_CALLER) { return emu::barrier(predicate == 0, file, line) == 0; }
#undef EMU_CALLER
inline void __syncwarp(unsigned mask = ~0u) {
  emu::collective(mask, [](void* const*, unsigned) {}, nullptr, true);
}
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }

// ---- warps ----
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int own = static_cast<int>(emu::lane());
  return emu::shuffle(mask, value, (own & ~(width - 1)) + (source & (width - 1)), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emu::shuffle(mask, value, static_cast<int>(emu::lane()) ^ lanes, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emu::shuffle(mask, value, static_cast<int>(emu::lane() + delta), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emu::shuffle(mask, value, static_cast<int>(emu::lane()) - static_cast<int>(delta), width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate == 0) == 0; }

// ---- memory: cache hints change no result ----
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldca(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcv(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stwt(T* address, T value) {
  *address = value;
}

// ---- atomics: relaxed, as on a GPU ----
namespace emu {
template <class T, class Function>
T read_modify_write(T* address, Function function) {
  T old, updated;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do updated = function(old);
  while (!__atomic_compare_exchange(address, &old, &updated, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
struct identity {
  using type = T;
};
template <class T>
using as = typename identity<T>::type;  // a parameter from which T is not deduced
}  // namespace emu
template <class T>
T atomicAdd(T* address, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* address, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicAnd(T* address, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicExch(T* address, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, emu::as<T> expected, emu::as<T> value) {
  return emu::read_modify_write(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emu::read_modify_write(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- arithmetic ----
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return std::exp(x); }

// ---- bits ----
namespace emu {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emu
inline unsigned __float_as_uint(float x) { return emu::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emu::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emu::bit_cast<float>(x); }
inline float __int_as_float(int x) { return emu::bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

[[noreturn]] inline void __trap() { emu::fail("__trap()"); }
#define __builtin_assume(condition) ((condition) ? (void)0 : emu::fail("__builtin_assume(%s) is false", #condition))
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
