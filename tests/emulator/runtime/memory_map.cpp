#include "memory_map.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace emu {
namespace {

struct ThreadLocal {
  size_t module = 0, bytes = 0;  // 0: the library has none
};

int find(dl_phdr_info* info, size_t, void* found) {
  bool ours = false;
  ThreadLocal storage;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const auto offset = reinterpret_cast<uintptr_t>(&find) - info->dlpi_addr - header.p_vaddr;
    ours |= header.p_type == PT_LOAD && offset < header.p_memsz;
    if (header.p_type == PT_TLS) storage = {info->dlpi_tls_modid, header.p_memsz};
  }
  if (ours) *static_cast<ThreadLocal*>(found) = storage;
  return ours;
}

struct TlsIndex {
  unsigned long module, offset;
};
extern "C" void* __tls_get_addr(TlsIndex*);

constexpr size_t kAlignment = 1024;  // of the largest swizzle

}  // namespace

unsigned char* static_shared(size_t* bytes) {
  static const ThreadLocal storage = [] {
    ThreadLocal found;
    dl_iterate_phdr(find, &found);
    return found;
  }();
  *bytes = storage.bytes;
  if (storage.bytes == 0) return nullptr;
  TlsIndex first{storage.module, 0};
  return static_cast<unsigned char*>(__tls_get_addr(&first));
}

#ifdef EMU_TSAN
// A new mapping has a clean shadow; malloc's and free's would order, or race with, the threads of other blocks.
unsigned char* map_shared(size_t bytes) {
  void* memory = mmap(nullptr, bytes + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}

void unmap_shared(unsigned char* memory, size_t bytes) { munmap(memory, bytes + 1); }
#else
// Exactly as long as asked for: ASan's redzone begins where it ends.
unsigned char* map_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes) != 0) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}

void unmap_shared(unsigned char* memory, size_t) { std::free(memory); }
#endif

// Not memset, which sanitizers see.
void poison(unsigned char* memory, size_t bytes) {
  volatile unsigned char* byte = memory;
  for (size_t i = 0; i < bytes; ++i) byte[i] = 0xFF;
}

}  // namespace emu
