// Matrices [N, K] in device memory, by weight format, as the A operand of mma.m16n8k16 (device.cuh). All are chunks of 256 rows, the
// chunks of a row group one after the other, N and K padded with zeros; in a chunk 16 row tiles of 16 rows; in a row tile, lane
// 4 g + t has 16 bytes at a time with elements of rows g and g + 8 only.
//
//   16 bits   tiles.cuh: 64 columns a chunk, 16 bytes are one fragment (16 columns)
//   q8_row    128 columns a chunk, the first 64 of all row tiles before the others; 16 bytes are two fragments: words (columns 2t, 2t + 1),
//             (2t + 8, 2t + 9) of the first, then of the second; bytes 0, 2 of a word are row g, bytes 1, 3 row g + 8, as
//             code + 128. After the chunks a float32 scale per row.
//   q4_g128,  128 columns a chunk, by 64 columns and then by row tile; 16 bytes are four fragments, a word each; digits 0, 4 of a word are
//   q4_g64    columns 2t, 2t + 1 of row g, digits 1, 5 of row g + 8, digits 2, 6 columns 2t + 8, 2t + 9 of row g, digits 3, 7 of row
//             g + 8. A chunk ends with its float16 scales, [row tile][g][group of 128 or 64 columns][row g, row g + 8], and its zeros, a
//             byte for both rows, row g's the low digit.
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
constexpr int kCols4 = 128, kCodes4 = kGroupRows * kCols4 / 2;
// of a chunk of 4-bit codes in groups of so many columns
constexpr int groups4(int group_cols) { return kCols4 / group_cols; }
constexpr int scales4(int group_cols) { return kGroupRows * groups4(group_cols) * 2; }  // bytes
constexpr int zeros4(int group_cols) { return kGroupRows * groups4(group_cols) / 2; }   // bytes
constexpr int bytes4(int group_cols) { return kCodes4 + scales4(group_cols) + zeros4(group_cols); }

