#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

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

class Pool {
 public:
  char* take(int64_t bytes) {
    bytes = in_pages(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto at = free_.begin(); at != free_.end(); ++at)
      if (at->second >= bytes && (best == free_.end() || at->second < best->second)) best = at;
    if (best == free_.end()) return nullptr;
    const auto [data, size] = *best;
    free_.erase(best);
    if (size > bytes) free_.emplace(data + bytes, size - bytes);
    used_ = std::max(used_, data + bytes);
    return data;
  }

  void give(char* data, int64_t bytes) {
    bytes = in_pages(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto next = free_.lower_bound(data);
    const auto before = next == free_.begin() ? free_.end() : std::prev(next);
    if (next != free_.end() && data + bytes == next->first) {
      bytes += next->second;
      free_.erase(next);
    }
    if (before != free_.end() && before->first + before->second == data)
      before->second += bytes;
    else
      free_.emplace(data, bytes);
#if defined(__linux__) && defined(MADV_FREE)
    // Nobody uses any of it: the system may take the pages when it needs some, and until then they are used again.
    const auto [first, size] = *free_.begin();
    if (size == size_) madvise(first, std::exchange(used_, first) - first, MADV_FREE);
#endif
  }

 private:
  static int64_t in_pages(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

  // As many addresses as there is memory, none of which is used yet.  A limit on addresses may refuse them.
  std::map<char*, int64_t> reserve() {
#if defined(__linux__)
    size_ = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    void* data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data != MAP_FAILED) return {{static_cast<char*>(data), size_}};
#endif
    return {};
  }

  std::mutex mutex_;
  int64_t size_ = 0;
  char* used_ = nullptr;                       // beyond it nothing has been used since all was free
  std::map<char*, int64_t> free_ = reserve();  // by address; no two touch each other
};

Pool& pool() {
  static Pool& pool = *new Pool;  // never destroyed: tensors may be freed at any time
  return pool;
}

}  // namespace

char* scratch_memory(int64_t bytes) { return scratch.at_least(bytes); }
char* chain_memory(int64_t bytes) { return chain.at_least(bytes); }

void* pooled_memory(int64_t bytes) { return pool().take(bytes); }
void return_to_pool(void* data, int64_t bytes) { pool().give(static_cast<char*>(data), bytes); }

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
