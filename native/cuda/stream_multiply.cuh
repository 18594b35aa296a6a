// The products of the streaming kernel (stream_matrix.cuh): a chunk's weights by the rows of x. 16-bit weights as they are; of quantized ones
// the codes, by the integers that x has become (stream_x.cuh): their sums over a group of columns are exact, are scaled in float32 and added
// in order.
#pragma once
#include "cuda/stream_x.cuh"

namespace codefuse::cuda::stream {

// Whether a warp turns x to integers; else prepare_rows() has done so.
template <class W, bool ONE> constexpr bool kTurnsX = kCodes<W> && ONE && kBulkCopies;
// Of a chunk in the ring; with bulk copies a single row is no more than that, and is every row of the operand.
template <class W, int NG, bool ONE>
CODEFUSE_HD constexpr int x_bytes(bool bulk_copy) { return W::kCols * 2 * (ONE && bulk_copy ? 1 : NG * 8); }

// Where a lane reads in the ring's first stage.
struct Lane {
  Shared weights;        // of the warp's first row tile
  Shared x;              // 16 bits: the first 32 columns of 8 rows; codes: its operands
  Shared x_high;         // 16 bits: the other 32 columns
  Shared scales, zeros;  // codes, of the warp's first row tile
  Shared terms;          // codes: what goes with x
};
// A value that has come through a shuffle; else ptxas computes it anew for every chunk.
__device__ __forceinline__ Shared kept(Shared p, int offset) { return {__shfl_sync(~0u, p.at + uint32_t(offset), int(threadIdx.x % 32))}; }
template <class W, int NG, bool ONE>
__device__ __forceinline__ Lane lane_of(Shared ring, Shared xs, Shared terms) {
  const int tile = threadIdx.x / 32 * kTiles<NG>, lane = threadIdx.x % 32, r = lane % 8;
  Lane at{};
  at.weights = kept(ring, tile * W::kTile + lane * 16);
  if constexpr (kCodes<W>) {
    at.x = kept(xs, (kTurnsX<W, ONE> ? lane % 8 : lane) * 16);  // of one row, whose columns 2 to 7 of B nobody asks for
    at.terms = kept(terms, lane % 4 * kRowTerms<W::kGroupCols>);
  } else {
    constexpr bool kAlone = ONE && kBulkCopies;
    at.x = kept(xs, (kAlone ? 0 : r * 128) + ((lane / 8) ^ (kAlone ? 0 : r)) * 16);
    at.x_high = kept(xs, (kAlone ? 0 : r * 128) + ((lane / 8 + 4) ^ (kAlone ? 0 : r)) * 16);
  }
  if constexpr (W::kScale == Scale::block) {
    at.scales = kept(ring, (tile * 8 + lane / 4) * (4 * W::kGroups));
    at.zeros = kept(ring, (tile * 8 + lane / 4) * W::kGroups);
  }
  return at;
}

// One chunk of 16-bit weights: a warp's row tiles x NG groups of 8 rows of x.
template <class W, int NG, bool ONE>
__device__ __forceinline__ void multiply_values(float (&acc)[kTiles<NG>][NG][4], const Lane& at, int stage) {
  using T = typename W::Type;
  static_assert(W::kCols == 64, "one block of columns");
  uint4 f[kTiles<NG>][4];
#pragma unroll
  for (int i = 0; i < kTiles<NG>; ++i) fragments<W>(f[i], W::codes(at.weights + stage * W::kBytes, i, 0, 0), {});
  constexpr int kBeside = NG == 1 ? 1 : 2;  // groups of 8 rows that hide each other's latencies
#pragma unroll
  for (int j = 0; j < NG; j += kBeside) {
    uint32_t x[kBeside][8];  // of 16 columns two
#pragma unroll
    for (int k = 0; k < kBeside; ++k) {
      const int of = stage * x_bytes<W, NG, ONE>(kBulkCopies) + (j + k) * kXTile;
      ldmatrix4(reinterpret_cast<uint32_t(&)[4]>(x[k][0]), at.x.at + of);
      ldmatrix4(reinterpret_cast<uint32_t(&)[4]>(x[k][4]), at.x_high.at + of);
    }
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int k = 0; k < kBeside; ++k)
#pragma unroll
        for (int i = 0; i < kTiles<NG>; ++i) mma16816<T>(acc[i][j + k], f[i][s].x, f[i][s].y, f[i][s].z, f[i][s].w, x[k][2 * s], x[k][2 * s + 1]);
  }
}

