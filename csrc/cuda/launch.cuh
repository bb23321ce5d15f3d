// The only place that launches a kernel, and the only one that knows how dynamic shared memory is named, so that the
// same kernels can also be compiled against an emulation of CUDA (RESFUSE_CUDA_EMULATOR) by an ordinary C++ compiler.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef RESFUSE_CUDA_EMULATOR

#define RESFUSE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace resfuse::cuda {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it: the error is reported here, not again by the next innocent call
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// Runs kernel(arguments...) on `stream`. cudaLaunchKernelEx reports the errors of the launch itself; those of the
// running kernel surface at the next synchronisation, as for every asynchronous launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, bool cooperative,
            Arguments... arguments) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "cudaLaunchKernelEx");
}

// The largest grid of which all blocks are resident at once on the current device.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  int device = 0, processors = 0, per_processor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return processors * per_processor;
}

}  // namespace resfuse::cuda

#else  // tests/emulator, whose header the compiler includes first

#define RESFUSE_DYNAMIC_SHARED(name) unsigned char* name = emu::dyn_smem()

namespace resfuse::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, bool cooperative,
            Arguments... arguments) {
  (void)stream;
  emu::launch([=] { kernel(static_cast<Parameters>(arguments)...); }, grid, block, shared_bytes, cooperative);
}

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int, size_t) {
  return 4;
}

}  // namespace resfuse::cuda

#endif  // RESFUSE_CUDA_EMULATOR

namespace resfuse::cuda {

// Blocks for `items` units of work with a grid-stride loop: no more than can be resident, no block without work.
template <class... Parameters>
unsigned grid_for(void (*kernel)(Parameters...), int64_t items, int threads) {
  const int64_t needed = (items + threads - 1) / threads;
  const int64_t resident = resident_blocks(kernel, threads, 0);
  return static_cast<unsigned>(std::clamp<int64_t>(needed, 1, std::max<int64_t>(resident, 1)));
}

}  // namespace resfuse::cuda
