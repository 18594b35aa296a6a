// LayerNorm and RMSNorm of float32 rows; one block per row, the row kept in shared memory between its passes when it fits.
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kKept = 8192;  // floats of a row kept in shared memory

// sum over the block, the same on every thread; the order is fixed
__device__ __forceinline__ float block_sum(float v, float* parts /*[kThreads / 32]*/) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += parts[i];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) norm_rows(T* __restrict__ y, const float* __restrict__ x, const float* __restrict__ weight,
                                                       const float* __restrict__ bias, bool center, float eps, int hidden) {
  __shared__ float kept[kKept], parts[kThreads / 32];
  launch_dependents();
  grid_wait();
  x += int64_t(blockIdx.x) * hidden;
  y += int64_t(blockIdx.x) * hidden;
  const bool keep = hidden <= kKept;
  float sum = 0.f;
#pragma unroll 8
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    float v = x[i];
    if (keep) kept[i] = v;
    sum += v;
  }
  const float mean = center ? block_sum(sum, parts) / hidden : 0.f;
  const float* row = keep ? kept : x;  // a thread reads back only what it wrote
  float squares = 0.f;
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    float d = row[i] - mean;
    squares += d * d;
  }
  const float scale = 1.f / sqrtf(block_sum(squares, parts) / hidden + eps);
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    float v = (row[i] - mean) * scale;
    if (weight) v *= weight[i];
    y[i] = from_float<T>(bias ? v + bias[i] : v);
  }
}

template <class T>
void run(const Stream& s, void* y, const float* x, const Norm& n, NormKind kind, float eps, int T_rows, int hidden) {
  launch(s, norm_rows<T>, T_rows, kThreads, 0, static_cast<T*>(y), x, n.weight, n.bias, kind == NormKind::layer, eps, hidden);
}

}  // namespace

void norm(const Stream& s, DType act, void* y, const float* x, const Norm& n, NormKind kind, float eps, int T, int hidden) {
  if (act == DType::f32) return run<float>(s, y, x, n, kind, eps, T, hidden);
  act == DType::f16 ? run<__half>(s, y, x, n, kind, eps, T, hidden) : run<__nv_bfloat16>(s, y, x, n, kind, eps, T, hidden);
}

}  // namespace codefuse::cuda
