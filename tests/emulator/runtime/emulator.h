// Lets the CUDA sources of this project compile with g++ and run on the CPU; the compiler includes it first.
// Types (dim3, uint4, __half, __nv_bfloat16) are NVIDIA's own host headers; only the execution is emulated.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __constant__
#undef __grid_constant__
// Every block runs on an OS thread of its own.
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __constant__
#define __grid_constant__

// Of the thread that runs. Plain variables: only one runs at a time, whatever its OS thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "async_copy.h"
#include "builtins.h"
#include "runtime.h"
#include "sm90.h"
#include "tensor_core.h"
#include "warp.h"
