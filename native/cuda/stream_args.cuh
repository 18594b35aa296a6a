// What a launch of the streaming kernel (stream_matrix.cuh) goes through, and which chunks of it are a block's.
#pragma once
#include "cuda/kernels.h"
#include "cuda/tensor_map.h"
#include "cuda/weights.cuh"

namespace codefuse::cuda::stream {

// A consumer warp has kTiles row tiles of a chunk. Up to 8 rows of x each tile more saves reads of x; more rows want more warps to hide
// each other's latencies.
template <int NG> constexpr int kTiles = NG == 1 ? 2 : 1;
template <int NG> constexpr int kWarps = 16 / kTiles<NG>;
template <bool ONE> constexpr int kStages = ONE ? 8 : 6;  // of the ring at most
// How a kernel is compiled: with bulk copies the ring is filled by a warp of its own, else by cp.async.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif
// Three warps of 128 registers on a quarter of a multiprocessor, as many as so many threads would have, leave room for one of attention.
constexpr int kFewRegisters = 512;
constexpr int kXTile = 8 * 128;   // bytes of 8 rows x 64 columns of x
constexpr int kPart = kDecodeRows * kGroupRows;  // floats of a block's part of a group

struct Source {
  const uint8_t* w;    // chunks
  int steps;           // chunks of a row group
  int K;
  const float* scale;  // [N] or nullptr
  const uint8_t* x;    // [T, K] 16-bit
};

// x / d for x < 2^31 by a multiplication (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t d = 1, multiplier = 0, shift = 0;
  Divider() = default;
  explicit Divider(uint32_t divisor) : d(divisor) {
    while (shift < 31 && (uint64_t(2) << shift) < d) ++shift;
    multiplier = uint32_t(((uint64_t(1) << (32 + shift)) + d - 1) / d);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ uint32_t operator()(uint32_t x) const { return d == 1 ? x : __umulhi(x, multiplier) >> shift; }
#endif
};

struct Output {
  int N, groups;
  Epilogue epilogue;
};

// First what the producer asks for: a launch finds its parameters in no cache.
struct Args {
  uint32_t chunks[2];   // of the outputs
  Divider by_blocks;
  int steps[2];         // chunks of a row group of the outputs
  Divider by_steps[2];
  int in_turn;          // every block has a share of both outputs
  int join;             // step of a group of output 0 from which on it is source 1's
  int stages;
  int T;
  Source source[2];
  const uint8_t* integers;  // codes: x as prepare_rows() leaves it, source 1's chunks after source 0's; or nullptr
  float* partial;       // [2, blocks, kPart], by output
  int32_t* ready;       // nullptr, or where a warp adds 1 for the rows of output 0 it has stored
  Output output[2];
  CUtensorMap map[2];   // of x, boxes of 64 columns and 8 NG rows; of one row, of a chunk's columns
};

// The first chunk of a block's share of an output; the shares of both together are equal to one chunk.
__device__ __forceinline__ uint32_t share_begin(const Args& a, int output, uint32_t block) {
  const uint32_t both = a.by_blocks((a.chunks[0] + a.chunks[1]) * block);
  const uint32_t first = a.in_turn ? a.by_blocks(a.chunks[0] * block) : min(both, a.chunks[0]);
  return output == 0 ? first : both - first;
}
// Blocks after this one that have chunks of the group which its share of an output ends in.
__device__ __forceinline__ int blocks_after(const Args& a, int output) {
  const uint32_t end = share_begin(a, output, blockIdx.x + 1);
  if (end == 0) return 0;
  const uint32_t group_end = (a.by_steps[output](end - 1) + 1) * uint32_t(a.steps[output]);
  int n = 0;
  while (share_begin(a, output, blockIdx.x + 1 + n) < group_end) ++n;
  return n;
}

// Where a block leaves its part of a group [token][row of the group].
__device__ __forceinline__ float* part_of(const Args& a, int output, uint32_t block) { return a.partial + (size_t(output) * gridDim.x + block) * kPart; }

// A place in the order of a block's chunks.
struct Cursor {
  int output, group, step;
  uint32_t left;  // chunks of the block's share of the output from here on
  __device__ __forceinline__ explicit Cursor(const Args& a) {
    enter(a, 0);
    if (left == 0) enter(a, 1);
  }
  __device__ __forceinline__ void enter(const Args& a, int o) {
    const uint32_t begin = share_begin(a, o, blockIdx.x);
    output = o;
    left = share_begin(a, o, blockIdx.x + 1) - begin;
    group = left ? int(a.by_steps[o](begin)) : 0;
    step = left ? int(begin) - group * a.steps[o] : 0;
  }
  // n chunks on, no further than the first of the next group
  __device__ __forceinline__ void skip(const Args& a, int n) {
    left -= n;
    if (left == 0 && output == 0) return enter(a, 1);
    step += n;
    if (step == a.steps[output]) step = 0, ++group;
  }
  __device__ __forceinline__ int source(const Args& a) const { return output | (step >= a.join); }
  // of the chunks of both sources
  __device__ __forceinline__ int chunk_of_x(const Args& a) const { return (source(a) ? a.source[0].steps : 0) + column(a); }
  __device__ __forceinline__ int column(const Args& a) const { return step >= a.join ? step - a.join : step; }  // in chunks
};

}  // namespace codefuse::cuda::stream
