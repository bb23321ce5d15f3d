// Whatever the compiler's default is: SSE2 on x86-64, NEON on aarch64.
#include "kernels.h"

#define RESFUSE_ISA baseline
#define RESFUSE_ISA_LANES 4
#define RESFUSE_ISA_PANEL 1
#include "isa.inl"
