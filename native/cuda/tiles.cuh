// How a 16-bit matrix [N, K] lies in device memory: chunks of 256 rows x 64 columns (32 KB, N and K padded with zeros), the
// chunks of one group of 256 rows one after the other. So a block streams contiguous memory, and one token's 64 activations
// go with a chunk. Inside a chunk, 16 row tiles of 16 rows; in a row tile, 4 steps of 16 columns, each the A operand of one
// mma.m16n8k16: lane 4 g + t holds 16 bytes: columns 2t, 2t + 1 of rows g and g + 8, columns 2t + 8, 2t + 9 of the same rows.
#pragma once
#include <cstddef>
#include <cstdint>

#ifndef CODEFUSE_HD
#ifdef __CUDACC__
#define CODEFUSE_HD __host__ __device__ __forceinline__
#else
#define CODEFUSE_HD inline
#endif
#endif

namespace codefuse::cuda {

constexpr int kGroupRows = 256;  // rows of a chunk
constexpr int kChunkCols = 64;   // columns of a chunk
constexpr int kChunkBytes = kGroupRows * kChunkCols * 2;
constexpr int kRowTileBytes = 16 * kChunkCols * 2;

CODEFUSE_HD int64_t groups_of(int64_t n) { return (n + kGroupRows - 1) / kGroupRows; }
CODEFUSE_HD int64_t steps_of(int64_t k) { return (k + kChunkCols - 1) / kChunkCols; }
CODEFUSE_HD size_t tile_bytes(int64_t n, int64_t k) { return size_t(groups_of(n)) * size_t(steps_of(k)) * kChunkBytes; }

// Element (row, col) of a matrix with `steps` chunks per group, in elements.
CODEFUSE_HD size_t tile_offset(int64_t row, int64_t col, int64_t steps) {
  int64_t chunk = (row / kGroupRows) * steps + col / kChunkCols;
  int r = int(row % kGroupRows), c = int(col % kChunkCols);
  int lane = (r % 8) * 4 + c % 8 / 2, step = c / 16, reg = (r % 16) / 8 + 2 * (c % 16 / 8);
  return size_t(chunk) * (kChunkBytes / 2) + (r / 16) * (kRowTileBytes / 2) + step * 256 + lane * 8 + reg * 2 + c % 2;
}

}  // namespace codefuse::cuda