// of any format but float32 rows
inline int chunk_cols(Format f) { return f == Format::q8_row ? kCols8 : group_cols(f) ? kCols4 : kChunkCols; }
inline int64_t chunks_of(Format f, int64_t k) { return (k + chunk_cols(f) - 1) / chunk_cols(f); }  // of a row group
// Bytes of the chunks, and of everything.
inline size_t chunk_bytes(Format f, int64_t n, int64_t k) {
  return size_t(groups_of(n)) * size_t(chunks_of(f, k)) * size_t(group_cols(f) ? bytes4(int(group_cols(f))) : kChunkBytes);
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

// Weights in shared memory by their 32-bit address, for kernels that compute it once: a generic pointer to shared memory is put together
// anew at every use.
struct Shared {
  uint32_t at;
  __device__ __forceinline__ Shared operator+(int bytes) const { return {at + uint32_t(bytes)}; }
};
// volatile: not moved across barriers, which are volatile too
__device__ __forceinline__ uint4 load16(Shared p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p.at));
  return v;
}
__device__ __forceinline__ uint32_t load4(Shared p) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p.at));
  return v;
}
__device__ __forceinline__ uint32_t load1(Shared p) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(p.at));
  return v;
}
__device__ __forceinline__ uint2 load8(Shared p) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(p.at));
  return v;
}
__device__ __forceinline__ void store4(Shared p, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(p.at), "r"(v) : "memory"); }
__device__ __forceinline__ void store8(Shared p, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(p.at), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ uint4 load16(const uint8_t* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ uint32_t load4(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ __forceinline__ uint32_t load1(const uint8_t* p) { return *p; }

// (w & mask) | bits in one instruction
template <uint32_t mask, uint32_t bits>
__device__ __forceinline__ uint32_t digit(uint32_t w) {
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(w), "n"(mask), "r"(bits));
  return v;
}

// What a kernel asks of W; a chunk is a pointer or Shared:
//   Type                     of x and of the fragments
//   kBytes, kCols            of a chunk
//   kTile                    bytes of a row tile's 64 columns
//   kScale                   what sums of products are multiplied by: nothing, the row's scale, or Group::scale
//   group(chunk, tile, block, lane)   what the codes of rows 16 tile + lane / 4 and that + 8 have in common
//   Codes, codes(chunk, tile, block, lane)   a lane's share of rows 16 tile .. + 15, columns 64 block .. + 63
//   fragment<s>(codes, group)         A operand of columns 64 block + 16 s .. + 15
// Of quantized weights the streaming kernel multiplies the codes themselves, as bytes:
//   kGroupCols                        columns that are summed up before they are scaled
//   kHigh                             what bytes() multiplies rows g + 8 by
//   bytes<p>(codes)                   A operand of mma16832, columns 64 block + 32 p .. + 31, in the order of stream_x.cuh
//   zeros(chunk, tile, group, lane)   of rows 16 tile + lane / 4 and that + 8 and kGroupCols columns, the latter kHigh times
//   scales(chunk, tile, group, lane)  likewise, not times anything; of Scale::block only
enum class Scale { none, row, block };

struct NoGroup {};
template <int N> struct Words { uint4 v[N]; };

// all four fragments
template <class W>
__device__ __forceinline__ void fragments(uint4 (&a)[4], const typename W::Codes& codes, const typename W::Group& group) {
  a[0] = W::template fragment<0>(codes, group), a[1] = W::template fragment<1>(codes, group);
  a[2] = W::template fragment<2>(codes, group), a[3] = W::template fragment<3>(codes, group);
}

template <class T>
struct Weights16 {
  using Type = T;
  using Group = NoGroup;
  static constexpr int kCols = kChunkCols, kBytes = kChunkBytes, kTile = kRowTileBytes;
  static constexpr Scale kScale = Scale::none;
  template <class P> static __device__ __forceinline__ Group group(P, int, int, int) { return {}; }
  using Codes = Words<4>;
  template <class P>
  static __device__ __forceinline__ Codes codes(P chunk, int tile, int, int lane) {
    Codes c;
#pragma unroll
    for (int s = 0; s < 4; ++s) c.v[s] = load16(chunk + (tile * kRowTileBytes + s * 512 + lane * 16));
    return c;
  }
  template <int S> static __device__ __forceinline__ uint4 fragment(const Codes& c, const Group&) { return c.v[S]; }
};

template <class T>
struct Weights8 {
  using Type = T;
  using Group = NoGroup;
  static constexpr int kCols = kCols8, kBytes = kBytes8, kTile = kTile8, kGroupCols = kCols8, kHigh = 1;
  static constexpr Scale kScale = Scale::row;
  template <class P> static __device__ __forceinline__ Group group(P, int, int, int) { return {}; }

  // bytes 0, 2 and bytes 1, 3 of w, less 128
  static __device__ __forceinline__ void decode(uint32_t w, uint32_t& even, uint32_t& odd) {
    if constexpr (std::is_same<T, __half>::value) {
      const __half2 excess = as_half2(0x64806480u);  // 1024 + 128
      even = as_bits(__hsub2(as_half2(__byte_perm(w, 0x64646464u, 0x4240)), excess));
      odd = as_bits(__hsub2(as_half2(__byte_perm(w, 0x64646464u, 0x4341)), excess));
    } else {  // 128 + the low 7 bits, less 128 or, where the high bit is not set, 256
      const uint32_t h = w >> 8;
      even = as_bits(__hsub2(as_bfloat162(digit<0x007f007f, 0x43004300>(w)), as_bfloat162(digit<0x00800080, 0x43004300>(~w))));
      odd = as_bits(__hsub2(as_bfloat162(digit<0x007f007f, 0x43004300>(h)), as_bfloat162(digit<0x00800080, 0x43004300>(~h))));
    }
  }

  using Codes = Words<2>;
  template <class P>
  static __device__ __forceinline__ Codes tile_codes(P tile /*[kTile8]*/, int lane) {
    return {{load16(tile + lane * 16), load16(tile + (512 + lane * 16))}};
  }
  template <class P>
  static __device__ __forceinline__ Codes codes(P chunk, int tile, int block, int lane) { return tile_codes(chunk + (block * 16 + tile) * kTile8, lane); }
  template <int S>
  static __device__ __forceinline__ uint4 fragment(const Codes& c, const Group&) {
    uint4 a;
    decode(S % 2 ? c.v[S / 2].z : c.v[S / 2].x, a.x, a.y);
    decode(S % 2 ? c.v[S / 2].w : c.v[S / 2].y, a.z, a.w);
    return a;
  }

  template <int P> static __device__ __forceinline__ uint4 bytes(const Codes& c) {
    const uint4& v = c.v[P];
    return make_uint4(__byte_perm(v.x, v.y, 0x6240), __byte_perm(v.x, v.y, 0x7351), __byte_perm(v.z, v.w, 0x6240), __byte_perm(v.z, v.w, 0x7351));
  }
  static __device__ __forceinline__ int2 zeros(Shared, int, int, int) { return make_int2(128, 128); }
};

// GROUP: columns that share a scale and a zero
template <class T, int GROUP>
struct Weights4 {
  using Type = T;
  struct Group {
    uint32_t low, high;  // what is subtracted from codes of row g and of row g + 8, twice
    float2 scale;        // of the two
  };
  static constexpr int kCols = kCols4, kBytes = bytes4(GROUP), kTile = kTile4, kBlocks = GROUP / 64, kGroupCols = GROUP, kHigh = 16;
  static constexpr int kGroups = groups4(GROUP), kScales = scales4(GROUP), kZeros = zeros4(GROUP);  // of a chunk; the last two in bytes
  static constexpr Scale kScale = Scale::block;

  // zero: of row g, and of row g + 8 in the next digit
  static __device__ __forceinline__ Group excess(uint32_t zero) {
    Group g;
    if constexpr (std::is_same<T, __half>::value)  // -(1024 + zero); -(64 + zero)
      g.low = __byte_perm(zero & 15, 0xe4e4e4e4u, 0x4040), g.high = __byte_perm(zero & 0xf0, 0xd4d4d4d4u, 0x4040);
    else  // -(128 + zero)
      g.low = __byte_perm(zero & 15, 0xc3c3c3c3u, 0x4040), g.high = __byte_perm(zero >> 4, 0xc3c3c3c3u, 0x4040);
    return g;
  }
  using Codes = Words<1>;
  template <class P>
  static __device__ __forceinline__ Codes tile_codes(P tile /*[kTile4]*/, int lane) { return {{load16(tile + lane * 16)}}; }
  template <class P>
  static __device__ __forceinline__ Codes codes(P chunk, int tile, int block, int lane) { return tile_codes(chunk + (block * 16 + tile) * kTile4, lane); }
  template <int S>
  static __device__ __forceinline__ uint4 fragment(const Codes& c, const Group& g) {
    const uint32_t w = S == 0 ? c.v[0].x : S == 1 ? c.v[0].y : S == 2 ? c.v[0].z : c.v[0].w, h = w >> 8;
    uint4 a;
    if constexpr (std::is_same<T, __half>::value) {
      // row g: 1024 + code, less 1024 + zero; row g + 8: 1024 + 16 code, divided by 16, less 64 + zero
      const __half2 low = as_half2(g.low), high = as_half2(g.high), sixteenth = as_half2(0x2c002c00u);
      a.x = as_bits(__hadd2(as_half2(digit<0x000f000f, 0x64006400>(w)), low));
      a.y = as_bits(__hfma2(as_half2(digit<0x00f000f0, 0x64006400>(w)), sixteenth, high));
      a.z = as_bits(__hadd2(as_half2(digit<0x000f000f, 0x64006400>(h)), low));
      a.w = as_bits(__hfma2(as_half2(digit<0x00f000f0, 0x64006400>(h)), sixteenth, high));
    } else {  // 128 + code, less 128 + zero
      const __nv_bfloat162 low = as_bfloat162(g.low), high = as_bfloat162(g.high);
      a.x = as_bits(__hadd2(as_bfloat162(digit<0x000f000f, 0x43004300>(w)), low));
      a.y = as_bits(__hadd2(as_bfloat162(digit<0x000f000f, 0x43004300>(w >> 4)), high));
      a.z = as_bits(__hadd2(as_bfloat162(digit<0x000f000f, 0x43004300>(h)), low));
      a.w = as_bits(__hadd2(as_bfloat162(digit<0x000f000f, 0x43004300>(h >> 4)), high));
    }
    return a;
  }
  // Of a group of columns, as the chunk has them, two rows each: at is 8 tile + g.
  template <class P> static __device__ __forceinline__ uint32_t stored_zeros(P chunk, int at, int group) {
    return load1(chunk + (kCodes4 + kScales + at * kGroups + group));
  }
  template <class P> static __device__ __forceinline__ uint32_t stored_scales(P chunk, int at, int group) {
    return load4(chunk + (kCodes4 + at * (4 * kGroups) + group * 4));
  }
  template <class P>
  static __device__ __forceinline__ Group group(P chunk, int tile, int block, int lane) {
    const int at = tile * 8 + lane / 4;
    Group g = excess(stored_zeros(chunk, at, block / kBlocks));
    const uint32_t scales = stored_scales(chunk, at, block / kBlocks);
    g.scale = __half22float2(as_half2(scales));
    return g;
  }

  template <int P> static __device__ __forceinline__ uint4 bytes(const Codes& c) {
    const uint32_t v = P ? c.v[0].z : c.v[0].x, w = P ? c.v[0].w : c.v[0].y;
    return make_uint4(v & 0x0f0f0f0f, v & 0xf0f0f0f0, w & 0x0f0f0f0f, w & 0xf0f0f0f0);
  }
  static __device__ __forceinline__ int2 zeros(Shared chunk, int tile, int group, int lane) {
    const uint32_t zero = stored_zeros(chunk, tile * 8 + lane / 4, group);
    return make_int2(zero & 15, zero & 0xf0);  // the latter kHigh times
  }
  static __device__ __forceinline__ float2 scales(Shared chunk, int tile, int group, int lane) {
    return __half22float2(as_half2(stored_scales(chunk, tile * 8 + lane / 4, group)));
  }
};

// fn(W()) with the W of a quantized format
template <class T, class Fn>
auto with_quantized(Format f, const Fn& fn) {
  switch (f) {
    case Format::q8_row: return fn(Weights8<T>());
    case Format::q4_g128: return fn(Weights4<T, 128>());
    case Format::q4_g64: return fn(Weights4<T, 64>());
    default: throw DeviceError(cat("CUDA: ", name_of(f), " is not a quantized format"));
  }
}

#endif  // __CUDACC__

}  // namespace codefuse::cuda
