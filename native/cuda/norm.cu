// LayerNorm and RMSNorm of float32 rows: a block per row and, while there are few rows, output. A row of up to kMost elements is in
// registers from the first read to the last; gain and bias, which no kernel writes, arrive in shared memory before the kernel waits for its
// predecessor. A block of 8 warps (hidden 5120) leaves room for one of the streaming kernel beside it: of registers, 64 a thread.
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kThreads = 512, kEach = 5;  // float4 of a row a thread has
constexpr int kMost = kThreads * kEach * 4;
constexpr int kWarps = kThreads / 32;
constexpr int kManyRows = 256;  // from here on a block makes both outputs: x is read once

struct Outputs {  // norms of the same rows: the block's is blockIdx.y's, or both are
  void* y[2];
  Norm n[2];
};

// sum over the block, the same on every thread; the order is fixed. parts: zero where there is no warp
__device__ __forceinline__ float block_sum(float v, float* parts /*[kWarps]*/) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kWarps / 4; ++i) {
    const float4 p = reinterpret_cast<const float4*>(parts)[i];
    sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

__device__ __forceinline__ void store4(float* y, float4 v) { *reinterpret_cast<float4*>(y) = v; }
template <class T>
__device__ __forceinline__ void store4(T* y, float4 v) {
  *reinterpret_cast<uint2*>(y) = make_uint2(pack2<T>(v.x, v.y), pack2<T>(v.z, v.w));
}

// hidden a multiple of 4, at most kEach float4 a thread
template <class T, bool BOTH>
__global__ void __launch_bounds__(kThreads) norm_short(const Outputs out, const float* __restrict__ x, bool center, float eps, int hidden) {
  __shared__ __align__(16) float parts[2][kWarps];
  launch_dependents();
  for (int i = threadIdx.x; i < 2 * kWarps; i += blockDim.x) (&parts[0][0])[i] = 0.f;
  const Norm n = blockIdx.y ? out.n[1] : out.n[0];
  const int count = hidden / 4;
  extern __shared__ float4 terms[];  // !BOTH: gain, bias [kEach * threads]; a thread reads what it has asked for
  float4* const gain = terms + threadIdx.x;
  float4* const bias = gain + kEach * blockDim.x;
  float4 v[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (BOTH || at >= count) continue;
    if (n.weight) copy16(gain + i * blockDim.x, reinterpret_cast<const float4*>(n.weight) + at);
    if (n.bias) copy16(bias + i * blockDim.x, reinterpret_cast<const float4*>(n.bias) + at);
  }
  __syncthreads();
  grid_wait();
  x += int64_t(blockIdx.x) * hidden;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < count) v[i] = load_fresh(reinterpret_cast<const float4*>(x) + at);
  }
  if (center) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += (v[i].x + v[i].y) + (v[i].z + v[i].w);
    const float mean = block_sum(sum, parts[0]) / hidden;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (i * int(blockDim.x) + int(threadIdx.x) < count) v[i].x -= mean, v[i].y -= mean, v[i].z -= mean, v[i].w -= mean;
  }
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; ++i)  // spelled out: the same whatever the compiler does with the rest
    squares += __fadd_rn(__fmaf_rn(v[i].x, v[i].x, __fmul_rn(v[i].y, v[i].y)), __fmaf_rn(v[i].z, v[i].z, __fmul_rn(v[i].w, v[i].w)));
  const float scale = 1.f / sqrtf(block_sum(squares, parts[1]) / hidden + eps);
  copy_wait_all();
  const auto store = [&](T* y, int i, float4 g, float4 b) {
    y += int64_t(blockIdx.x) * hidden + (i * blockDim.x + threadIdx.x) * 4;
    store4(y, make_float4(fmaf(v[i].x * scale, g.x, b.x), fmaf(v[i].y * scale, g.y, b.y), fmaf(v[i].z * scale, g.z, b.z), fmaf(v[i].w * scale, g.w, b.w)));
  };
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at >= count) continue;
    if constexpr (BOTH) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        float4 g = make_float4(1.f, 1.f, 1.f, 1.f), b = make_float4(0.f, 0.f, 0.f, 0.f);
        if (out.n[o].weight) g = reinterpret_cast<const float4*>(out.n[o].weight)[at];
        if (out.n[o].bias) b = reinterpret_cast<const float4*>(out.n[o].bias)[at];
        store(static_cast<T*>(out.y[o]), i, g, b);
      }
    } else {
      store(static_cast<T*>(blockIdx.y ? out.y[1] : out.y[0]), i, n.weight ? gain[i * blockDim.x] : make_float4(1.f, 1.f, 1.f, 1.f),
            n.bias ? bias[i * blockDim.x] : make_float4(0.f, 0.f, 0.f, 0.f));
    }
  }
}

