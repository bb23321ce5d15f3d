// All launches and all declarations of dynamic shared memory go through this header, so that a C++ compiler can compile
// the same kernels against an emulation of CUDA (RESFUSE_CUDA_EMULATOR).
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef RESFUSE_CUDA_EMULATOR

#include <cxxabi.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#define RESFUSE_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace resfuse::cuda {

// The name of a kernel as in the source, for messages: without anonymous namespaces and parameters.
inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || mangled == nullptr) return "a kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = demangled == nullptr ? mangled : demangled;
  std::free(demangled);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);  // a template's name includes its return type
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at = name.find(unnamed); at != std::string::npos; at = name.find(unnamed)) name.erase(at, unnamed.size());
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

inline void check(cudaError_t status, const char* call, const void* kernel = nullptr) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it, so that the next call does not report it again
  const std::string of = kernel == nullptr ? "" : " of " + kernel_name(kernel);
  throw std::runtime_error(call + of + ": " + cudaGetErrorString(status));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, current_device()), "cudaDeviceGetAttribute");
  return value;
}

// Whether a device has refused a cooperative launch. Devices beyond the array share an element, and two launches.
inline std::atomic<bool>& refuses_cooperation(int device) {
  static std::atomic<bool> refused[64];
  return refused[std::min(device, 63)];
}

// The limit of dynamic shared memory for kernels without static shared memory: a KiB less than the device's opt-in
// limit, because sm_90 counts the memory that CUDA reserves per block as part of it.
inline size_t shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024; }

// More than 48 KiB of dynamic shared memory must be requested: all there is, once per kernel and device.
inline void allow_shared_memory(const void* kernel, size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> allowed;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  bool& done = allowed[{kernel, device}];
  if (done) return;
  const auto most = static_cast<int>(shared_memory_limit());
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute",
        kernel);
  done = true;
}

// Runs kernel(arguments...) on `stream`. cudaLaunchKernelEx reports the errors of the launch itself; those of the
// running kernel surface at the next synchronisation, as for every asynchronous launch. False where a cooperative grid
// is refused, and nothing runs: under MPS or in a green context less is resident than `resident_blocks` is told. Such a
// device is not asked again, for a stream that is captured would not refuse: only its graph could not be launched.
template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, bool cooperative,
            Arguments... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, shared_bytes);
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
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // clear it
    refuses_cooperation(current_device()) = true;
    return false;
  }
  check(status, "cudaLaunchKernelEx", function);
  return true;
}

// The largest grid whose blocks are all resident at once on the current device. Cached, because the driver is slow to
// compute it.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, size_t, int>, int> known;
  const int device = current_device();
  const auto* function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{function, threads, shared_bytes, device}];
  if (blocks == 0) {
    allow_shared_memory(function, shared_bytes);
    int per_processor = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor", function);
    blocks = device_attribute(cudaDevAttrMultiProcessorCount) * per_processor;
  }
  return blocks;
}

// True if the blocks of a grid can wait for each other.
inline bool can_cooperate() {
  return device_attribute(cudaDevAttrCooperativeLaunch) != 0 && !refuses_cooperation(current_device());
}

}  // namespace resfuse::cuda

#else  // tests/emulator, whose header the compiler includes first

#define RESFUSE_DYNAMIC_SHARED(name) unsigned char* name = emu::dynamic_shared()

namespace resfuse::cuda {

template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, bool cooperative,
            Arguments... arguments) {
  (void)stream;
  if (cooperative && !emu::cooperates()) return false;
  emu::launch([=] { kernel(static_cast<Parameters>(arguments)...); }, grid, block, shared_bytes, cooperative);
  return true;
}

inline size_t shared_memory_limit() { return 163 * 1024; }  // of compute capability 8.0

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int threads, size_t shared_bytes) {
  return emu::resident_blocks(threads, shared_bytes);
}

inline bool can_cooperate() { return !emu::has_refused(); }

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
