// The standard and torch headers come first: they must be compiled for the baseline.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif

#define RESFUSE_ISA avx2
#define RESFUSE_ISA_LANES 8
#define RESFUSE_ISA_PANEL 1
#include "isa.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
