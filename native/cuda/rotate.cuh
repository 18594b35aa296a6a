// The rotation of a pair, rounded the same wherever it is done.
#pragma once
#include "cuda/device.cuh"

namespace codefuse::cuda {

// r: cosine, sine
__device__ __forceinline__ float rotate_first(float u, float v, float2 r) { return __fmaf_rn(u, r.x, -__fmul_rn(v, r.y)); }
__device__ __forceinline__ float rotate_second(float u, float v, float2 r) { return __fmaf_rn(v, r.x, __fmul_rn(u, r.y)); }

// Rotates ROWS rows of a head, D columns, in shared memory, [D / 64][ROWS][64 columns] with the 128-byte swizzle (tensor_map.h), by a warpgroup. What
// it needs of the angles [.][pairs] is read ahead. pairs: a multiple of 8; column i goes with i + pairs.
template <class T, int D, int ROWS>
struct TileRotation {
  static constexpr int kUnits = ROWS * (D / 2 / 8) / 128;  // pairs of 16 bytes of a thread, at most
  float4 angle[kUnits][4];

  // rows of positions `position` on; those behind `last` do not matter
  __device__ __forceinline__ void read(const float2* angles, int pairs, int position, int last) {
    const int units = pairs / 8;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int u = i * 128 + threadIdx.x % 128, r = u / units;
      if (u >= ROWS * units) continue;
      const float4* from = reinterpret_cast<const float4*>(angles + int64_t(min(position + r, last)) * pairs + u % units * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) angle[i][e] = __ldg(from + e);
    }
  }
  __device__ __forceinline__ void rotate(uint8_t* tile, int pairs) const {
    const int units = pairs / 8;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int u = i * 128 + threadIdx.x % 128, r = u / units, first = u % units, second = first + units;
      if (u >= ROWS * units) continue;
      const auto place = [&](int unit) { return reinterpret_cast<uint4*>(tile + unit / 8 * (ROWS * 128) + r * 128 + (unit % 8 ^ r % 8) * 16); };
      uint4 x = *place(first), y = *place(second);
      uint32_t* const xs[4] = {&x.x, &x.y, &x.z, &x.w};
      uint32_t* const ys[4] = {&y.x, &y.y, &y.z, &y.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 s = unpack2<T>(*xs[e]), t = unpack2<T>(*ys[e]);
        const float2 r0 = make_float2(angle[i][e].x, angle[i][e].y), r1 = make_float2(angle[i][e].z, angle[i][e].w);
        *xs[e] = pack2<T>(rotate_first(s.x, t.x, r0), rotate_first(s.y, t.y, r1));
        *ys[e] = pack2<T>(rotate_second(s.x, t.x, r0), rotate_second(s.y, t.y, r1));
      }
      *place(first) = x;
      *place(second) = y;
    }
  }
};

}  // namespace codefuse::cuda
