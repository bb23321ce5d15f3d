// Access to activations, 16 bytes of elements or one element at a time, and to per-channel values.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "../resfuse.h"

namespace resfuse::cuda {

constexpr int kVectorBytes = 16;

// Elements of a 16-byte vector.
template <class T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// max(x, 0) that keeps a NaN, as torch.relu does and fmaxf does not.
__device__ __forceinline__ float relu(float x) { return x <= 0.f ? 0.f : x; }

// The gradient of `relu`, given its output.
__device__ __forceinline__ float masked(float gradient, float output) { return output <= 0.f ? 0.f : gradient; }

// The greatest float that is zero as a T: half of T's least positive value, rounded to even.
template <class T>
constexpr float kRoundedToZero = std::is_same_v<T, float>           ? 0.f
                                 : std::is_same_v<T, __nv_bfloat16> ? 0x1p-134f
                                                                    : 0x1p-25f;

// N adjacent elements: one, or a vector of 16 bytes. A `Word` is the unit of one access.
template <class T, int N>
struct Elements {
  static_assert(N == 1 || N == kVectorSize<T>, "one element, or 16 bytes of them");
  using Word = std::conditional_t<N == 1, T, uint4>;

  // kLast: not read again soon, evict first.
  template <bool kLast = false>
  static __device__ __forceinline__ Word load(const T* from) {
    const auto* word = reinterpret_cast<const Word*>(from);
    if constexpr (kLast) return __ldcs(word);
    return *word;
  }

  template <bool kLast = false>
  static __device__ __forceinline__ void store(T* to, Word word) {
    if constexpr (kLast) {
      __stcs(reinterpret_cast<Word*>(to), word);
    } else {
      __stcg(reinterpret_cast<Word*>(to), word);  // an assignment becomes four stores of 4 bytes
    }
  }

  static __device__ __forceinline__ void unpack(Word word, float (&values)[N]) {
    if constexpr (N == 1) {
      values[0] = to_float(word);
    } else {
      const uint32_t bits[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          values[i] = __uint_as_float(bits[i]);
        } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
          values[2 * i] = __uint_as_float(bits[i] << 16);
          values[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
        } else {
          const float2 pair = __half22float2(reinterpret_cast<const __half2&>(bits[i]));
          values[2 * i] = pair.x;
          values[2 * i + 1] = pair.y;
        }
      }
    }
  }

  static __device__ __forceinline__ Word pack(const float (&values)[N]) {
    if constexpr (N == 1) {
      return from_float<T>(values[0]);
    } else {
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          bits[i] = __float_as_uint(values[i]);
        } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
          bits[i] = reinterpret_cast<const uint32_t&>(pair);
        } else {
          const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
          bits[i] = reinterpret_cast<const uint32_t&>(pair);
        }
      }
      return {bits[0], bits[1], bits[2], bits[3]};
    }
  }
};

// Element `channel` in float32; `absent` where there is no vector. T is the dtype of the activations.
template <class T>
__device__ __forceinline__ float channel_value(const ChannelVector& vector, int channel, float absent) {
  if (vector.data == nullptr) return absent;
  if (vector.dtype == DType::float32) return static_cast<const float*>(vector.data)[channel];
  return to_float(static_cast<const T*>(vector.data)[channel]);
}

template <class T>
__device__ __forceinline__ void set_channel_value(const ChannelVector& vector, int channel, float value) {
  if (vector.dtype == DType::float32) {
    static_cast<float*>(vector.data)[channel] = value;
  } else {
    static_cast<T*>(vector.data)[channel] = from_float<T>(value);
  }
}

// Per channel: the argument of a ReLU without a residual, with scale = invstd weight. Forward's arithmetic, and
// backward's where it computes the sign of the output again.
struct Affine {
  float mean, scale, shift;

  __device__ __forceinline__ float operator()(float x) const { return fmaf(x - mean, scale, shift); }
};

template <class T, class Args>
__device__ Affine affine(const Args& args, int channel, float mean, float invstd) {
  return {mean, invstd * channel_value<T>(args.weight, channel, 1.f), channel_value<T>(args.bias, channel, 0.f)};
}

// Calls function(T{}) with the element type that `dtype` names.
template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::bfloat16:
      return function(__nv_bfloat16{});
    case DType::float16:
      return function(__half{});
  }
}

// True if all pointers (null ones included) can be read as 16-byte vectors.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

}  // namespace resfuse::cuda
