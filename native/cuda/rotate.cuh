// The rotation of a pair, rounded the same wherever it is done.
#pragma once
#include <cuda_runtime.h>

namespace codefuse::cuda {

// r: cosine, sine
__device__ __forceinline__ float rotate_first(float u, float v, float2 r) { return __fmaf_rn(u, r.x, -__fmul_rn(v, r.y)); }
__device__ __forceinline__ float rotate_second(float u, float v, float2 r) { return __fmaf_rn(v, r.x, __fmul_rn(u, r.y)); }

}  // namespace codefuse::cuda
