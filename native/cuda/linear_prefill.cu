// Linear layers of prefill rows on the tensor cores, from the same tiles as decode (one copy of the weights). A block makes 128
// outputs of 128 rows, chunk by chunk of 64 columns in order: a row's result does not depend on how many rows there are.
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/tiles.cuh"

namespace codefuse::cuda {

namespace {

constexpr int kRows = 128;     // outputs of a block: half a row group
constexpr int kTokens = 128;   // rows of x of a block
constexpr int kXStride = kChunkCols * 2 + 16;  // bytes
constexpr int kWBytes = kChunkBytes / 2, kXBytes = kTokens * kXStride, kStageBytes = kWBytes + kXBytes;
constexpr int kOutStride = kRows + 4;  // floats between rows of the output tile in shared memory

template <class T, int STAGES>
__global__ void __launch_bounds__(256, 2) gemm(const uint8_t* __restrict__ w, const uint8_t* __restrict__ x, int tokens, int N, int steps, Epilogue e) {
  extern __shared__ __align__(128) uint8_t smem[];  // [STAGES] (weights, x); afterwards the outputs, float [kTokens, kOutStride]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % 2, token_warp = warp / 2;  // 64 outputs x 32 rows of x per warp
  const int token0 = blockIdx.x * kTokens, n0 = blockIdx.y * kRows;
  w += size_t(blockIdx.y / 2) * steps * kChunkBytes + blockIdx.y % 2 * kWBytes;
  const size_t row_bytes = size_t(steps) * kChunkCols * 2;
  launch_dependents();
  grid_wait();

  // 16 bytes per copy; a row of x past the last one is zeros
  const uint8_t* w_from = w + threadIdx.x * 16;
  const uint8_t* x_from = x + (token0 + threadIdx.x / 8) * row_bytes + threadIdx.x % 8 * 16;
  const int tokens_left = tokens - token0 - int(threadIdx.x / 8), x_to = kWBytes + threadIdx.x / 8 * kXStride + threadIdx.x % 8 * 16;
  int fetched = 0, fill = 0;  // chunks asked for, and the stage of the next
  auto fetch = [&] {
    if (fetched++ < steps) {
      uint8_t* stage = smem + fill * kStageBytes;
#pragma unroll
      for (int i = 0; i < kWBytes / 4096; ++i) copy16(stage + threadIdx.x * 16 + i * 4096, w_from + i * 4096);
#pragma unroll
      for (int i = 0; i < kTokens / 32; ++i) copy16(stage + x_to + i * 32 * kXStride, x_from + i * 32 * row_bytes, 32 * i < tokens_left ? 16 : 0);
    }
    w_from += kChunkBytes;
    x_from += kChunkCols * 2;
    fill = fill + 1 == STAGES ? 0 : fill + 1;
    copy_commit();
  };

  float acc[4][4][4] = {};  // [row tile][group of 8 rows of x]
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) fetch();
  for (int step = 0, at = 0; step < steps; ++step) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    fetch();
    const uint8_t* stage = smem + at * kStageBytes;
    at = at + 1 == STAGES ? 0 : at + 1;
    const uint8_t* ws = stage + row_warp * 4 * kRowTileBytes + lane * 16;
    const uint8_t* xs = stage + kWBytes + (token_warp * 32 + lane % 8) * kXStride + lane / 8 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[4][4];  // 8 rows x 32 columns of x each
#pragma unroll
      for (int j = 0; j < 4; ++j) ldmatrix4(b[j], xs + j * 8 * kXStride + half * 64);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint4 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const uint4*>(ws + i * kRowTileBytes + (half * 2 + s) * 512);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) mma16816<T>(acc[i][j], a[i].x, a[i].y, a[i].z, a[i].w, b[j][2 * s], b[j][2 * s + 1]);
      }
    }
  }

  copy_wait<0>();
  __syncthreads();
  float* out = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        out[(token_warp * 32 + j * 8 + 2 * t + q % 2) * kOutStride + row_warp * 64 + i * 16 + g + q / 2 * 8] = acc[i][j][q];
  __syncthreads();
  const int n = n0 + lane * 4;
  for (int r = warp; r < kTokens && token0 + r < tokens; r += 8) {
    const float4 z = *reinterpret_cast<const float4*>(out + r * kOutStride + lane * 4);
    if (e.store == Store::act && N % 4 == 0) {
      if (n >= N) continue;
      float4 bias = e.bias ? make_float4(e.bias[n], e.bias[n + 1], e.bias[n + 2], e.bias[n + 3]) : make_float4(0.f, 0.f, 0.f, 0.f);
      uint2 y;
      y.x = pack2<T>(activate(z.x + bias.x, e.activation), activate(z.y + bias.y, e.activation));
      y.y = pack2<T>(activate(z.z + bias.z, e.activation), activate(z.w + bias.w, e.activation));
      *reinterpret_cast<uint2*>(static_cast<T*>(e.y) + int64_t(token0 + r) * N + n) = y;
    } else {
      const float v[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (n + q < N) store_output<T>(e, v[q], token0 + r, n + q, N);
    }
  }
}

template <class T>
void run(const Stream& s, const void* x, const void* w, int tokens, int N, int K, const Epilogue& e) {
  dim3 grid((tokens + kTokens - 1) / kTokens, (N + kRows - 1) / kRows);
  const auto* wb = static_cast<const uint8_t*>(w);
  const auto* xb = static_cast<const uint8_t*>(x);
  if (s.shared_max >= 3 * kStageBytes)
    launch(s, gemm<T, 3>, grid, 256, 3 * kStageBytes, wb, xb, tokens, N, int(steps_of(K)), e);
  else
    launch(s, gemm<T, 2>, grid, 256, 2 * kStageBytes, wb, xb, tokens, N, int(steps_of(K)), e);
}

__global__ void pad(uint16_t* __restrict__ y, const uint16_t* __restrict__ x, int K, int padded) {
  launch_dependents();
  grid_wait();
  for (int k = threadIdx.x; k < padded; k += blockDim.x) y[int64_t(blockIdx.x) * padded + k] = k < K ? load_fresh(x + (int64_t(blockIdx.x) * K + k)) : uint16_t(0);
}

}  // namespace

void prefill_linear(const Stream& s, DType act, const void* x, const void* w, int T, int N, int K, const Epilogue& e) {
  act == DType::f16 ? run<__half>(s, x, w, T, N, K, e) : run<__nv_bfloat16>(s, x, w, T, N, K, e);
}

void pad_columns(const Stream& s, void* y, const void* x, int T, int K, int padded) {
  launch(s, pad, T, 256, 0, static_cast<uint16_t*>(y), static_cast<const uint16_t*>(x), K, padded);
}

}  // namespace codefuse::cuda
