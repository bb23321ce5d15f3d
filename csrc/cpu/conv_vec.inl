// Vectors of one register, in which convolutions keep their sums: RESFUSE_ISA_LANES floats.
constexpr int64_t kWidth = RESFUSE_ISA_LANES;
constexpr int64_t kPanelVectors = RESFUSE_ISA_PANEL;  // registers of filters side by side
constexpr int64_t kPanel = kWidth * kPanelVectors;    // filters of a full panel

using vec = float __attribute__((vector_size(kWidth * 4)));
using vec_u32 = uint32_t __attribute__((vector_size(kWidth * 4)));
using vec_i32 = int32_t __attribute__((vector_size(kWidth * 4)));
using vec_u16 = uint16_t __attribute__((vector_size(kWidth * 2)));
using vec_f64 = double __attribute__((vector_size(kWidth * 8)));

// f(integral_constant) for 0 .. N - 1, unrolled before anything else is optimised: arrays of vectors that are indexed
// so live in registers.
template <class F, int64_t... I>
RESFUSE_INLINE void unrolled_over(F f, std::integer_sequence<int64_t, I...>) {
  (f(std::integral_constant<int64_t, I>{}), ...);
}
template <int64_t N, class F>
RESFUSE_INLINE void unrolled(F f) {
  unrolled_over(f, std::make_integer_sequence<int64_t, N>{});
}

RESFUSE_INLINE vec splat(float value) { return value - vec{}; }  // + would turn -0 to 0, at the cost of an addition
RESFUSE_INLINE vec vload(const float* from) {
  vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
RESFUSE_INLINE void vstore(float* to, vec value) { __builtin_memcpy(to, &value, sizeof value); }
RESFUSE_INLINE vec vload(const bf16* from) {
  vec_u16 half;
  __builtin_memcpy(&half, from, sizeof half);
  return (vec)(__builtin_convertvector(half, vec_u32) << 16);
}
RESFUSE_INLINE vec_u32 rounded_to_bf16(vec value) {  // in the low halves: to nearest, ties to even; NaN stays NaN
  const vec_u32 bits = (vec_u32)value;
  const vec_u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? (bits >> 16) | 0x40u : rounded;
}
RESFUSE_INLINE void vstore(bf16* to, vec value) {
  const vec_u16 half = __builtin_convertvector(rounded_to_bf16(value), vec_u16);
  __builtin_memcpy(to, &half, sizeof half);
}
// The value as it will be read back.
RESFUSE_INLINE vec as_stored(const float*, vec value) { return value; }
RESFUSE_INLINE vec as_stored(const bf16*, vec value) { return (vec)(rounded_to_bf16(value) << 16); }
#if RESFUSE_ISA_LANES == 16
RESFUSE_INLINE vec vpick(vec values, const int32_t* lanes) {  // values[lanes[i]]
  return (vec)_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), (__m512)values);
}
#elif RESFUSE_ISA_LANES == 8
RESFUSE_INLINE vec vpick(vec values, const int32_t* lanes) {
  return (vec)_mm256_permutevar8x32_ps((__m256)values, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
}
#endif
RESFUSE_INLINE vec vrelu(vec value) { return value < 0.0f ? vec{} : value; }

RESFUSE_INLINE float scalar(float value) { return value; }
RESFUSE_INLINE float scalar(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}
RESFUSE_INLINE float value_of(const ConvVector& vector, int64_t i) {
  return vector.dtype == DType::float32 ? static_cast<const float*>(vector.data)[i * vector.stride]
                                        : scalar(static_cast<const bf16*>(vector.data)[i * vector.stride]);
}

// How words are multiplied: `sum` + the word at an address, for all filters, times theirs; and how results are stored.
// A word is four bytes: a float, or with Pairs two bfloat16 of neighbouring channels.
struct Floats {
  static constexpr int64_t channels = 1;  // of a word
  RESFUSE_INLINE static vec multiply_add(vec sum, const char* word, vec filters) {
    float value;
    __builtin_memcpy(&value, word, sizeof value);
    return sum + splat(value) * filters;
  }
  RESFUSE_INLINE static vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }
  template <class T>
  RESFUSE_INLINE static void store(T* to, vec value) {
    vstore(to, value);
  }
};
#ifdef RESFUSE_ISA_PAIRS
struct Pairs {
  static constexpr int64_t channels = 2;
  // Written out, as the rest of this file must not be compiled for processors that have the instruction.
  RESFUSE_INLINE static vec multiply_add(vec sum, const char* word, vec filters) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(filters), "m"(*reinterpret_cast<const uint32_t*>(word)));
    return sum;
  }
  RESFUSE_INLINE static vec multiply_add(vec sum, vec a, vec b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  RESFUSE_INLINE static void store(float* to, vec value) { vstore(to, value); }
  RESFUSE_INLINE static void store(bf16* to, vec value) {
    vec_u16 half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(value));
    __builtin_memcpy(to, &half, sizeof half);
  }
};
#endif
