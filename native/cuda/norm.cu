// LayerNorm and RMSNorm of float32 rows. A row of up to kMost elements is in registers from the first read to the last. Few rows have a block each and
// output: gain and bias, which no kernel writes, arrive in shared memory before the kernel waits for its predecessor, and a block of 8 warps
// (hidden 5120) leaves room for one of the streaming kernel beside it: of registers, 64 a thread. Of many rows a block makes both outputs of kRowsEach.
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kThreads = 512, kEach = 5;  // float4 of a row a thread has
constexpr int kMost = kThreads * kEach * 4;
constexpr int kWarps = kThreads / 32;
constexpr int kManyRows = 384;  // from here on a block makes both outputs of kRowsEach rows
constexpr int kRowsEach = 4;

struct Outputs {  // norms of the same rows
  void* y[2];
  Norm n[2];
};

// sums over the block, the same on every thread; the order is fixed. parts: zero where there is no warp
template <int N>
__device__ __forceinline__ void block_sums(float (&v)[N], float (*parts)[kWarps]) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2)
#pragma unroll
    for (int r = 0; r < N; ++r) v[r] += __shfl_xor_sync(~0u, v[r], o);
#pragma unroll
  for (int r = 0; r < N; ++r)
    if (threadIdx.x % 32 == 0) parts[r][threadIdx.x / 32] = v[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < N; ++r) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kWarps / 4; ++i) {
      const float4 p = reinterpret_cast<const float4*>(parts[r])[i];
      sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
    }
    v[r] = (sum.x + sum.y) + (sum.z + sum.w);
  }
}
__device__ __forceinline__ float block_sum(float v, float* parts /*[kWarps]*/) {
  float sum[1] = {v};
  block_sums(sum, reinterpret_cast<float(*)[kWarps]>(parts));
  return sum[0];
}

__device__ __forceinline__ void store4(float* y, float4 v) { *reinterpret_cast<float4*>(y) = v; }
template <class T>
__device__ __forceinline__ void store4(T* y, float4 v) {
  *reinterpret_cast<uint2*>(y) = make_uint2(pack2<T>(v.x, v.y), pack2<T>(v.z, v.w));
}

// A thread's float4 of N rows, beginning at x.
template <int N>
struct RowBlock {
  float4 v[N][kEach];
  float scale[N];

  __device__ __forceinline__ void load(const float* x, int rows, int hidden) {
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int at = i * blockDim.x + threadIdx.x;
        v[r][i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (r < rows && at < hidden / 4) v[r][i] = load_fresh(reinterpret_cast<const float4*>(x + int64_t(r) * hidden) + at);
      }
  }
  // takes the mean away (center) and finds what the rest is scaled by; parts: [2]
  __device__ __forceinline__ void measure(bool center, float eps, int hidden, float (*parts)[N][kWarps]) {
    if (center) {
      float mean[N] = {};
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int i = 0; i < kEach; ++i) mean[r] += (v[r][i].x + v[r][i].y) + (v[r][i].z + v[r][i].w);
      block_sums(mean, parts[0]);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        const float m = mean[r] / hidden;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          if (i * int(blockDim.x) + int(threadIdx.x) < hidden / 4) v[r][i].x -= m, v[r][i].y -= m, v[r][i].z -= m, v[r][i].w -= m;
      }
    }
#pragma unroll
    for (int r = 0; r < N; ++r) {
      scale[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kEach; ++i)  // spelled out: the same whatever the compiler does with the rest
        scale[r] += __fadd_rn(__fmaf_rn(v[r][i].x, v[r][i].x, __fmul_rn(v[r][i].y, v[r][i].y)), __fmaf_rn(v[r][i].z, v[r][i].z, __fmul_rn(v[r][i].w, v[r][i].w)));
    }
    block_sums(scale, parts[1]);
#pragma unroll
    for (int r = 0; r < N; ++r) scale[r] = 1.f / sqrtf(scale[r] / hidden + eps);
  }
  __device__ __forceinline__ float4 value(int r, int i, float4 g, float4 b) const {
    return make_float4(fmaf(v[r][i].x * scale[r], g.x, b.x), fmaf(v[r][i].y * scale[r], g.y, b.y), fmaf(v[r][i].z * scale[r], g.z, b.z),
                       fmaf(v[r][i].w * scale[r], g.w, b.w));
  }
};