// any hidden
template <class T>
__global__ void __launch_bounds__(kThreads) norm_long(const Outputs out, const float* __restrict__ x, bool center, float eps, int hidden) {
  __shared__ __align__(16) float parts[2][kWarps];
  launch_dependents();
  grid_wait();
  const Norm n = blockIdx.y ? out.n[1] : out.n[0];
  x += int64_t(blockIdx.x) * hidden;
  T* const y = static_cast<T*>(blockIdx.y ? out.y[1] : out.y[0]) + int64_t(blockIdx.x) * hidden;
  float sum = 0.f, squares = 0.f;
#pragma unroll 8
  for (int i = threadIdx.x; i < hidden; i += kThreads) sum += load_fresh(x + i);
  const float mean = center ? block_sum(sum, parts[0]) / hidden : 0.f;
#pragma unroll 8
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    const float z = load_fresh(x + i) - mean;
    squares += z * z;
  }
  const float scale = 1.f / sqrtf(block_sum(squares, parts[1]) / hidden + eps);
#pragma unroll 4
  for (int i = threadIdx.x; i < hidden; i += kThreads)
    y[i] = from_float<T>(fmaf((load_fresh(x + i) - mean) * scale, n.weight ? n.weight[i] : 1.f, n.bias ? n.bias[i] : 0.f));
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

void run(const Stream& s, DType act, const Outputs& o, int outputs, const float* x, NormKind kind, float eps, int T, int hidden) {
  bool vectors = hidden % 4 == 0 && hidden <= kMost && aligned16(x);
  for (int i = 0; i < outputs; ++i) vectors = vectors && aligned16(o.y[i]) && aligned16(o.n[i].weight) && aligned16(o.n[i].bias);
  const bool both = vectors && outputs == 2 && T >= kManyRows;
  auto go = [&](auto one, auto two, auto any) {
    const int threads = vectors ? (hidden + kEach * 128 - 1) / (kEach * 128) * 32 : kThreads;
    const size_t terms = vectors && !both ? size_t(2 * kEach * threads) * sizeof(float4) : 0;
    launch(s, both ? two : vectors ? one : any, dim3(T, both ? 1 : outputs), threads, terms, o, x, kind == NormKind::layer, eps, hidden);
  };
  switch (act) {
    case DType::f32: return go(norm_short<float, false>, norm_short<float, true>, norm_long<float>);
    case DType::f16: return go(norm_short<__half, false>, norm_short<__half, true>, norm_long<__half>);
    default: return go(norm_short<__nv_bfloat16, false>, norm_short<__nv_bfloat16, true>, norm_long<__nv_bfloat16>);
  }
}

}  // namespace

void norm(const Stream& s, DType act, void* y, const float* x, const Norm& n, NormKind kind, float eps, int T, int hidden) {
  run(s, act, Outputs{{y, nullptr}, {n, Norm{}}}, 1, x, kind, eps, T, hidden);
}

void norm_pair(const Stream& s, DType act, void* ya, const Norm& a, void* yb, const Norm& b, const float* x, NormKind kind, float eps, int T, int hidden) {
  run(s, act, Outputs{{ya, yb}, {a, b}}, 2, x, kind, eps, T, hidden);
}

}  // namespace codefuse::cuda
