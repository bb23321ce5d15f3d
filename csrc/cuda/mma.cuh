// Tensor-core instructions of a warp (sm_80): ldmatrix and mma.sync.
//
// Fragments of d[16][8] += a[16][k] b[k][8], with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments"):
//
//   a[0] rows g, k-bytes 4 t ..        a[2] rows g, k-bytes 16 + 4 t ..       a register is 4 bytes along k:
//   a[1] rows g + 8, same              a[3] rows g + 8, same                  two 16-bit values or one tf32
//   b[0] column g, k-bytes 4 t ..      b[1] column g, k-bytes 16 + 4 t ..
//   d[0], d[1] row g, columns 2 t, 2 t + 1                                    d[2], d[3] row g + 8, same
//
// One mma takes 32 bytes along k whatever the type, so all types share the addresses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "async_copy.cuh"

namespace resfuse::cuda {

// Four 8x8 matrices of 16-bit values; lanes 8 i .. 8 i + 7 give the addresses of the 16-byte rows of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
#ifdef RESFUSE_CUDA_EMULATOR
  emu::ldmatrix(registers, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The arithmetic of a product: `Element` in memory, `prepare` applied to each register of a fragment, and the
// instruction.
struct Bf16 {
  using Element = __nv_bfloat16;
  static constexpr bool kTensorCores = true;
  static __device__ __forceinline__ uint32_t prepare(uint32_t pair) { return pair; }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef RESFUSE_CUDA_EMULATOR
    emu::mma<emu::MmaType::bf16>(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

struct Fp16 {
  using Element = __half;
  static constexpr bool kTensorCores = true;
  static __device__ __forceinline__ uint32_t prepare(uint32_t pair) { return pair; }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef RESFUSE_CUDA_EMULATOR
    emu::mma<emu::MmaType::f16>(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

struct Tf32 {
  using Element = float;
  static constexpr bool kTensorCores = true;
  // Round to nearest, 10 bits of mantissa: the instruction itself truncates, which biases every sum.
  static __device__ __forceinline__ uint32_t prepare(uint32_t bits) {
#ifdef RESFUSE_CUDA_EMULATOR
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
#else
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
#endif
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef RESFUSE_CUDA_EMULATOR
    emu::mma<emu::MmaType::tf32>(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

// IEEE float32 by FMA on CUDA cores.
struct Fp32 {
  using Element = float;
  static constexpr bool kTensorCores = false;
};

}  // namespace resfuse::cuda