// hidden a multiple of 4, at most kEach float4 a thread. grid: (rows, outputs)
template <class T>
__global__ void __launch_bounds__(kThreads) norm_few(const Outputs out, const float* __restrict__ x, bool center, float eps, int hidden, int) {
  __shared__ __align__(16) float parts[2][1][kWarps];
  launch_dependents();
  for (int i = threadIdx.x; i < 2 * kWarps; i += blockDim.x) (&parts[0][0][0])[i] = 0.f;
  const Norm n = blockIdx.y ? out.n[1] : out.n[0];
  const int count = hidden / 4;
  extern __shared__ float4 terms[];  // gain, bias [kEach * threads]; a thread reads what it has asked for
  float4* const gain = terms + threadIdx.x;
  float4* const bias = gain + kEach * blockDim.x;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at >= count) continue;
    if (n.weight) copy16(gain + i * blockDim.x, reinterpret_cast<const float4*>(n.weight) + at);
    if (n.bias) copy16(bias + i * blockDim.x, reinterpret_cast<const float4*>(n.bias) + at);
  }
  __syncthreads();
  grid_wait();
  RowBlock<1> rows;
  rows.load(x + int64_t(blockIdx.x) * hidden, 1, hidden);
  rows.measure(center, eps, hidden, parts);
  copy_wait_all();
  T* const y = static_cast<T*>(blockIdx.y ? out.y[1] : out.y[0]) + int64_t(blockIdx.x) * hidden;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < count)
      store4(y + at * 4, rows.value(0, i, n.weight ? gain[i * blockDim.x] : make_float4(1.f, 1.f, 1.f, 1.f), n.bias ? bias[i * blockDim.x] : make_float4(0.f, 0.f, 0.f, 0.f)));
  }
}

// The same for kRowsEach rows and both outputs, for which gain and bias are read once. grid: (rows / kRowsEach)
template <class T>
__global__ void __launch_bounds__(kThreads) norm_many(const Outputs out, const float* __restrict__ x, bool center, float eps, int hidden, int all) {
  __shared__ __align__(16) float parts[2][kRowsEach][kWarps];
  launch_dependents();
  for (int i = threadIdx.x; i < 2 * kRowsEach * kWarps; i += blockDim.x) (&parts[0][0][0])[i] = 0.f;
  const int first = blockIdx.x * kRowsEach, count = min(all - first, kRowsEach);
  __syncthreads();
  grid_wait();
  RowBlock<kRowsEach> rows;
  rows.load(x + int64_t(first) * hidden, count, hidden);
  rows.measure(center, eps, hidden, parts);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at >= hidden / 4) continue;
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      float4 g = make_float4(1.f, 1.f, 1.f, 1.f), b = make_float4(0.f, 0.f, 0.f, 0.f);
      if (out.n[o].weight) g = reinterpret_cast<const float4*>(out.n[o].weight)[at];
      if (out.n[o].bias) b = reinterpret_cast<const float4*>(out.n[o].bias)[at];
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r)
        if (r < count) store4(static_cast<T*>(out.y[o]) + int64_t(first + r) * hidden + at * 4, rows.value(r, i, g, b));
    }
  }
}

// any hidden
template <class T>
__global__ void __launch_bounds__(kThreads) norm_long(const Outputs out, const float* __restrict__ x, bool center, float eps, int hidden, int) {
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
    launch(s, both ? two : vectors ? one : any, both ? dim3((T + kRowsEach - 1) / kRowsEach) : dim3(T, outputs), threads, terms, o, x, kind == NormKind::layer, eps, hidden, T);
  };
  switch (act) {
    case DType::f32: return go(norm_few<float>, norm_many<float>, norm_long<float>);
    case DType::f16: return go(norm_few<__half>, norm_many<__half>, norm_long<__half>);
    default: return go(norm_few<__nv_bfloat16>, norm_many<__nv_bfloat16>, norm_long<__nv_bfloat16>);
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
