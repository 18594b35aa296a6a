// The kernel under the linear layers of decode rows: as fast as the weights can be read. One block per multiprocessor streams
// its equal share of the chunks (tiles.cuh) through a ring in shared memory, with each chunk the rows' activations. The weights
// are the A operand of the tensor cores and the rows its columns, 8 at a time, so one row costs what eight do, and an output's
// order of summation is the same for 1 row and for 64: along K inside a share, then share by share in order.
// On Hopper the ring is filled with weights before the kernel waits for its predecessor.
//
// One launch has one or two outputs (each a matrix of its own, after one another in the chunks' order) or one output whose K
// comes from two sources (x and matrix each). W (weights.cuh) says how weights lie in a chunk and become fragments.
#pragma once
#include <climits>

#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/tensor_map.h"
#include "cuda/weights.cuh"

namespace codefuse::cuda::stream {

constexpr int kWarps = 8;         // consumers, 32 rows of a chunk each
constexpr int kStages = 6;        // of the ring at most
constexpr int kXTile = 8 * 128;   // bytes of 8 rows x 64 columns of x
constexpr int kPart = kDecodeRows * kGroupRows;  // floats of a block's part of a group
// Weights give way in L2 to what is used again.
constexpr bool kWeightsOnce = true;
// What the end of a group needs is read at its beginning (bias and, of up to kStashRows rows, what is added to), so that no block's end
// waits for memory behind the weights that the next launch asks for.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kStash = true;
#else
constexpr bool kStash = false;  // cp.async is the ring's
#endif
constexpr int kStashRows = 8;
template <int NG> constexpr int kStashFloats = (2 + (NG == 1 ? kStashRows : 0)) * kGroupRows;
constexpr int kPartsAhead = 4;  // chunks before its end a block has the others' parts brought to L2; 0: never
constexpr uint32_t kAbsent = 0xffffffffu;  // in place of a part that has not come yet; SplitScratch is full of it between launches

struct Source {
  CUtensorMap map;     // of x, boxes of 8 NG rows
  const uint8_t* x;    // [T, K] 16-bit
  const uint8_t* w;    // chunks
  const float* scale;  // [N] or nullptr
  int steps;           // chunks of a row group
  int K;
};
struct Output {
  int N, groups, steps;
  Epilogue epilogue;
};
struct Args {
  Source source[2];
  Output output[2];
  int T;
  int stages;
  uint32_t chunks;
  uint32_t split;  // chunks of output 0
  int join;        // step of a group of output 0 from which on it is source 1's
  float* partial;  // [blocks, kPart]
};

// Bytes of the ring's chunks; x after them begins at a multiple of 1024, as its swizzle needs.
template <class W>
CODEFUSE_HD int ring_bytes(int stages) { return (stages * W::kBytes + 1023) / 1024 * 1024; }

__device__ __forceinline__ uint32_t share_begin(const Args& a, uint32_t block) { return uint32_t(uint64_t(a.chunks) * block / gridDim.x); }
// the block whose share has chunk c
__device__ __forceinline__ int owner(const Args& a, uint32_t c) { return int(((c + 1) * gridDim.x - 1) / a.chunks); }

// A place in the order of chunks.
struct Cursor {
  int output, group, step;
  __device__ __forceinline__ Cursor(const Args& a, uint32_t c) {
    output = c >= a.split;
    if (output) c -= a.split;
    group = int(c) / a.output[output].steps;
    step = int(c) - group * a.output[output].steps;
  }
  __device__ __forceinline__ void next(const Args& a) {
    if (++step < a.output[output].steps) return;
    step = 0;
    if (++group == a.output[output].groups) group = 0, output = 1;
  }
  __device__ __forceinline__ int source(const Args& a) const { return output | (step >= a.join); }
  __device__ __forceinline__ int column(const Args& a) const { return step >= a.join ? step - a.join : step; }  // in chunks
};

__device__ __forceinline__ float4 load_part(const float4* p) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_part(float4* p, float x, float y, float z, float w) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
__device__ __forceinline__ float present(float v) { return __float_as_uint(v) == kAbsent ? __uint_as_float(0x7fffffffu) : v; }
__device__ __forceinline__ bool absent(const float4& v) {
  return __float_as_uint(v.x) == kAbsent || __float_as_uint(v.y) == kAbsent || __float_as_uint(v.z) == kAbsent || __float_as_uint(v.w) == kAbsent;
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// At the beginning of a group, whose first block ends it: bias, bias_b, rows of y to stash [.][kGroupRows]. A warp
// has its 32 rows of them for itself.
__device__ __forceinline__ void begin_group(const Args& a, float* stash, const Cursor& at) {
  const Output& out = a.output[at.output];
  const Epilogue& e = out.epilogue;
  const int row = at.group * kGroupRows + int(threadIdx.x);
  if (row < out.N) {
    if (e.bias) copy4(stash + threadIdx.x, e.bias + row);
    if (e.bias_b) copy4(stash + kGroupRows + threadIdx.x, e.bias_b + row);
    if (e.store == Store::add && a.T <= kStashRows)
      for (int t = 0; t < a.T; ++t) copy4(stash + (2 + t) * kGroupRows + threadIdx.x, static_cast<const float*>(e.y) + int64_t(t) * out.N + row);
  }
  if (e.store == Store::add && a.T > kStashRows && row / 32 * 32 < out.N)
    for (int t = threadIdx.x % 32; t < a.T; t += 32) prefetch_l2(static_cast<const float*>(e.y) + int64_t(t) * out.N + row / 32 * 32);
}

// store_output() with what begin_group() has left for row `local` of the group
template <class T, int NG>
__device__ __forceinline__ void store_stashed(const Epilogue& e, const float* stash, float z, int t, int n, int N, int local) {
  if (e.bias) z += stash[local];
  if (e.bias_b) z += stash[kGroupRows + local];
  const int64_t i = int64_t(t) * N + n;
  if (e.store == Store::add)
    static_cast<float*>(e.y)[i] = (NG == 1 ? stash[(2 + t) * kGroupRows + local] : static_cast<float*>(e.y)[i]) + z;
  else if (e.store == Store::f32)
    static_cast<float*>(e.y)[i] = z;
  else
    static_cast<T*>(e.y)[i] = from_float<T>(activate(z, e.activation));
}

// Sums of a row group over this block's columns are in acc. The first of the blocks that share the group adds the others' sums,
// in their order, as they arrive: every word of a part says by itself whether it is there. All blocks of a launch are resident
// at once (one per multiprocessor, and a launch starts when all blocks of its predecessor have), so waiting for them is safe.
// kWide: registers allow for more of them at once
template <class T, int NG, bool kWide>
__device__ __forceinline__ void finish(const Args& a, float (&acc)[2][NG][4], const Cursor& at, bool whole, const float* stash) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Output& out = a.output[at.output];
  const int row0 = at.group * kGroupRows + warp * 32 + g;
  bool mine = true;
  if (!whole) {
    const uint32_t first_chunk = (at.output ? a.split : 0) + uint32_t(at.group) * out.steps;
    const int first = owner(a, first_chunk), parts = owner(a, first_chunk + out.steps - 1) - first;  // parts: of others
    float4* const slot = reinterpret_cast<float4*>(a.partial) + threadIdx.x;  // [block][2 j + i][thread]
    mine = first == int(blockIdx.x);
    if (!mine) {
#pragma unroll
      for (int j = 0; j < NG; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (j * 8 + 2 * t < a.T)
            store_part(slot + size_t(blockIdx.x) * (kPart / 4) + (2 * j + i) * 256, present(acc[i][j][0]), present(acc[i][j][1]), present(acc[i][j][2]),
                       present(acc[i][j][3]));
    } else {
      if (!kStash && out.epilogue.store == Store::add) {  // what the sums are added to is on its way meanwhile
#pragma unroll
        for (int j = 0; j < NG; ++j)
#pragma unroll
          for (int q = 0; q < 8; ++q) {
            const int row = row0 + q / 2 * 8, token = j * 8 + 2 * t + q % 2;
            if (token < a.T && row < out.N)
              asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const float*>(out.epilogue.y) + int64_t(token) * out.N + row));
          }
      }
      constexpr int kBatch = kWide ? 7 : NG <= 4 ? 4 : 2;  // parts asked for at once
#pragma unroll
      for (int j = 0; j < NG; ++j) {
        if (j * 8 + 2 * t >= a.T) continue;
        for (int p = 1; p <= parts; p += kBatch) {
          float4* const from = slot + size_t(first + p) * (kPart / 4) + 2 * j * 256;
          float4 v[kBatch][2];
#pragma unroll
          for (int k = 0; k < kBatch; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (p + k <= parts) v[k][i] = load_part(from + k * (kPart / 4) + i * 256);
#pragma unroll
          for (int k = 0; k < kBatch; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (p + k <= parts) {
                float4* const at_part = from + k * (kPart / 4) + i * 256;
                while (absent(v[k][i])) v[k][i] = load_part(at_part);
                const float none = __uint_as_float(kAbsent);
                store_part(at_part, none, none, none, none);
                acc[i][j][0] += v[k][i].x, acc[i][j][1] += v[k][i].y, acc[i][j][2] += v[k][i].z, acc[i][j][3] += v[k][i].w;
              }
        }
      }
    }
  }
  if constexpr (kStash) {
    copy_wait_all();
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < NG; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int row = row0 + i * 16 + q / 2 * 8, token = j * 8 + 2 * t + q % 2;
        if (mine && token < a.T && row < out.N) {
          if constexpr (kStash)
            store_stashed<T, NG>(out.epilogue, stash, acc[i][j][q], token, row, out.N, row % kGroupRows);
          else
            store_output<T>(out.epilogue, acc[i][j][q], token, row, out.N);
        }
        acc[i][j][q] = 0.f;
      }
  if constexpr (kStash) __syncwarp();
}

// One chunk: 8 warps x (2 row tiles) x NG groups of 8 rows of x.
template <class W, int NG>
__device__ __forceinline__ void multiply(float (&acc)[2][NG][4], const uint8_t* w, const uint8_t* x, const float (&row_scale)[2][2]) {
  using T = typename W::Type;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane % 8;
  const uint8_t* const lo = x + r * 128 + ((lane / 8) ^ r) * 16;      // columns 0 .. 31 of 8 rows of x
  const uint8_t* const hi = x + r * 128 + ((lane / 8 + 4) ^ r) * 16;  // columns 32 .. 63
#pragma unroll 1  // more at a time do not fit the registers
  for (int block = 0; block < W::kCols / 64; ++block) {
    uint4 f[2][4];
    float scale[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      W::fragments(f[i], w, warp * 2 + i, block, lane);
      if constexpr (W::kScale == Scale::block) {
        const float2 two = W::block_scale(w, warp * 2 + i, block, lane);
        scale[i][0] = two.x, scale[i][1] = two.y;
      } else {
        scale[i][0] = row_scale[i][0], scale[i][1] = row_scale[i][1];
      }
    }
#pragma unroll
    for (int j = 0; j < NG; ++j) {
      uint32_t b0[4], b1[4];
      ldmatrix4(b0, lo + (block * NG + j) * kXTile);
      ldmatrix4(b1, hi + (block * NG + j) * kXTile);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float z[4] = {};
        float(&sum)[4] = W::kScale == Scale::none ? acc[i][j] : z;
#pragma unroll
        for (int s = 0; s < 4; ++s)
          mma16816<T>(sum, f[i][s].x, f[i][s].y, f[i][s].z, f[i][s].w, s < 2 ? b0[2 * s] : b1[2 * s - 4], s < 2 ? b0[2 * s + 1] : b1[2 * s - 3]);
        if constexpr (W::kScale != Scale::none)
#pragma unroll
          for (int q = 0; q < 4; ++q) acc[i][j][q] = fmaf(scale[i][q / 2], z[q], acc[i][j][q]);
      }
    }
  }
}

template <class W, int NG>
__global__ void __launch_bounds__(kWarps * 32 + 32, NG == 1 ? 2 : 1) stream_matrix(const __grid_constant__ Args a) {
  using T = typename W::Type;
  constexpr int kXBytes = W::kCols / 64 * NG * kXTile;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float stash[kStash ? kStashFloats<NG> : 1];
  uint8_t* const ring = shared + (1024 - shared_address(shared) % 1024) % 1024;  // [stages] chunks, then [stages] x
  uint8_t* const xs = ring + ring_bytes<W>(a.stages);
  const uint32_t begin = share_begin(a, blockIdx.x), end = share_begin(a, blockIdx.x + 1);
  launch_dependents();
  int stage = 0;
  Cursor at(a, begin);
  int first_step = at.step;
  float acc[2][NG][4] = {}, row_scale[2][2] = {};
  const auto load_scales = [&](bool first) {
    if constexpr (W::kScale == Scale::row) {
      if (!first && at.step != 0 && at.step != a.join) return;
      const float* scale = a.source[at.source(a)].scale;
      for (int i = 0; i < 4; ++i) {
        const int row = at.group * kGroupRows + int(threadIdx.x) / 32 * 32 + i / 2 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8;
        row_scale[i / 2][i % 2] = row < a.output[at.output].N ? scale[row] : 0.f;
      }
    }
  };
  const auto close = [&](bool last) {
    const bool ends = at.step == a.output[at.output].steps - 1;
    if (ends || last) {
      finish<T, NG, NG == 1 && kStash && W::kScale == Scale::none>(a, acc, at, first_step == 0 && ends, stash);
      first_step = 0;
    }
    at.next(a);
  };

  // c: of the last chunks of this block. What the others have added to the group it ends with, if that began here.
  [[maybe_unused]] const auto prefetch_parts = [&](uint32_t c) {
    const uint32_t group_begin = c - uint32_t(at.step), group_end = group_begin + uint32_t(a.output[at.output].steps);
    if (group_begin < begin || group_end <= end) return;
    const int parts = owner(a, group_end - 1) - int(blockIdx.x), t = threadIdx.x % 4;
    for (int p = 1; p <= parts; ++p)
      for (int j = 0; j < NG && j * 8 + 2 * t < a.T; ++j)
        for (int i = 0; i < 2; ++i)
          prefetch_l2(reinterpret_cast<float4*>(a.partial) + size_t(blockIdx.x + p) * (kPart / 4) + (2 * j + i) * 256 + threadIdx.x);
  };

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int s = 0; s < a.stages; ++s) barrier_init(&full[s], 1), barrier_init(&empty[s], kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kWarps * 32) {  // the producer is one thread
    if (threadIdx.x > kWarps * 32) return grid_wait();
    const auto fetch_weights = [&](const Cursor& c, int s) {
      const Source& from = a.source[c.source(a)];
      barrier_expect(&full[s], W::kBytes + kXBytes);
      const uint8_t* const chunk = from.w + (size_t(c.group) * from.steps + c.column(a)) * W::kBytes;
      kWeightsOnce ? bulk_copy_once(ring + s * W::kBytes, chunk, W::kBytes, &full[s]) : bulk_copy(ring + s * W::kBytes, chunk, W::kBytes, &full[s]);
    };
    const auto fetch_x = [&](const Cursor& c, int s) {
      const CUtensorMap* map = &a.source[c.source(a)].map;
#pragma unroll
      for (int b = 0; b < W::kCols / 64; ++b) tensor_copy(xs + s * kXBytes + b * NG * kXTile, map, c.column(a) * W::kCols + b * 64, 0, &full[s]);
    };
    prefetch_map(&a.source[at.source(a)].map);
    const int filled = min(a.stages, int(end - begin));
    Cursor ahead = at;
    for (int s = 0; s < filled; ++s, ahead.next(a)) fetch_weights(ahead, s);
    grid_wait();
    for (int s = 0; s < filled; ++s, at.next(a)) fetch_x(at, s);
    uint32_t parity = 0;
    for (uint32_t c = begin + filled; c < end; ++c, at.next(a)) {
      barrier_wait(&empty[stage], parity);
      fetch_weights(at, stage);
      fetch_x(at, stage);
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }
    return;
  }
  load_scales(true);
  grid_wait();
  uint32_t parity = 0;
  for (uint32_t c = begin; c < end; ++c) {
    if (c > begin) load_scales(false);
    if (kStash && at.step == 0) begin_group(a, stash, at);
    if (NG <= 2 && kPartsAhead && c + kPartsAhead == end) prefetch_parts(c);  // more do not fit the registers
    barrier_wait(&full[stage], parity);
    multiply<W, NG>(acc, ring + stage * W::kBytes, xs + stage * kXBytes, row_scale);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&empty[stage]);
    if (++stage == a.stages) stage = 0, parity ^= 1;
    close(c == end - 1);
  }
