#include "tensor_map.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "runtime.h"

namespace emu {
namespace {

constexpr uint32_t kMagic = 0x7e45a90b;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// The rules of the CUDA driver's manual, of which the driver only says that one is broken.
void require(bool condition, const std::string& rule) {
  if (!condition) throw std::runtime_error("emulator: tensor map: " + rule);
}

TensorMap common(CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                 const cuuint64_t* strides, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                 CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  TensorMap map{};
  map.magic = kMagic;
  require(rank >= 1 && rank <= 5, "a rank of " + std::to_string(rank));
  map.rank = static_cast<uint8_t>(rank);
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      map.element_bytes = 2;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      map.element_bytes = 4;
      break;
    default:
      require(false, "an element type that is not emulated");
  }
  map.tf32 = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  require(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
          "interleaving, or a fill other than zero, which is not emulated");
  require(swizzle <= CU_TENSOR_MAP_SWIZZLE_128B, "a swizzle that is not emulated");
  map.swizzle_bits = static_cast<uint8_t>(swizzle);
  map.base = static_cast<unsigned char*>(base);
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the address is not a multiple of 16");
  for (unsigned i = 0; i < rank; ++i) {
    const std::string of = " of dimension " + std::to_string(i);
    require(sizes[i] >= 1 && sizes[i] < uint64_t{1} << 32, "a size of " + std::to_string(sizes[i]) + of);
    require(steps[i] >= 1 && steps[i] <= 8, "an element stride of " + std::to_string(steps[i]) + of);
    map.sizes[i] = static_cast<uint32_t>(sizes[i]);
    map.steps[i] = static_cast<uint8_t>(steps[i]);
    map.strides[i] = i == 0 ? map.element_bytes : strides[i - 1];
    if (i == 0) continue;
    require(map.strides[i] % 16 == 0 && map.strides[i] < uint64_t{1} << 40,
            "a stride of " + std::to_string(map.strides[i]) + " bytes" + of);
  }
  require(steps[0] == 1, "an element stride of dimension 0, which is not emulated");
  return map;
}

CUresult finish(CUtensorMap* to, const TensorMap& map) {
  require(reinterpret_cast<uintptr_t>(to) % 64 == 0, "it does not lie at a multiple of 64");
  require(map.row_bytes() % 16 == 0, "a box whose rows have " + std::to_string(map.row_bytes()) + " bytes");
  require(map.swizzle_bits == 0 || map.row_bytes() <= 16u << map.swizzle_bits,
          "a box whose rows of " + std::to_string(map.row_bytes()) + " bytes are longer than the swizzle");
  std::memcpy(static_cast<void*>(to), &map, sizeof map);
  return CUDA_SUCCESS;
}

// `inside` tells of the outer dimensions.
Row row(const TensorMap& map, int64_t channel, bool inside, int64_t offset) {
  const auto first = std::clamp<int64_t>(-channel, 0, map.box[0]);
  const auto last = std::clamp<int64_t>(map.sizes[0] - channel, first, map.box[0]);
  return {map.base + offset + channel * map.element_bytes, static_cast<uint32_t>(first * map.element_bytes),
          static_cast<uint32_t>((inside ? last : first) * map.element_bytes)};
}

bool within(int64_t coordinate, uint32_t size) { return coordinate >= 0 && coordinate < size; }

}  // namespace

uint32_t TensorMap::box_bytes() const {
  uint32_t bytes = row_bytes();
  for (int i = 1; i < (im2col ? 2 : rank); ++i) bytes *= box[i];
  return bytes;
}

const TensorMap& tensor_map(uint64_t address) {
  const auto& map = *reinterpret_cast<const TensorMap*>(address);
  if (address % 64 || map.magic != kMagic) fail("0x%zx is not a tensor map", static_cast<size_t>(address));
  return map;
}

std::vector<Row> tiled_rows(const TensorMap& map, const int* at) {
  std::vector<Row> rows;
  for (int index[5] = {};;) {
    bool inside = true;
    int64_t offset = 0;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t coordinate = at[i] + int64_t{index[i]} * map.steps[i];
      inside &= within(coordinate, map.sizes[i]);
      offset += coordinate * static_cast<int64_t>(map.strides[i]);
    }
    rows.push_back(row(map, at[0], inside, offset));
    int i = 1;
    while (i < map.rank && ++index[i] == map.box[i]) index[i++] = 0;
    if (i >= map.rank) return rows;
  }
}

// From the pixel `at` on in the bounding box of each image, in the order of W, H, N; `offsets` are the tap's, and
// outside of the image there are zeros.
std::vector<Row> im2col_rows(const TensorMap& map, const int* at, const int* offsets) {
  std::vector<Row> rows;
  const int spatial = map.rank - 2;
  int pixel[4];
  std::copy_n(at + 1, spatial + 1, pixel);
  for (int count = 0; count < map.box[1]; ++count) {
    bool inside = within(pixel[spatial], map.sizes[spatial + 1]);
    int64_t offset = int64_t{pixel[spatial]} * static_cast<int64_t>(map.strides[spatial + 1]);
    for (int i = 0; i < spatial; ++i) {
      const int coordinate = pixel[i] + offsets[i];
      inside &= within(coordinate, map.sizes[i + 1]);
      offset += int64_t{coordinate} * static_cast<int64_t>(map.strides[i + 1]);
    }
    rows.push_back(row(map, at[0], inside, offset));
    int i = 0;
    for (; i < spatial; ++i) {
      pixel[i] += map.steps[i + 1];
      if (pixel[i] < static_cast<int>(map.sizes[i + 1]) + map.upper[i]) break;
      pixel[i] = map.lower[i];
    }
    if (i == spatial) pixel[spatial] += 1;
  }
  return rows;
}

}  // namespace emu

using emu::require;

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  emu::TensorMap map = emu::common(type, rank, base, sizes, strides, steps, interleave, swizzle, fill);
  for (unsigned i = 0; i < rank; ++i) {
    require(box[i] >= 1 && box[i] <= 256, "a box of " + std::to_string(box[i]) + " elements");
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  return emu::finish(to, map);
}

extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                            const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower,
                                            const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                            const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                            CUtensorMapFloatOOBfill fill) {
  emu::TensorMap map = emu::common(type, rank, base, sizes, strides, steps, interleave, swizzle, fill);
  require(rank == 4, "im2col of a rank other than 4, which is not emulated");
  require(channels >= 1 && channels <= 256, "im2col of " + std::to_string(channels) + " channels");
  require(pixels >= 1 && pixels <= 1024, "im2col of " + std::to_string(pixels) + " pixels");
  map.im2col = true;
  map.box[0] = static_cast<uint16_t>(channels);
  map.box[1] = static_cast<uint16_t>(pixels);
  for (unsigned i = 0; i + 2 < rank; ++i) {
    require(lower[i] >= -128 && lower[i] < 128 && upper[i] >= -128 && upper[i] < 128,
            "corners of " + std::to_string(lower[i]) + " and " + std::to_string(upper[i]));
    require(static_cast<int64_t>(sizes[i + 1]) + upper[i] > lower[i], "an empty bounding box");
    map.lower[i] = static_cast<int8_t>(lower[i]);
    map.upper[i] = static_cast<int8_t>(upper[i]);
  }
  return emu::finish(to, map);
}

extern "C" CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "";
  return CUDA_SUCCESS;
}
