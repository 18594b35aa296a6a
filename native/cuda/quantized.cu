// Quantized matrices on the device: from the file's rows to chunks (weights.cuh), and from chunks to values.
#include "cuda/kernels.h"
#include "cuda/weights.cuh"

namespace codefuse::cuda {

namespace {

// 4-bit code of (row, column) in the canonical layout of formats/format.h
template <int GROUP>
__device__ __forceinline__ uint32_t code4(const uint8_t* codes, int64_t row, int col, int K) {
  constexpr int kHalf = GROUP / 2;
  const uint8_t b = codes[row * (K / 2) + col / GROUP * kHalf + col % kHalf];
  return col % GROUP < kHalf ? b & 15u : b >> 4;
}

// One thread makes 16 bytes of a lane. grid: (chunks of a group, groups); rows from row group first_group on.
__global__ void pack8(const uint8_t* __restrict__ codes, const float* __restrict__ scale, int rows, int K, uint8_t* __restrict__ dst, float* __restrict__ row_scale,
                      int first_group, bool limited, int32_t* overflow) {
  uint8_t* const chunk = dst + (size_t(first_group + blockIdx.y) * gridDim.x + blockIdx.x) * kBytes8;
  for (int i = threadIdx.x; i < kBytes8 / 16; i += blockDim.x) {
    const int lane = i % 32, part = i / 32 % 2, tile = i / 64 % 16, block = i / 1024, row = blockIdx.y * kGroupRows + tile * 16 + lane / 4;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int col = blockIdx.x * kCols8 + block * 64 + part * 32 + w * 8 + lane % 4 * 2;
      words[w] = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) {  // row g, row g + 8, then the next column
        const int r = row + b % 2 * 8, c = col + b / 2;
        words[w] |= (r < rows && c < K ? uint32_t(codes[int64_t(r) * K + c]) ^ 0x80u : 0x80u) << 8 * b;
      }
    }
    *reinterpret_cast<uint4*>(chunk + i * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < kGroupRows; i += blockDim.x) {
      const int row = blockIdx.y * kGroupRows + i;
      const float s = row < rows ? scale[row] : 0.f;
      if (limited && s * 127 > 65504.f) *overflow = 1;
      row_scale[int64_t(first_group + blockIdx.y) * kGroupRows + i] = s;
    }
}

template <int GROUP>
__global__ void pack4(const uint8_t* __restrict__ codes, const __half* __restrict__ scale, const uint8_t* __restrict__ zero, int rows, int K, uint8_t* __restrict__ dst,
                      int first_group, bool limited, int32_t* overflow) {
  constexpr int kGroups = groups4(GROUP), kScales = scales4(GROUP);
  uint8_t* const chunk = dst + (size_t(first_group + blockIdx.y) * gridDim.x + blockIdx.x) * bytes4(GROUP);
  for (int i = threadIdx.x; i < kCodes4 / 16; i += blockDim.x) {
    const int lane = i % 32, tile = i / 32 % 16, block = i / 512, row = blockIdx.y * kGroupRows + tile * 16 + lane / 4;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int col = blockIdx.x * kCols4 + block * 64 + w * 16 + lane % 4 * 2;
      words[w] = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n) {  // row g, row g + 8; 8 columns on; the next column
        const int r = row + n % 2 * 8, c = col + n / 2 % 2 * 8 + n / 4;
        words[w] |= (r < rows && c < K ? code4<GROUP>(codes, r, c, K) : 0u) << 4 * n;
      }
    }
    *reinterpret_cast<uint4*>(chunk + i * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  const int groups = K / GROUP;
  for (int i = threadIdx.x; i < kGroupRows * kGroups; i += blockDim.x) {
    const int row = blockIdx.y * kGroupRows + i / (16 * kGroups) * 16 + i / (2 * kGroups) % 8 + i % 2 * 8, group = blockIdx.x * kGroups + i / 2 % kGroups;
    const bool inside = row < rows && group < groups;
    const __half s = inside ? scale[int64_t(row) * groups + group] : __float2half(0.f);
    if (limited && __half2float(s) * 15 > 65504.f) *overflow = 1;
    reinterpret_cast<__half*>(chunk + kCodes4)[i] = s;
    const uint32_t mine = inside ? uint32_t(zero[int64_t(row) * groups + group]) << i % 2 * 4 : 0u, other = __shfl_xor_sync(~0u, mine, 1);
    if (i % 2 == 0) chunk[kCodes4 + kScales + i / 2] = uint8_t(mine | other);
  }
}

__global__ void rows8(const int8_t* __restrict__ codes, const float* __restrict__ scale, int64_t n, int K, float* __restrict__ dst) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) dst[i] = float(codes[i]) * scale[i / K];
}

