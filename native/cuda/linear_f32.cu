// Linear layers in float32, with FMA: for exact comparison with the CPU, not for speed. Each output's order of summation is
// fixed by K alone.
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kTile = 64, kDepth = 16;

// One output per warp, 8 rows of x at a time: lane l adds columns l, l + 32, ...
__global__ void __launch_bounds__(256) row_times_vectors(const float* __restrict__ x, const float* __restrict__ w, int T, int N, int K, Epilogue e) {
  launch_dependents();
  grid_wait();
  const int lane = threadIdx.x % 32, n = blockIdx.x * 8 + threadIdx.x / 32;
  if (n >= N) return;
  for (int t0 = 0; t0 < T; t0 += 8) {
    float acc[8] = {};
    for (int k = lane; k < K; k += 32) {
      const float a = w[int64_t(n) * K + k];
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[j] = fmaf(a, load_fresh(x + (int64_t(min(t0 + j, T - 1)) * K + k)), acc[j]);
    }
    float mine = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      for (int o = 16; o > 0; o /= 2) acc[j] += __shfl_xor_sync(~0u, acc[j], o);
      if (lane == j) mine = acc[j];
    }
    if (lane < 8 && t0 + lane < T) store_output<float>(e, mine, t0 + lane, n, N);
  }
}

// 64 outputs x 64 rows of x per block, 4 x 4 per thread
__global__ void __launch_bounds__(256) gemm_f32(const float* __restrict__ x, const float* __restrict__ w, int T, int N, int K, Epilogue e) {
  __shared__ float ws[kDepth][kTile + 1], xs[kDepth][kTile + 1];
  launch_dependents();
  grid_wait();
  const int t0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile, tn = threadIdx.x % 16, tt = threadIdx.x / 16;
  float acc[4][4] = {};
  for (int k0 = 0; k0 < K; k0 += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += 256) {
      int r = i / kDepth, c = i % kDepth;
      bool inside = k0 + c < K;
      ws[c][r] = inside && n0 + r < N ? w[int64_t(n0 + r) * K + k0 + c] : 0.f;
      xs[c][r] = inside && t0 + r < T ? load_fresh(x + (int64_t(t0 + r) * K + k0 + c)) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = ws[c][tn + 16 * i], b[i] = xs[c][tt + 16 * i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
    }
    __syncthreads();
  }
#pragma unroll 1  // an activation is long, and so is compiling 16 of them
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int n = n0 + tn + 16 * i, t = t0 + tt + 16 * j;
      if (n < N && t < T) store_output<float>(e, acc[0][j], t, n, N);
      acc[0][j] = acc[1][j], acc[1][j] = acc[2][j], acc[2][j] = acc[3][j];
    }
  }
}

}  // namespace

void decode_linear_f32(const Stream& s, const float* x, const float* w, int T, int N, int K, const Epilogue& e) {
  launch(s, row_times_vectors, (N + 7) / 8, 256, 0, x, w, T, N, K, e);
}

void prefill_linear_f32(const Stream& s, const float* x, const float* w, int T, int N, int K, const Epilogue& e) {
  launch(s, gemm_f32, dim3((T + kTile - 1) / kTile, (N + kTile - 1) / kTile), 256, 0, x, w, T, N, K, e);
}

}  // namespace codefuse::cuda
