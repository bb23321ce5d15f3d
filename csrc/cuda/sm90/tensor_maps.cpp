// The driver's encoders of tensor maps, under the names by which CUTLASS calls them: found at run time, so that nothing
// links libcuda, and throwing where CUTLASS would go on with a map that the driver has refused.
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace {

template <class Function>
Function in_driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("the driver has no ") + name);
  return reinterpret_cast<Function>(found);
}

CUresult checked(CUresult result, const char* name) {
  if (result != CUDA_SUCCESS) throw std::runtime_error(std::string(name) + ": error " + std::to_string(result));
  return result;
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  static const auto encode = in_driver<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  return checked(
      encode(map, type, rank, address, sizes, strides, box, element_strides, interleave, swizzle, promotion, fill),
      "cuTensorMapEncodeTiled");
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const auto encode = in_driver<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  return checked(encode(map, type, rank, address, sizes, strides, lower, upper, channels, pixels, element_strides,
                        interleave, swizzle, promotion, fill),
                 "cuTensorMapEncodeIm2col");
}
