// ldmatrix, stmatrix and mma.sync, with the fragments' layouts of the PTX manual.
#pragma once
#include <cstring>

#include "runtime.h"

namespace emu {

// Fails unless `lanes` are all 32.
void need_the_whole_warp(unsigned lanes, const char* instruction);

struct MatrixRows {
  const void* row;  // the address that this lane gives
  int matrices;
  bool transposed;
  const unsigned char* rows[4][2];  // those that have its elements: of each matrix
};
Perform share_rows;

// N 8x8 matrices of 16-bit elements: lane 8 i + j has the address of row j of matrix i.
template <int N>
void ldmatrix(uint32_t (&registers)[N], const void* row, bool transposed = false) {
  if (lane() < N * 8) check_shared(row, 16, "ldmatrix");
  MatrixRows own{row, N, transposed, {}};
  collective(~0u, share_rows, &own);
  const unsigned group = lane() / 4, within = lane() % 4;
  for (int i = 0; i < N; ++i) {
    auto* bytes = reinterpret_cast<unsigned char*>(&registers[i]);
    if (transposed) {
      for (int j = 0; j < 2; ++j) std::memcpy(bytes + 2 * j, own.rows[i][j] + 2 * group, 2);
    } else {
      std::memcpy(bytes, own.rows[i][0] + 4 * within, 4);
    }
  }
}

// stmatrix.
template <int N>
void store_matrices(const uint32_t (&registers)[N], void* row) {
  if (lane() < N * 8) check_shared(row, 16, "stmatrix");
  MatrixRows own{row, N, false, {}};
  collective(~0u, share_rows, &own);
  for (int i = 0; i < N; ++i)
    std::memcpy(const_cast<unsigned char*>(own.rows[i][0]) + 4 * (lane() % 4), &registers[i], 4);
}

enum class MmaType { bf16, f16, tf32 };
// Element `half` of a register, of which tf32 has one.
float element(MmaType type, uint32_t bits, int half);

struct MmaOperands {
  const uint32_t *a, *b;
  float* d;
};
template <MmaType>
Perform multiply;

// d += a b: m16n8k16 in bf16 and fp16, m16n8k8 in tf32.
template <MmaType type>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands operands{a, b, d};
  collective(~0u, multiply<type>, &operands);
}

}  // namespace emu
