// The sums of a prefill product's tile (linear_prefill_wgmma.cuh): stored through the epilogue, or handed to the block that goes on.
#pragma once
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/tensor_map.h"
#include "cuda/tiles.cuh"

namespace codefuse::cuda::prefill {

// Outputs leave a warpgroup by tensor copies from two buffers of shared memory in turn, each of 64 outputs: of kOutRows rows of x, one box; or where they
// are added, in float32, of kAddedRows, two boxes side by side.
constexpr int kBuffer = 8192;  // bytes
constexpr int kOutRows = kBuffer / (64 * 2), kAddedRows = kBuffer / (64 * 4);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void warpgroup_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void store_matrices_transposed(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t p, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(p), "f"(v) : "memory"); }
// A box of shared memory to global memory; what lies outside the map is left out. tensor_add adds to what is there, each element once in a launch: the
// order of additions is that of the launches.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
__device__ __forceinline__ void tensor_add(const CUtensorMap* map, int column, int row, uint32_t from) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// d: a warpgroup's accumulators of rows [token0, ..) of x, outputs [n0, n0 + 64): d[4 j + q] of a lane is output g + 8 (q / 2) of its warp's 16, row
// 8 j + 2 t + q % 2. The buffers at `staging` take turns, which go on from one tile to the next.
template <class T, int TOKENS>
struct TileWriter {
  uint32_t staging;
  int group, turn = 0;

  // What was written to the buffer is copied: all threads, and then the first, which sees to it that the other buffer is free.
  template <class F>
  __device__ __forceinline__ void copy(const F& store) {
    const bool first = threadIdx.x % 128 == 0;
    if (first) stores_read();
    proxy_fence();
    warpgroup_sync(group);
    if (first) {
      store();
      stores_commit();
    }
    turn ^= 1;
  }
  __device__ __forceinline__ uint32_t buffer() const { return staging + turn * kBuffer; }

  // y = fn(d + bias), of the compute dtype
  template <int FN>
  __device__ __forceinline__ void store(float (&d)[TOKENS / 2], const CUtensorMap* map, int token0, int tokens, int n0, float bias_a, float bias_b) {
    constexpr int R = kOutRows;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll (FN < 0 ? TOKENS / R : 1)  // an activation is long: of a tile's only some are written out
    for (int p = 0; p < TOKENS / R; ++p) {
      if (token0 + p * R >= tokens) break;
      const uint32_t row = buffer() + lane / 16 * 1024 + lane % 8 * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
      for (int j = 0; j < R / 8; j += 2) {
        uint32_t v[4];
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const float* z = d + (j + h / 2) * 4 + h % 2 * 2;
          const float b = h % 2 ? bias_b : bias_a;
          v[h] = pack2<T>(activate(z[0] + b, FN), activate(z[1] + b, FN));
        }
        store_matrices_transposed(row + j * 1024, v[0], v[1], v[2], v[3]);
      }
      const uint32_t from = buffer();
      copy([&] { tensor_store(map, n0, token0 + p * R, from); });
#pragma unroll
      for (int i = 0; i < TOKENS / 2 - R / 2; ++i) d[i] = d[i + R / 2];
    }
  }

  // y += d + bias, float32
  __device__ __forceinline__ void add(const float (&d)[TOKENS / 2], const CUtensorMap* map, int token0, int tokens, int n0, float bias_a, float bias_b) {
    constexpr int R = kAddedRows;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const auto unit = [&](int h) { return warp % 2 * 4 + h * 2 + g / 4; };  // of a box's 32 outputs
#pragma unroll
    for (int p = 0; p < TOKENS / R; ++p) {
      if (token0 + p * R >= tokens) break;
      const uint32_t box = buffer() + warp / 2 * (kBuffer / 2);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int row = 2 * t + q % 2;  // of 8
        const uint32_t to = box + row * 128 + (unit(q / 2) ^ row) * 16 + g % 4 * 4;
#pragma unroll
        for (int j = 0; j < R / 8; ++j) store_shared(to + j * 1024, d[(p * (R / 8) + j) * 4 + q] + (q / 2 ? bias_b : bias_a));
      }
      const uint32_t from = buffer();
      copy([&] {
        tensor_add(map, n0, token0 + p * R, from);
        tensor_add(map, n0 + 32, token0 + p * R, from + kBuffer / 2);
      });
    }
  }

  // map: of e.y with boxes as above, or nullptr: rows of y are not multiples of 16 bytes, and each element is stored for itself
  __device__ __forceinline__ void write(float (&d)[TOKENS / 2], const CUtensorMap* map, int token0, int tokens, int n0, int N, const Epilogue& e, float bias_a, float bias_b) {
    if (!map) {
      const int lane = threadIdx.x % 32, n = n0 + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll 1
      for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int token = token0 + 8 * j + 2 * (lane % 4) + q % 2;
          if (token < tokens && n + q / 2 * 8 < N) store_output<T>(e, d[q], token, n + q / 2 * 8, N);
        }
#pragma unroll
        for (int i = 0; i < TOKENS / 2 - 4; ++i) d[i] = d[i + 4];
      }
      return;
    }
    if (n0 >= N) return;
    if (e.store == Store::add) return add(d, map, token0, tokens, n0, bias_a, bias_b);
    switch (e.activation) {  // here, so that the code that runs is in one piece
      case int(Activation::gelu): return store<int(Activation::gelu)>(d, map, token0, tokens, n0, bias_a, bias_b);
      case int(Activation::gelu_tanh): return store<int(Activation::gelu_tanh)>(d, map, token0, tokens, n0, bias_a, bias_b);
      case int(Activation::relu): return store<int(Activation::relu)>(d, map, token0, tokens, n0, bias_a, bias_b);
      case int(Activation::silu): return store<int(Activation::silu)>(d, map, token0, tokens, n0, bias_a, bias_b);
      default: return store<-1>(d, map, token0, tokens, n0, bias_a, bias_b);
    }
  }
};

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