#else
  Cursor ahead = at;
  uint32_t fetched = begin;
  const auto fetch = [&](int s) {
    if (fetched++ < end) {
      const Source& from = a.source[ahead.source(a)];
      const uint8_t* w = from.w + (size_t(ahead.group) * from.steps + ahead.column(a)) * W::kBytes;
      for (int i = threadIdx.x; i < W::kBytes / 16; i += kWarps * 32) copy16(ring + s * W::kBytes + i * 16, w + i * 16);
      for (int i = threadIdx.x; i < W::kCols / 8 * a.T; i += kWarps * 32) {
        const int unit = i % 8, block = i / 8 % (W::kCols / 64), row = i / (W::kCols / 8), col = ahead.column(a) * W::kCols + block * 64 + unit * 8;
        copy16(xs + s * kXBytes + block * NG * kXTile + row * 128 + (unit ^ row % 8) * 16, from.x + (size_t(row) * from.K + min(col, from.K - 8)) * 2,
               col < from.K ? 16 : 0);
      }
      ahead.next(a);
    }
    copy_commit();
  };
  for (int s = 0; s < a.stages - 1; ++s) fetch(s);
  for (uint32_t c = begin; c < end; ++c) {
    load_scales(c == begin);
    switch (a.stages) {
      case 2: copy_wait<0>(); break;
      case 3: copy_wait<1>(); break;
      default: copy_wait<2>(); break;
    }
    __syncthreads();
    fetch(stage == 0 ? a.stages - 1 : stage - 1);
    multiply<W, NG>(acc, ring + stage * W::kBytes, xs + stage * kXBytes, row_scale);
    if (++stage == a.stages) stage = 0;
    close(c == end - 1);
  }
