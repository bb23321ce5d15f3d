// Tensor maps: what the driver's encoders make of their arguments here, and the memory that a box of one covers.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <vector>

namespace emu {

// In the 128 bytes of a CUtensorMap. Dimension 0 is the innermost; strides are in bytes.
struct TensorMap {
  uint32_t magic;
  uint8_t rank, swizzle_bits, element_bytes;
  bool im2col, tf32;
  unsigned char* base;
  uint64_t strides[5];
  uint32_t sizes[5];
  uint16_t box[5];  // of im2col: channels and pixels
  uint8_t steps[5];
  int8_t lower[3], upper[3];  // corners of im2col's bounding box, from W on

  uint32_t row_bytes() const { return box[0] * element_bytes; }
  uint32_t box_bytes() const;
};

// Fails unless an encoder wrote it.
const TensorMap& tensor_map(uint64_t address);

// What lies next to each other in both memories: `memory` is where the first element of the box's row would be; bytes
// [first, last) of the row exist, in a load the others are zero.
struct Row {
  unsigned char* memory;
  uint32_t first, last;
};
std::vector<Row> tiled_rows(const TensorMap& map, const int* at);
std::vector<Row> im2col_rows(const TensorMap& map, const int* at, const int* offsets);

// The hardware's exchange of 16-byte pieces of a row, by the address in shared memory.
inline uint32_t swizzled(uint32_t address, int bits) { return address ^ (address >> 7 & ((1u << bits) - 1)) << 4; }

}  // namespace emu
