// The sums of a prefill product's tile (linear_prefill_wgmma.cuh): stored through the epilogue, or handed to the block that goes on.
#pragma once
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"

namespace codefuse::cuda::prefill {

[[maybe_unused]] constexpr int kStageOutBytes = 9216;      // outputs of one warpgroup on their way: 64 rows of 64 (16 bit) or 32 of 64 (float)
[[maybe_unused]] constexpr int kOutStride = 144, kFloatStride = 272;  // bytes between their rows

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void warpgroup_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void store_matrices_transposed(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(p)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Outputs [n0, n0 + 64) of rows [token0, ..) from one warpgroup's accumulators: d[4 j + q] of a lane is output g + 8 (q / 2) of its
// warp's 16, row 8 j + 2 t + q % 2. Through shared memory, so that 8 or 16 lanes write a row's outputs together.
template <class T, int TOKENS>
__device__ __forceinline__ void write_tile(float (&d)[TOKENS / 2], uint8_t* staging, int group, int token0, int tokens, int n0, int N, const Epilogue& e) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int na = n0 + warp * 16 + g, nb = na + 8;
  const auto bias_of = [&](int n) { return n < N ? (e.bias ? e.bias[n] : 0.f) + (e.bias_b ? e.bias_b[n] : 0.f) : 0.f; };
  const float bias_a = bias_of(na), bias_b = bias_of(nb);
  if (e.store == Store::act) {
    T* const y = static_cast<T*>(e.y);
    const bool whole = N % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
    auto write = [&](auto fn) {
      constexpr int FN = decltype(fn)::value;
#pragma unroll (FN < 0 ? TOKENS / 64 : 1)  // an activation is long: of a tile's 128 only a quarter is written out
      for (int p = 0; p < TOKENS / 64; ++p) {
        if (token0 + p * 64 >= tokens) break;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          uint32_t v[4];
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            const float* z = d + (j + h / 2) * 4 + h % 2 * 2;
            const float b = h % 2 ? bias_b : bias_a;
            v[h] = pack2<T>(activate(z[0] + b, FN), activate(z[1] + b, FN));
          }
          store_matrices_transposed(staging + (j * 8 + lane / 16 * 8 + lane % 8) * kOutStride + warp * 32 + lane / 8 % 2 * 16, v[0], v[1], v[2], v[3]);
        }
        warpgroup_sync(group);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = i * 16 + thread / 8, token = token0 + p * 64 + row, n = n0 + thread % 8 * 8;
          const uint4 v = *reinterpret_cast<const uint4*>(staging + row * kOutStride + thread % 8 * 16);
          if (token >= tokens || n >= N) continue;
          T* to = y + int64_t(token) * N + n;
          if (whole) {
            *reinterpret_cast<uint4*>(to) = v;
          } else {
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int q = 0; q < 8; ++q)
              if (n + q < N) reinterpret_cast<uint16_t*>(to)[q] = uint16_t(w[q / 2] >> (q % 2 * 16));
          }
        }
#pragma unroll
        for (int i = 0; i < TOKENS / 2 - 32; ++i) d[i] = d[i + 32];
        warpgroup_sync(group);
      }
    };
    switch (e.activation) {  // here, so that the code that runs is in one piece
      case int(Activation::gelu): return write(std::integral_constant<int, int(Activation::gelu)>());
      case int(Activation::gelu_tanh): return write(std::integral_constant<int, int(Activation::gelu_tanh)>());
      case int(Activation::relu): return write(std::integral_constant<int, int(Activation::relu)>());
      case int(Activation::silu): return write(std::integral_constant<int, int(Activation::silu)>());
      default: return write(std::integral_constant<int, -1>());
    }
  } else {
    float* const y = static_cast<float*>(e.y);
    const bool whole = N % 4 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0, add = e.store == Store::add;
    const int n = n0 + thread % 16 * 4;
    float4 old[2][4] = {};  // by turns: those of the next rows are asked for before these are written
    const auto ask = [&](int p) {
      if (add && whole && n < N)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = token0 + p * 32 + i * 8 + thread / 16;
          if (token < tokens) old[p % 2][i] = *reinterpret_cast<const float4*>(y + int64_t(token) * N + n);
        }
    };
    ask(0);
#pragma unroll
    for (int p = 0; p < TOKENS / 32; ++p) {
      if (token0 + p * 32 >= tokens) break;
      if (p + 1 < TOKENS / 32) ask(p + 1);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          *reinterpret_cast<float*>(staging + (j * 8 + 2 * t + q % 2) * kFloatStride + (warp * 16 + g + q / 2 * 8) * 4) = d[(p * 4 + j) * 4 + q] + (q / 2 ? bias_b : bias_a);
      warpgroup_sync(group);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i * 8 + thread / 16, token = token0 + p * 32 + row;
        const float4 v = *reinterpret_cast<const float4*>(staging + row * kFloatStride + thread % 16 * 16);
        if (token >= tokens || n >= N) continue;
        float* to = y + int64_t(token) * N + n;
        if (whole) {
          *reinterpret_cast<float4*>(to) = make_float4(old[p % 2][i].x + v.x, old[p % 2][i].y + v.y, old[p % 2][i].z + v.z, old[p % 2][i].w + v.w);
        } else {
          const float z[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int q = 0; q < 4; ++q)
            if (n + q < N) to[q] = add ? to[q] + z[q] : z[q];
        }
      }
      warpgroup_sync(group);
    }
  }
}

// Sums of a tile that ends early, for the next unit: every thread's accumulators, and a flag per warp.
template <int N>
__device__ __forceinline__ void leave(const float (&d)[N], float* slot, int32_t* flag) {
#pragma unroll
  for (int i = 0; i < N; i += 4) __stcg(reinterpret_cast<float4*>(slot + i * 256), make_float4(d[i], d[i + 1], d[i + 2], d[i + 3]));
  __threadfence();
  __syncwarp();
  if (threadIdx.x % 32 == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}
template <int N>
__device__ __forceinline__ void take(float (&d)[N], const float* slot, int32_t* flag) {
  int32_t ready = 0;
  while (!ready) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
  __syncwarp();
  if (threadIdx.x % 32 == 0) *flag = 0;  // for the next launch
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(slot + i * 256));
    d[i] = v.x, d[i + 1] = v.y, d[i + 2] = v.z, d[i + 3] = v.w;
  }
}
#endif

}  // namespace codefuse::cuda::prefill
