// Weights from the file's rows to the device's layout: tiles of the compute dtype (tiles.cuh), or float32 rows.
#include "cuda/kernels.h"
#include "cuda/tiles.cuh"

namespace codefuse::cuda {

namespace {

template <class S, class T>
__device__ __forceinline__ T convert(S v, int32_t* overflow) {
  float f = to_float(v);
  T out = from_float<T>(f);
  if (sizeof(T) == 2 && isfinite(f) && !isfinite(to_float(out))) *overflow = 1;
  return out;
}

// One thread makes the 16 bytes of one lane: two pairs of columns of two rows. grid: (chunks of a group, groups)
template <class S, class T>
__global__ void to_tiles(const S* __restrict__ src, int rows, int K, T* __restrict__ dst, int64_t first_row, int32_t* overflow) {
  const int64_t steps = steps_of(K);
  for (int i = threadIdx.x; i < kChunkBytes / 16; i += blockDim.x) {
    const int lane = i % 32, step = i / 32 % 4, tile = i / 128;
    const int r = blockIdx.y * kGroupRows + tile * 16 + lane / 4, c = blockIdx.x * kChunkCols + step * 16 + lane % 4 * 2;
    T* out = dst + tile_offset(first_row + r, c, steps);
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int row = r + 8 * h, col = c + 8 * p + e;
          out[4 * p + 2 * h + e] = row < rows && col < K ? convert<S, T>(src[int64_t(row) * K + col], overflow) : from_float<T>(0.f);
        }
  }
}

template <class S>
__global__ void to_rows(const S* __restrict__ src, int64_t n, float* __restrict__ dst) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) dst[i] = to_float(src[i]);
}

template <class S>
void run(const Stream& s, DType act, const void* src, int rows, int K, void* dst, int64_t first_row, int32_t* overflow) {
  const S* in = static_cast<const S*>(src);
  dim3 grid(unsigned(steps_of(K)), unsigned(groups_of(rows)));
  if (act == DType::f16)
    to_tiles<<<grid, 256, 0, s.stream>>>(in, rows, K, static_cast<__half*>(dst), first_row, overflow);
  else
    to_tiles<<<grid, 256, 0, s.stream>>>(in, rows, K, static_cast<__nv_bfloat16*>(dst), first_row, overflow);
}

}  // namespace

void repack(const Stream& s, DType act, Format format, const void* src, int rows, int K, void* dst, int64_t first_row, int32_t* overflow) {
  if (act == DType::f32) return to_float32(s, format, src, int64_t(rows) * K, static_cast<float*>(dst) + first_row * K);
  if (format == Format::f32)
    run<float>(s, act, src, rows, K, dst, first_row, overflow);
  else if (format == Format::f16)
    run<__half>(s, act, src, rows, K, dst, first_row, overflow);
  else
    run<__nv_bfloat16>(s, act, src, rows, K, dst, first_row, overflow);
  check(cudaGetLastError(), "repacking weights");
}

void to_float32(const Stream& s, Format format, const void* src, int64_t n, float* dst) {
  const int blocks = int(std::min<int64_t>((n + 255) / 256, 4096));
  if (format == Format::f32)
    to_rows<<<blocks, 256, 0, s.stream>>>(static_cast<const float*>(src), n, dst);
  else if (format == Format::f16)
    to_rows<<<blocks, 256, 0, s.stream>>>(static_cast<const __half*>(src), n, dst);
  else
    to_rows<<<blocks, 256, 0, s.stream>>>(static_cast<const __nv_bfloat16*>(src), n, dst);
  check(cudaGetLastError(), "converting weights");
}

}  // namespace codefuse::cuda
