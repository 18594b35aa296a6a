// Rows of x as the streaming kernel multiplies them by codes: integers. Of each row 128 columns (a chunk's) have a power of two in common,
// x = scale (256 high + low), high and low signed bytes, |256 high + low| <= 32639: float16 is exact where it is no smaller than an eighth
// of the largest of the 128, and nothing is off by more than 2^-15 of the largest. (The largest is at most 11.4 times the root mean square, so
// the loss is below that of rounding the row to float16 in the first place.) Sums of products by codes are exact, so they are the same
// for any number of rows.
//
// Of 8 rows they are two parts of kXTile bytes, rows 0, 2, 4, 6 of all 128 columns and rows 1, 3, 5, 7, as B operands of mma16832: column 2 i has
// the high bytes of the i-th of these rows, column 2 i + 1 its low bytes; [64 columns][lane][32 columns][b0, b1], so 16 bytes are what a
// lane needs of 64 columns. Byte i of a word of lane 4 g + t is column 2t + (0, 8, 1, 9)[i] of 16 (weights.cuh, bytes()). A single row takes
// the place of its x in shared memory, as columns 0 and 1 of the first part.
#pragma once
#include "cuda/stream_args.cuh"

namespace codefuse::cuda::stream {

template <class W> constexpr bool kCodes = W::kScale != Scale::none;

// What goes with 128 columns of a row: the float scale (not a number if the row is not finite), then the sum of the integers of each group of
// columns; bytes of a row, and of 8: [row % 2][row / 2].
template <int GROUP_COLS> constexpr int kRowTerms = GROUP_COLS == 128 ? 8 : 16;
template <int GROUP_COLS> constexpr int kTerms = 8 * kRowTerms<GROUP_COLS>;
// of a chunk and 8 rows
template <class W>
CODEFUSE_HD constexpr int terms_bytes() {
  if constexpr (kCodes<W>) return kTerms<W::kGroupCols>;
  return 0;
}

// Of a row's 128 columns, by a warp.
struct Integers {
  uint32_t high, low;  // a lane's words
  float scale;
  int sums[2];
};
// a, b: columns 2t, 2t + 1 and 2t + 8, 2t + 9 of 16 from column 16 (lane / 4) on, t = lane % 4
template <class T, int GROUP_COLS>
__device__ __forceinline__ Integers to_integers(uint32_t a, uint32_t b) {
  static_assert(GROUP_COLS == 64 || GROUP_COLS == 128, "sums of a chunk's columns");
  constexpr bool kHalf = std::is_same<T, __half>::value;
  const uint32_t both = __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu);
  const uint32_t most = __reduce_max_sync(~0u, max(both & 0xffff, both >> 16));  // bits of the largest
  const float largest = kHalf ? __half2float(__ushort_as_half(uint16_t(most))) : __uint_as_float(most << 16);
  uint32_t exponent = max(__float_as_uint(largest) >> 23, 32u);  // plus 127
  if (largest * __uint_as_float((268 - exponent) << 23) > 32639.f) ++exponent;
  const float up = __uint_as_float((268 - exponent) << 23);  // 2^14 for what begins at 1
  const float2 x = unpack2<T>(a), y = unpack2<T>(b);
  constexpr float kRound = 12582912.f;  // 1.5 2^23: the sum's low bits are the nearest integer
  const uint32_t q[4] = {__float_as_uint(fmaf(x.x, up, kRound)), __float_as_uint(fmaf(y.x, up, kRound)), __float_as_uint(fmaf(x.y, up, kRound)),
                         __float_as_uint(fmaf(y.y, up, kRound))};
  Integers out;
  out.low = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
  out.high = __byte_perm(__byte_perm(q[0] + 128, q[1] + 128, 0x0051), __byte_perm(q[2] + 128, q[3] + 128, 0x0051), 0x5410);
  out.scale = __uint_as_float(most < (kHalf ? 0x7c00u : 0x7f80u) ? (exponent - 14) << 23 : 0x7fffffffu);
  const int sum = __dp4a(int(out.high), 0x01010101, 0) * 256 + __dp4a(int(out.low), 0x01010101, 0);
  const bool first = GROUP_COLS == 128 || threadIdx.x % 32 < 16;
  out.sums[0] = __reduce_add_sync(~0u, first ? sum : 0);
  out.sums[1] = GROUP_COLS == 128 ? 0 : __reduce_add_sync(~0u, first ? 0 : sum);
  return out;
}
// Bytes of 64 columns of the operand of four rows, and of what a single row has of it.
constexpr int kFourRows = 512, kSingleRow = kFourRows / 4;
// Where a lane's word of high bytes lies in its 8 rows' share of their half of a chunk (rows of the same parity), its low bytes kLowBytes on.
__device__ __forceinline__ int word_of(int row) {
  const int lane = threadIdx.x % 32, s = lane / 4, t = lane % 4;
  return s / 4 * kFourRows + s % 4 * 4 + (row % 8 / 2 * 8 + t) * 16;
}
constexpr int kLowBytes = 64;