template <int GROUP>
__global__ void rows4(const uint8_t* __restrict__ codes, const __half* __restrict__ scale, const uint8_t* __restrict__ zero, int64_t n, int K, float* __restrict__ dst) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t group = i / GROUP;
    dst[i] = float(int(code4<GROUP>(codes, i / K, int(i % K), K)) - int(zero[group])) * __half2float(scale[group]);
  }
}

// Scales of rows 16 tile + lane / 4 and that + 8; row_scale: of the row group.
template <class W>
__device__ __forceinline__ float2 scales_of(const typename W::Group& group, const float* row_scale, int tile, int lane) {
  if constexpr (W::kScale == Scale::block) return group.scale;
  if constexpr (W::kScale == Scale::row) return make_float2(row_scale[tile * 16 + lane / 4], row_scale[tile * 16 + lane / 4 + 8]);
  return make_float2(1.f, 1.f);
}

// A warp takes a row tile of a chunk to 16-bit tiles. grid: (chunks of a group, groups, 2)
template <class W>
__global__ void __launch_bounds__(256) expand_tiles(const uint8_t* __restrict__ src, const float* __restrict__ row_scale, uint8_t* __restrict__ dst, int steps16) {
  using T = typename W::Type;
  launch_dependents();
  const int lane = threadIdx.x % 32, tile = blockIdx.z * 8 + threadIdx.x / 32;
  const uint8_t* const chunk = src + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * W::kBytes;
  grid_wait();
#pragma unroll
  for (int block = 0; block < W::kCols / 64; ++block) {
    const int chunk16 = blockIdx.x * (W::kCols / 64) + block;
    if (chunk16 >= steps16) break;
    uint4 a[4];
    const typename W::Group group = W::group(chunk, tile, block, lane);
    fragments<W>(a, W::codes(chunk, tile, block, lane), group);
    const float2 s = scales_of<W>(group, row_scale + blockIdx.y * kGroupRows, tile, lane);
    uint8_t* const to = dst + (size_t(blockIdx.y) * steps16 + chunk16) * kChunkBytes + tile * kRowTileBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack2<T>(a[i].x), y = unpack2<T>(a[i].y), z = unpack2<T>(a[i].z), w = unpack2<T>(a[i].w);
      *reinterpret_cast<uint4*>(to + i * 512) = make_uint4(pack2<T>(x.x * s.x, x.y * s.x), pack2<T>(y.x * s.y, y.y * s.y), pack2<T>(z.x * s.x, z.y * s.x),
                                                           pack2<T>(w.x * s.y, w.y * s.y));
    }
  }
}

// A warp writes the values of a row tile of a chunk. grid: (chunks of a group, groups, 2)
template <class W>
__global__ void __launch_bounds__(256) read_tiles(const uint8_t* __restrict__ src, const float* __restrict__ row_scale, float* __restrict__ y, int N, int K) {
  using T = typename W::Type;
  const int lane = threadIdx.x % 32, tile = blockIdx.z * 8 + threadIdx.x / 32;
  const uint8_t* const chunk = src + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * W::kBytes;
  for (int block = 0; block < W::kCols / 64; ++block) {
    uint4 a[4];
    const typename W::Group group = W::group(chunk, tile, block, lane);
    fragments<W>(a, W::codes(chunk, tile, block, lane), group);
    const float2 s = scales_of<W>(group, row_scale + blockIdx.y * kGroupRows, tile, lane);
    for (int i = 0; i < 16; ++i) {
      const uint4 f = a[i / 4];
      const float2 v = unpack2<T>(i % 4 == 0 ? f.x : i % 4 == 1 ? f.y : i % 4 == 2 ? f.z : f.w);
      const int r = blockIdx.y * kGroupRows + tile * 16 + lane / 4 + i % 2 * 8;
      const int c = blockIdx.x * W::kCols + block * 64 + i / 4 * 16 + i % 4 / 2 * 8 + lane % 4 * 2;
      const float scale = i % 2 ? s.y : s.x;
      if (r < N && c < K) y[int64_t(r) * K + c] = v.x * scale;
      if (r < N && c + 1 < K) y[int64_t(r) * K + c + 1] = v.y * scale;
    }
  }
}

