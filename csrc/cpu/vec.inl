// Sixteen floats at a time.  GCC's and Clang's generic vectors become two AVX2, one AVX-512 or four NEON/SSE registers,
// whichever the including file compiles for.
using f32x16 = float __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using f64x16 = double __attribute__((vector_size(128)));

#define RESFUSE_INLINE inline __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};

constexpr int64_t kLanes = 16;

// f(part of a, part of b) for each register of two vectors.  For what depends on a comparison: GCC 12 takes selections
// that are wider than a register apart, element by element.
template <class F>
RESFUSE_INLINE f32x16 by_registers(f32x16 a, f32x16 b, F f) {
  constexpr int64_t parts = kLanes / RESFUSE_ISA_LANES;
  using Register = float __attribute__((vector_size(RESFUSE_ISA_LANES * 4)));
  Register first[parts], second[parts];
  __builtin_memcpy(first, &a, sizeof a);
  __builtin_memcpy(second, &b, sizeof b);
  for (int64_t i = 0; i < parts; ++i) first[i] = f(first[i], second[i]);
  __builtin_memcpy(&a, first, sizeof a);
  return a;
}

struct Full {};  // all sixteen lanes
struct Part {    // the last block of a row
  int64_t lanes;
};

RESFUSE_INLINE void copy_bytes(void* to, const void* from, Full, int64_t size) {
  __builtin_memcpy(to, from, kLanes * size);
}
RESFUSE_INLINE void copy_bytes(void* to, const void* from, Part part, int64_t size) {
  __builtin_memcpy(to, from, part.lanes * size);
}
template <class Lanes>
RESFUSE_INLINE f32x16 load(const float* from, Lanes lanes) {
  f32x16 value = {};
  copy_bytes(&value, from, lanes, sizeof(float));
  return value;
}
template <class Lanes>
RESFUSE_INLINE void store(float* to, f32x16 value, Lanes lanes) {
  copy_bytes(to, &value, lanes, sizeof(float));
}
template <class Lanes>
RESFUSE_INLINE f32x16 load(const bf16* from, Lanes lanes) {
  u16x16 half = {};
  copy_bytes(&half, from, lanes, sizeof(bf16));
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}
template <class Lanes>
RESFUSE_INLINE void store(bf16* to, f32x16 value, Lanes lanes) {
  const auto round = [](auto part, auto) __attribute__((always_inline)) {  // to nearest, ties to even
    using Bits = uint32_t __attribute__((vector_size(RESFUSE_ISA_LANES * 4)));
    const Bits bits = (Bits)part, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (decltype(part))(part != part ? (bits >> 16) | 0x40u : rounded);  // NaN stays NaN
  };
  const u16x16 half = __builtin_convertvector((u32x16)by_registers(value, value, round), u16x16);
  copy_bytes(to, &half, lanes, sizeof(bf16));
}

// `value < 0 ? 0 : value` keeps NaN, which max(value, 0) does not.
RESFUSE_INLINE f32x16 relu(f32x16 value) {
  return by_registers(value, value, [](auto part, auto) __attribute__((always_inline)) {
    return part < 0.0f ? decltype(part){} : part;
  });
}
// The gradient passes where the ReLU's output is positive, or NaN (as in torch); what is not above `zero` counts as it.
RESFUSE_INLINE f32x16 relu_mask(f32x16 grad, f32x16 output, float zero = 0.0f) {
  return by_registers(grad, output,
                      [=](auto g, auto y) __attribute__((always_inline)) { return y <= zero ? decltype(g){} : g; });
}

// f(offset, lanes) for [0, count) in blocks of sixteen; the last one may be Part.
template <class F>
RESFUSE_INLINE void each_block(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, Full{});
  if (i < count) f(i, Part{count - i});
}

template <class F>
RESFUSE_INLINE auto with_type(DType dtype, F f) {
  return dtype == DType::float32 ? f(static_cast<float*>(nullptr)) : f(static_cast<bf16*>(nullptr));
}
