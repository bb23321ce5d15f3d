#include "conv_scratch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace resfuse::cpu {
namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Scratch {
  char* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch;

}  // namespace

char* conv_scratch(int64_t bytes) {
  if (bytes <= scratch.size) return scratch.memory;
  std::free(scratch.memory);
  scratch.size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  scratch.memory = static_cast<char*>(std::aligned_alloc(kHugePage, scratch.size));
  if (scratch.memory == nullptr) {
    const std::string size = std::to_string(scratch.size);
    scratch.size = 0;
    throw std::runtime_error("conv_bn_act: out of memory: could not allocate " + size + " bytes of scratch on the CPU");
  }
#if defined(__linux__)
  madvise(scratch.memory, scratch.size, MADV_HUGEPAGE);
#endif
  return scratch.memory;
}

int64_t l2_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found >= (256 << 10) ? std::min<int64_t>(found, 4 << 20) : 1 << 20;
  }();
  return bytes;
}

}  // namespace resfuse::cpu
