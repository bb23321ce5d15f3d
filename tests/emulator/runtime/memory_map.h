// The shared memory of a block.
#pragma once
#include <cstddef>

namespace emu {

// The static __shared__ variables of the calling OS thread: the thread-local storage of this library, which for that
// reason has no other.
unsigned char* static_shared(size_t* bytes);

// Dynamic shared memory, and its end where a sanitizer of addresses sees it.
unsigned char* map_shared(size_t bytes);
void unmap_shared(unsigned char* memory, size_t bytes);

// NaN in every floating-point type.
void poison(unsigned char* memory, size_t bytes);

}  // namespace emu
