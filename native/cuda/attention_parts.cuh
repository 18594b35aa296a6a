// The parts of an attention of single rows, and their sum: each of several blocks leaves for a head the sum of p v, its greatest score and the
// sum of p of its positions; whoever comes last adds them up in order.
#pragma once
#include "cuda/kernels.h"

namespace codefuse::cuda {

// What the kernels of attention_decode*.cu go through.
struct DecodeAttention {
  StepMeta m;
  int row0, heads, kv_heads, head_dim, window, rope_dim;
  float scale;       // log2(e) / sqrt(head_dim)
  float* partial;    // [rows, heads, splits, head_dim + 2]: sum of p v, greatest score, sum of p
  int32_t* arrived;  // [rows, heads]
  int splits;
  const float2* angles;  // [max_len, rope_dim / 2], where rows are not rotated yet; rope_dim a multiple of 16
  Ready ready;           // of qkv, then
};

// Eight elements, 16 bytes at a time; not through L1, which could hold a line from before another kernel wrote to it.
template <class T> struct Eight { uint4 raw[sizeof(T) / 2]; };
template <class T>
__device__ __forceinline__ Eight<T> load8(const T* p) {
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) v.raw[i] = __ldcg(reinterpret_cast<const uint4*>(p) + i);
  return v;
}
__device__ __forceinline__ void unpack(const Eight<float>& v, float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    f[4 * i] = __uint_as_float(v.raw[i].x), f[4 * i + 1] = __uint_as_float(v.raw[i].y);
    f[4 * i + 2] = __uint_as_float(v.raw[i].z), f[4 * i + 3] = __uint_as_float(v.raw[i].w);
  }
}
template <class T>
__device__ __forceinline__ void unpack(const Eight<T>& v, float (&f)[8]) {
  const uint32_t u[4] = {v.raw[0].x, v.raw[0].y, v.raw[0].z, v.raw[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 p = unpack2<T>(u[i]);
    f[2 * i] = p.x, f[2 * i + 1] = p.y;
  }
}

// The blocks that share a row's heads have each left their parts: true in the last of them, in all its threads.
__device__ __forceinline__ bool is_last_of(int32_t* arrived, int blocks) {
  __shared__ int is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(arrived, 1) == blocks - 1;
    if (is_last) *arrived = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// out [heads, d] from partial [heads, splits, d + 2], `parts` of each head; all threads of the block.
template <class T>
__device__ __forceinline__ void add_parts(T* out, const float* partial, int heads, int d, int splits, int parts) {
  constexpr int kMerge = 16;  // combined at once
  for (int i = threadIdx.x; i < heads * d; i += blockDim.x) {
    const int h = i / d, e = i % d;
    const float* p = partial + int64_t(h) * splits * (d + 2);
    float most = -INFINITY, sum = 0.f, total = 0.f;
    for (int s0 = 0; s0 < parts; s0 += kMerge) {
      float value[kMerge];
      float2 part[kMerge];
#pragma unroll
      for (int j = 0; j < kMerge; ++j) {
        const bool there = s0 + j < parts;
        value[j] = there ? __ldcg(p + int64_t(s0 + j) * (d + 2) + e) : 0.f;
        part[j] = there ? __ldcg(reinterpret_cast<const float2*>(p + int64_t(s0 + j) * (d + 2) + d)) : make_float2(-INFINITY, 0.f);
      }
      float top = most;
#pragma unroll
      for (int j = 0; j < kMerge; ++j) top = fmaxf(top, part[j].x);
      const float before = exp2f(most - top);
      sum *= before, total *= before, most = top;
#pragma unroll
      for (int j = 0; j < kMerge; ++j) {
        const float scale = exp2f(part[j].x - top);
        sum = fmaf(scale, value[j], sum);
        total = fmaf(scale, part[j].y, total);
      }
    }
    out[i] = from_float<T>(sum / total);
  }
}

// attention_decode_mma.cu: 16 bits, head_dim 64 or 128. fuse: rows as the projection left them (rope_attention_rows).
bool attention_mma_fits(DType act, int head_dim);
void attention_mma(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const DecodeAttention& a, int rows, int rows_at_once, bool fuse);

}  // namespace codefuse::cuda
