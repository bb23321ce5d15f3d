#include "memory.h"

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

int64_t rounded_up(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

struct Scratch {
  char* memory = nullptr;
  int64_t size = 0;

  ~Scratch() { std::free(memory); }

  char* at_least(int64_t bytes) {
    if (bytes <= size) return memory;
    std::free(memory);
    size = rounded_up(bytes);
    memory = static_cast<char*>(std::aligned_alloc(kHugePage, size));
    if (memory == nullptr) {
      const std::string asked = std::to_string(size);
      size = 0;
      throw std::runtime_error("conv_bn_act: out of memory: could not allocate " + asked + " bytes of scratch");
    }
    prefer_huge_pages(memory, size);
    return memory;
  }
};
thread_local Scratch scratch, chain;

}  // namespace

char* scratch_memory(int64_t bytes) { return scratch.at_least(bytes); }
char* chain_memory(int64_t bytes) { return chain.at_least(bytes); }

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePage) return;
  const int64_t address = reinterpret_cast<int64_t>(data);
  const int64_t first = rounded_up(address), last = (address + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

int64_t l2_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found >= 256 << 10 ? std::min<int64_t>(found, 4 << 20) : 1 << 20;
  }();
  return bytes;
}

}  // namespace resfuse::cpu
