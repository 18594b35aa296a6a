// Matrices [N, K] in device memory, by weight format, as the A operand of mma.m16n8k16 (device.cuh). All are chunks of 256 rows, the
// chunks of a row group one after the other, N and K padded with zeros; in a chunk 16 row tiles of 16 rows; in a row tile, lane
// 4 g + t has 16 bytes at a time with elements of rows g and g + 8 only.
//
//   16 bits   tiles.cuh: 64 columns a chunk, 16 bytes are one fragment (16 columns)
//   q8_row    128 columns a chunk, the first 64 of all row tiles before the others; 16 bytes are two fragments: words (columns 2t, 2t + 1),
//             (2t + 8, 2t + 9) of the first, then of the second; bytes 0, 2 of a word are row g, bytes 1, 3 row g + 8, as
//             code + 128. After the chunks a float32 scale per row.
//   q4_g128   256 columns a chunk, by 64 columns and then by row tile; 16 bytes are four fragments, a word each; digits 0, 4 of a word are
//             columns 2t, 2t + 1 of row g, digits 1, 5 of row g + 8, digits 2, 6 columns 2t + 8, 2t + 9 of row g, digits 3, 7 of row
//             g + 8. A chunk ends with its float16 scales and then its zeros, [row tile][g][group of 128 columns][row g, row g + 8];
//             for float16, row g + 8's zero is times 16.
//
// Codes are the fragments; sums over them are scaled in float32.
// 4 and 8 bits become 16 by putting the code into the low bits of a power of two (float16 1024 + c, bfloat16 128 + c): subtracting what
// is too much is exact.
#pragma once
#include "cuda/device.cuh"
#include "cuda/tiles.cuh"
#include "formats/format.h"

namespace codefuse::cuda {

constexpr int kTile8 = 16 * 64, kTile4 = kTile8 / 2;  // bytes of a row tile's 64 columns
constexpr int kCols8 = 128, kBytes8 = kGroupRows * kCols8;
constexpr int kCols4 = 256, kCodes4 = kGroupRows * kCols4 / 2, kScales4 = kGroupRows * 2 /*groups*/ * 2, kZeros4 = kGroupRows * 2;
constexpr int kBytes4 = kCodes4 + kScales4 + kZeros4;

// of any format but float32 rows
inline int chunk_cols(Format f) { return f == Format::q8_row ? kCols8 : f == Format::q4_g128 ? kCols4 : kChunkCols; }
inline int64_t chunks_of(Format f, int64_t k) { return (k + chunk_cols(f) - 1) / chunk_cols(f); }  // of a row group
// Bytes of the chunks, and of everything.
inline size_t chunk_bytes(Format f, int64_t n, int64_t k) {
  return size_t(groups_of(n)) * size_t(chunks_of(f, k)) * size_t(f == Format::q4_g128 ? kBytes4 : kChunkBytes);
}
inline size_t matrix_bytes(Format f, int64_t n, int64_t k) {
  return chunk_bytes(f, n, k) + (f == Format::q8_row ? size_t(groups_of(n)) * kGroupRows * sizeof(float) : 0);
}
// [N padded] float32, nullptr but in q8_row
inline const float* row_scales(Format f, const void* data, int64_t n, int64_t k) {
  return f == Format::q8_row ? reinterpret_cast<const float*>(static_cast<const char*>(data) + chunk_bytes(f, n, k)) : nullptr;
}

#ifdef __CUDACC__

__device__ __forceinline__ __half2 as_half2(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }
__device__ __forceinline__ __nv_bfloat162 as_bfloat162(uint32_t v) { return *reinterpret_cast<__nv_bfloat162*>(&v); }
__device__ __forceinline__ uint32_t as_bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ uint32_t as_bits(__nv_bfloat162 v) { return *reinterpret_cast<uint32_t*>(&v); }

// What a kernel asks of W:
//   Type                     of x and of the fragments
//   kBytes, kCols            of a chunk
//   kScale                   what sums over 64 columns are multiplied by: nothing, the row's scale, or block_scale(), which is in the chunk
//   fragments(a, chunk, tile, block, lane)    a[s]: A operand of columns 64 block + 16 s .. + 15 of rows 16 tile .. + 15
//   block_scale(chunk, tile, block, lane)     of rows 16 tile + lane / 4 and that + 8, columns 64 block .. + 63
enum class Scale { none, row, block };

template <class T>
struct Weights16 {
  using Type = T;
  static constexpr int kCols = kChunkCols, kBytes = kChunkBytes;
  static constexpr Scale kScale = Scale::none;
  static __device__ __forceinline__ void fragments(uint4 (&a)[4], const uint8_t* chunk, int tile, int, int lane) {
#pragma unroll
    for (int s = 0; s < 4; ++s) a[s] = *reinterpret_cast<const uint4*>(chunk + tile * kRowTileBytes + s * 512 + lane * 16);
  }
};

template <class T>
struct Weights8 {
  using Type = T;
  static constexpr int kCols = kCols8, kBytes = kBytes8;
  static constexpr Scale kScale = Scale::row;

