// Whatever the compiler's default is: SSE2 on x86-64, NEON on aarch64.
#include "kernels.h"

#define RESFUSE_ISA baseline
#include "isa.inl"