#endif
}

template <class W, int NG>
void launch_stream(const Stream& s, DType act, Args& a) {
  const int stage_bytes = W::kBytes + W::kCols / 64 * NG * kXTile;
  a.stages = std::min((s.shared_max - 2048 - (s.bulk_copy ? kStashFloats<NG> * 4 : 0)) / stage_bytes, s.bulk_copy ? kStages : 4);
  if (a.stages < 2) throw DeviceError(cat("CUDA: this device's ", s.shared_max, " bytes of shared memory per block are too few"));
  if (s.bulk_copy)
    for (Source& from : a.source)
      if (from.x) from.map = rows_map(act, from.x, a.T, from.K, NG * 8);
  launch(s, stream_matrix<W, NG>, int(std::min(uint32_t(s.sms), a.chunks)), kWarps * 32 + (s.bulk_copy ? 32 : 0),
         size_t(ring_bytes<W>(a.stages)) + size_t(a.stages) * (stage_bytes - W::kBytes) + 1024, a);
}

// rows [T, K] x matrix of chunks of W; x of kDecodeRows rows at most
template <class W>
void stream_rows(const Stream& s, DType act, Args& a) {
  if (a.T < 1 || a.T > kDecodeRows) throw DeviceError(cat("CUDA: a decode product of ", a.T, " rows; at most ", kDecodeRows));
  if (a.T <= 8) return launch_stream<W, 1>(s, act, a);
  if (a.T <= 16) return launch_stream<W, 2>(s, act, a);
  if (a.T <= 32) return launch_stream<W, 4>(s, act, a);
  return launch_stream<W, 8>(s, act, a);
}