  // bytes 0, 2 and bytes 1, 3 of w, less 128
  static __device__ __forceinline__ void decode(uint32_t w, uint32_t& even, uint32_t& odd) {
    if constexpr (std::is_same<T, __half>::value) {
      const __half2 excess = as_half2(0x64806480u);  // 1024 + 128
      even = as_bits(__hsub2(as_half2(__byte_perm(w, 0x64646464u, 0x4240)), excess));
      odd = as_bits(__hsub2(as_half2(__byte_perm(w, 0x64646464u, 0x4341)), excess));
    } else {  // 128 + the low 7 bits, less 128 or, where the high bit is not set, 256
      const uint32_t h = w >> 8;
      even = as_bits(__hsub2(as_bfloat162((w & 0x007f007fu) | 0x43004300u), as_bfloat162((~w & 0x00800080u) | 0x43004300u)));
      odd = as_bits(__hsub2(as_bfloat162((h & 0x007f007fu) | 0x43004300u), as_bfloat162((~h & 0x00800080u) | 0x43004300u)));
    }
  }

  static __device__ __forceinline__ void tile_fragments(uint4 (&a)[4], const uint8_t* codes /*[kTile8]*/, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 q = *reinterpret_cast<const uint4*>(codes + i * 512 + lane * 16);
      decode(q.x, a[2 * i].x, a[2 * i].y);
      decode(q.y, a[2 * i].z, a[2 * i].w);
      decode(q.z, a[2 * i + 1].x, a[2 * i + 1].y);
      decode(q.w, a[2 * i + 1].z, a[2 * i + 1].w);
    }
  }
  static __device__ __forceinline__ void fragments(uint4 (&a)[4], const uint8_t* chunk, int tile, int block, int lane) {
    tile_fragments(a, chunk + (block * 16 + tile) * kTile8, lane);
  }
};

template <class T>
struct Weights4 {
  using Type = T;
  static constexpr int kCols = kCols4, kBytes = kBytes4;
  static constexpr Scale kScale = Scale::block;

  // zero: of row g, and of row g + 8 in the next byte
  static __device__ __forceinline__ void tile_fragments(uint4 (&a)[4], const uint8_t* codes /*[kTile4]*/, uint32_t zero, int lane) {
    const uint4 q = *reinterpret_cast<const uint4*>(codes + lane * 16);
    const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t w = words[s], h = w >> 8;
      if constexpr (std::is_same<T, __half>::value) {
        // row g: 1024 + code, less 1024 + zero; row g + 8: 1024 + 16 code, divided by 16, less 64 + zero
        const __half2 low = as_half2(__byte_perm(zero, 0xe4e4e4e4u, 0x4040)), high = as_half2(__byte_perm(zero, 0xd4d4d4d4u, 0x4141));
        const __half2 sixteenth = as_half2(0x2c002c00u);
        a[s].x = as_bits(__hadd2(as_half2((w & 0x000f000fu) | 0x64006400u), low));
        a[s].y = as_bits(__hfma2(as_half2((w & 0x00f000f0u) | 0x64006400u), sixteenth, high));
        a[s].z = as_bits(__hadd2(as_half2((h & 0x000f000fu) | 0x64006400u), low));
        a[s].w = as_bits(__hfma2(as_half2((h & 0x00f000f0u) | 0x64006400u), sixteenth, high));
      } else {  // 128 + code, less 128 + zero
        const __nv_bfloat162 low = as_bfloat162(__byte_perm(zero, 0xc3c3c3c3u, 0x4040)), high = as_bfloat162(__byte_perm(zero, 0xc3c3c3c3u, 0x4141));
        a[s].x = as_bits(__hadd2(as_bfloat162((w & 0x000f000fu) | 0x43004300u), low));
        a[s].y = as_bits(__hadd2(as_bfloat162((w >> 4 & 0x000f000fu) | 0x43004300u), high));
        a[s].z = as_bits(__hadd2(as_bfloat162((h & 0x000f000fu) | 0x43004300u), low));
        a[s].w = as_bits(__hadd2(as_bfloat162((h >> 4 & 0x000f000fu) | 0x43004300u), high));
      }
    }
  }
  static __device__ __forceinline__ void fragments(uint4 (&a)[4], const uint8_t* chunk, int tile, int block, int lane) {
    tile_fragments(a, chunk + (block * 16 + tile) * kTile4,
                   *reinterpret_cast<const uint16_t*>(chunk + kCodes4 + kScales4 + (tile * 8 + lane / 4) * 4 + block / 2 * 2), lane);
  }
  static __device__ __forceinline__ float2 block_scale(const uint8_t* chunk, int tile, int block, int lane) {
    return __half22float2(*reinterpret_cast<const __half2*>(chunk + kCodes4 + (tile * 8 + lane / 4) * 8 + block / 2 * 4));
  }
};

#endif  // __CUDACC__

}  // namespace codefuse::cuda
