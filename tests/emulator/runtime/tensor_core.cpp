#include "tensor_core.h"

#include <algorithm>
#include <cstring>

#include "statistics.h"

namespace emu {
namespace {

template <class T>
T& operand(void* const* operands, int lane) {
  return *static_cast<T*>(operands[lane]);
}

// Shared memory has 32 banks of 4 bytes, so 8 groups of 16 bytes. The 8 rows of a matrix are read in as many cycles as
// there are different rows in the fullest group.
int cycles(void* const* operands, int matrix) {
  int most = 0;
  for (int i = 0; i < 8; ++i) {
    int same_banks = 0;
    for (int j = 0; j < 8; ++j) {
      const auto a = reinterpret_cast<uintptr_t>(operand<MatrixRows>(operands, 8 * matrix + i).row);
      const auto b = reinterpret_cast<uintptr_t>(operand<MatrixRows>(operands, 8 * matrix + j).row);
      same_banks += a / 16 % 8 == b / 16 % 8 && (a != b || i == j);
    }
    most = std::max(most, same_banks);
  }
  return most;
}

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(uint32_t half) {
  const uint32_t magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000) << 16;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;  // also right for denormals
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  if (magnitude >= 0x7c00u << 13) bits = 0x7f800000u | (magnitude & 0x7fffff);  // infinity and NaN
  return bits_to_float(bits | sign);
}

}  // namespace

float element(MmaType type, uint32_t bits, int half) {
  if (type == MmaType::tf32) return bits_to_float(bits & 0xffffe000u);  // the hardware ignores the low 13 bits
  if (type == MmaType::bf16) return bits_to_float(bits >> 16 * half << 16);
  return half_to_float(bits >> 16 * half & 0xffff);
}

void need_the_whole_warp(unsigned lanes, const char* instruction) {
  if (lanes != ~0u) fail("%s: only lanes %08x of the warp are there", instruction, lanes);
}

void share_rows(void* const* operands, unsigned lanes) {
  need_the_whole_warp(lanes, "ldmatrix or stmatrix");
  const int matrices = operand<MatrixRows>(operands, 0).matrices;
  const bool transposed = operand<MatrixRows>(operands, 0).transposed;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    statistics.ldmatrix_phases += 1;
    statistics.ldmatrix_cycles += cycles(operands, matrix);
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 2; ++j) {
        const int row = transposed ? lane % 4 * 2 + j : lane / 4;
        operand<MatrixRows>(operands, lane).rows[matrix][j] =
            static_cast<const unsigned char*>(operand<MatrixRows>(operands, 8 * matrix + row).row);
      }
  }
}

// Products are exact; sums are fp32, in order of k. The hardware sums in another order, with other roundings.
template <MmaType type>
void multiply(void* const* operands, unsigned lanes) {
  need_the_whole_warp(lanes, "mma");
  constexpr int kPerRegister = type == MmaType::tf32 ? 1 : 2, kK = 8 * kPerRegister;
  float a[16][kK], b[kK][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = operand<MmaOperands>(operands, lane);
    const int group = lane / 4, within = lane % 4;
    for (int half = 0; half < kPerRegister; ++half) {
      const int k = within * kPerRegister + half;
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][k + i / 2 * kK / 2] = element(type, own.a[i], half);
      for (int i = 0; i < 2; ++i) b[k + i * kK / 2][group] = element(type, own.b[i], half);
    }
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][within * 2 + i % 2] = own.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      operand<MmaOperands>(operands, lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template void multiply<MmaType::bf16>(void* const*, unsigned);
template void multiply<MmaType::f16>(void* const*, unsigned);
template void multiply<MmaType::tf32>(void* const*, unsigned);

}  // namespace emu