template <class W>
Source source(const DecodeInput& in, int N) {
  Source s{};
  s.x = static_cast<const uint8_t*>(in.x);
  s.w = static_cast<const uint8_t*>(in.w);
  s.scale = row_scales(in.format, in.w, N, in.K);
  s.K = in.K;
  s.steps = (in.K + W::kCols - 1) / W::kCols;
  return s;
}

// b: nullptr, or a second product (out_b given) or a second part of K
template <class W>
void product(const Stream& s, DType act, int T, const DecodeInput& in, const DecodeOutput& out, const DecodeInput* in_b, const DecodeOutput* out_b,
             const SplitScratch& scratch) {
  Args a{};
  a.T = T;
  a.partial = scratch.partial;
  a.source[0] = source<W>(in, out.N);
  if (in_b) a.source[1] = source<W>(*in_b, out_b ? out_b->N : out.N);
  a.join = in_b && !out_b ? a.source[0].steps : INT_MAX;
  a.output[0] = {out.N, int(groups_of(out.N)), a.source[0].steps + (in_b && !out_b ? a.source[1].steps : 0), out.epilogue};
  if (out_b) a.output[1] = {out_b->N, int(groups_of(out_b->N)), a.source[1].steps, out_b->epilogue};
  const int64_t split = int64_t(a.output[0].groups) * a.output[0].steps, chunks = split + int64_t(a.output[1].groups) * a.output[1].steps;
  if ((chunks + 1) * s.sms >= int64_t(UINT32_MAX)) throw DeviceError(cat("CUDA: a matrix of ", chunks, " chunks is too large"));
  a.split = uint32_t(split);
  a.chunks = uint32_t(chunks);
  stream_rows<W>(s, act, a);
}

// The formats of linear_decode_quantized.cu; both inputs have the same.
void product_quantized(const Stream& s, DType act, int T, const DecodeInput& in, const DecodeOutput& out, const DecodeInput* in_b,
                       const DecodeOutput* out_b, const SplitScratch& scratch);

}  // namespace codefuse::cuda::stream