template <class W>
void read(const Stream& s, Format f, const void* w, int N, int K, float* y) {
  dim3 grid(unsigned(chunks_of(f, K)), unsigned(groups_of(N)), 2);
  read_tiles<W><<<grid, 256, 0, s.stream>>>(static_cast<const uint8_t*>(w), row_scales(f, w, N, K), y, N, K);
}

template <class T>
void read_any(const Stream& s, Format f, const void* w, int N, int K, float* y) {
  if (!is_quantized(f)) return read<Weights16<T>>(s, f, w, N, K, y);
  with_quantized<T>(f, [&](auto weights) { read<decltype(weights)>(s, f, w, N, K, y); });
}

template <class T>
void expand(const Stream& s, Format f, const void* w, int N, int K, void* tiles) {
  dim3 grid(unsigned(chunks_of(f, K)), unsigned(groups_of(N)), 2);
  const auto* from = static_cast<const uint8_t*>(w);
  auto* to = static_cast<uint8_t*>(tiles);
  with_quantized<T>(f, [&](auto weights) {
    launch(s, expand_tiles<decltype(weights)>, grid, 256, 0, from, row_scales(f, w, N, K), to, int(steps_of(K)));
  });
}

}  // namespace

void repack_quantized(const Stream& s, DType act, const HostMatrix& part, int64_t total_rows, void* dst, int64_t first_row, int32_t* overflow) {
  const int rows = int(part.rows), K = int(part.cols);
  const auto* half_scale = reinterpret_cast<const __half*>(part.scale.data);
  const auto* float_scale = reinterpret_cast<const float*>(part.scale.data);
  if (act == DType::f32) {
    const int64_t n = int64_t(rows) * K;
    const int blocks = int(std::min<int64_t>((n + 255) / 256, 4096));
    float* to = static_cast<float*>(dst) + first_row * K;
    if (part.format == Format::q8_row)
      rows8<<<blocks, 256, 0, s.stream>>>(reinterpret_cast<const int8_t*>(part.data), float_scale, n, K, to);
    else
      (part.format == Format::q4_g128 ? rows4<128> : rows4<64>)<<<blocks, 256, 0, s.stream>>>(part.data, half_scale, part.zero.data, n, K, to);
  } else {
    dim3 grid(unsigned(chunks_of(part.format, K)), unsigned(groups_of(rows)));
    auto* to = static_cast<uint8_t*>(dst);
    const int group = int(first_row / kGroupRows);
    if (part.format == Format::q8_row)
      pack8<<<grid, 256, 0, s.stream>>>(part.data, float_scale, rows, K, to, const_cast<float*>(row_scales(part.format, dst, total_rows, K)), group, act == DType::f16, overflow);
    else
      (part.format == Format::q4_g128 ? pack4<128> : pack4<64>)<<<grid, 256, 0, s.stream>>>(part.data, half_scale, part.zero.data, rows, K, to, group, act == DType::f16, overflow);
  }
  check(cudaGetLastError(), "repacking weights");
}

void expand(const Stream& s, DType act, Format format, const void* w, int N, int K, void* tiles) {
  act == DType::f16 ? expand<__half>(s, format, w, N, K, tiles) : expand<__nv_bfloat16>(s, format, w, N, K, tiles);
}

void read_weights(const Stream& s, DType act, Format format, const void* w, int N, int K, float* y) {
  if (act == DType::f32)
    check(cudaMemcpyAsync(y, w, size_t(N) * size_t(K) * 4, cudaMemcpyDeviceToDevice, s.stream), "reading weights");
  else if (act == DType::f16)
    read_any<__half>(s, format, w, N, K, y);
  else
    read_any<__nv_bfloat16>(s, format, w, N, K, y);
  check(cudaGetLastError(), "reading weights");
}

}  // namespace codefuse::cuda