// A chunk's only row, in place.
template <class T, int GROUP_COLS>
__device__ __forceinline__ void row_to_integers(Shared x, Shared terms) {
  const int lane = threadIdx.x % 32, s = lane / 4, t = lane % 4;
  const Shared from = x + (s * 32 + t * 4);
  const uint32_t a = load4(from), b = load4(from + 16);
  const Integers v = to_integers<T, GROUP_COLS>(a, b);
  __syncwarp();  // all lanes have read
  const Shared to = x + (s / 4 * kSingleRow + s % 4 * 4 + t * 16);
  store4(to, v.high), store4(to + kLowBytes, v.low);
  if (lane == 0) store8(terms, __float_as_uint(v.scale), uint32_t(v.sums[0]));
  if (GROUP_COLS == 64 && lane == 0) store4(terms + 8, uint32_t(v.sums[1]));
}

// A chunk's integers in device memory as in the ring: [2][groups of 8 rows][kXTile], then [groups of 8 rows] terms.
CODEFUSE_HD constexpr int chunk_integers(int groups, int terms) { return groups * (2 * kXTile + terms); }

// Rows x [T, K] of up to two sources to integers, a warp a row. grid: (chunks of both, groups of 8 rows)
template <class T, int GROUP_COLS>
__global__ void __launch_bounds__(256) prepare_rows(const uint8_t* xa, int Ka, const uint8_t* xb, int Kb, int rows, uint8_t* to) {
  launch_dependents();
  const int chunks = (Ka + 127) / 128, row = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool second = int(blockIdx.x) >= chunks;
  const int K = second ? Kb : Ka, column = (int(blockIdx.x) - (second ? chunks : 0)) * 128 + lane / 4 * 16 + lane % 4 * 2;
  grid_wait();
  if (row >= rows) return;
  const uint8_t* const x = (second ? xb : xa) + (size_t(row) * K + column) * 2;
  const uint32_t a = column < K ? load_fresh(reinterpret_cast<const uint32_t*>(x)) : 0, b = column + 8 < K ? load_fresh(reinterpret_cast<const uint32_t*>(x + 16)) : 0;
  const Integers v = to_integers<T, GROUP_COLS>(a, b);
  uint8_t* const chunk = to + size_t(blockIdx.x) * chunk_integers(gridDim.y, kTerms<GROUP_COLS>);
  uint8_t* const word = chunk + (row % 2 * int(gridDim.y) + blockIdx.y) * kXTile + word_of(row);
  *reinterpret_cast<uint32_t*>(word) = v.high, *reinterpret_cast<uint32_t*>(word + kLowBytes) = v.low;
  uint8_t* const terms = chunk + gridDim.y * (2 * kXTile) + blockIdx.y * kTerms<GROUP_COLS> + (row % 2 * 4 + row % 8 / 2) * kRowTerms<GROUP_COLS>;
  if (lane == 0) *reinterpret_cast<float2*>(terms) = make_float2(v.scale, __int_as_float(v.sums[0]));
  if (GROUP_COLS == 64 && lane == 0) *reinterpret_cast<int*>(terms + 8) = v.sums[1];
}

}  // namespace codefuse::cuda::stream
