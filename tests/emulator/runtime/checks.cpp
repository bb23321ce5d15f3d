// The compiler's own checks of kernels (-fsanitize=alignment,bounds), answered by the emulator: a misaligned access and
// an index beyond a local or static array are errors of the launch. The sanitized variants have libubsan instead.
#include <sys/types.h>

#include "runtime.h"

#ifndef EMU_ASAN

namespace {

// The layouts of libubsan's ubsan_handlers.h and ubsan_value.h.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, access;
};
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};

}  // namespace

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* access, uintptr_t address) {
  emu::fail("access of %s at 0x%zx, which is not aligned to %d bytes", access->type->name, address,
            1 << access->log_alignment);
}

extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds_abort(OutOfBounds* access, uintptr_t index) {
  emu::fail("index %zd in %s", static_cast<ssize_t>(index), access->array->name);
}

#endif