// One chunk of codes likewise. ONE: by a single row of x. row_scale: of Scale::row
template <class W, int NG, bool ONE>
__device__ __forceinline__ void multiply_codes(float (&acc)[kTiles<NG>][NG][4], const Lane& at, int stage, const float (&row_scale)[kTiles<NG>][2]) {
  static_assert(W::kCols == 128, "two blocks of columns");
  constexpr int kBlocks = W::kGroupCols / 64, kChunkTerms = kTerms<W::kGroupCols>;
  const Shared weights = at.weights + stage * W::kBytes, x = at.x + stage * x_bytes<W, NG, ONE>(kBulkCopies), terms = at.terms + stage * (NG * kChunkTerms);
#pragma unroll
  for (int group = 0; group < W::kCols / W::kGroupCols; ++group) {
    float scale[kTiles<NG>][2];
    int2 zero[kTiles<NG>];
#pragma unroll
    for (int i = 0; i < kTiles<NG>; ++i) {
      if constexpr (W::kScale == Scale::block) {
        const float2 s = W::scales(at.scales + stage * W::kBytes, i, group, 0);
        scale[i][0] = s.x, scale[i][1] = s.y * (1.f / W::kHigh);
      } else {
        scale[i][0] = row_scale[i][0], scale[i][1] = row_scale[i][1];
      }
      zero[i] = W::zeros(at.zeros + stage * W::kBytes, i, group, 0);
    }
    uint4 a[kTiles<NG>][kBlocks][2];
#pragma unroll
    for (int i = 0; i < kTiles<NG>; ++i)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const typename W::Codes codes = W::codes(weights, i, group * kBlocks + b, 0);
        a[i][b][0] = W::template bytes<0>(codes), a[i][b][1] = W::template bytes<1>(codes);
      }
    constexpr int kBeside = ONE || NG > 2 ? 1 : 2;  // more at a time do not fit the registers
    const auto rows = [&](int j, int first) {  // of 8 rows of x the even (0) or odd (1) ones, or both beside each other
      int z[kBeside][kTiles<NG>][4] = {};
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint4 v[kBeside];
#pragma unroll
        for (int k = 0; k < kBeside; ++k) v[k] = load16(x + (((first + k) * NG + j) * kXTile + (group * kBlocks + b) * (kTurnsX<W, ONE> ? kSingleRow : kFourRows)));
#pragma unroll
        for (int p = 0; p < 2; ++p)
#pragma unroll
          for (int k = 0; k < kBeside; ++k)
#pragma unroll
            for (int i = 0; i < kTiles<NG>; ++i) mma16832(z[k][i], a[i][b][p], p ? v[k].z : v[k].x, p ? v[k].w : v[k].y);
      }
#pragma unroll
      for (int k = 0; k < kBeside; ++k) {
        const int odd = first + k;
        const Shared of = terms + (j * kChunkTerms + odd * (kChunkTerms / 2));
        const uint2 of_x = load8(of);
        const int sum = W::kGroupCols == 128 || group == 0 ? int(of_x.y) : int(load4(of + 8));
        const float x_scale = __uint_as_float(of_x.x);
#pragma unroll
        for (int i = 0; i < kTiles<NG>; ++i) {
          const int low = z[k][i][0] * 256 + z[k][i][1] - zero[i].x * sum, high = z[k][i][2] * 256 + z[k][i][3] - zero[i].y * sum;
          acc[i][j][odd] = fmaf(scale[i][0] * x_scale, float(low), acc[i][j][odd]);
          acc[i][j][2 + odd] = fmaf(scale[i][1] * x_scale, float(high), acc[i][j][2 + odd]);
        }
      }
    };
#pragma unroll
    for (int j = 0; j < NG; ++j)
#pragma unroll
      for (int first = 0; first < (ONE ? 1 : 2); first += kBeside) rows(j, first);
  }
}

}  // namespace codefuse::cuda::stream
