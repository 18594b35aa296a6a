// The kernel under the linear layers of decode rows: as fast as the weights can be read. One block per multiprocessor streams
// its equal share of the chunks (weights.cuh) through a ring in shared memory, with each chunk the rows' activations. The weights
// are the A operand of the tensor cores and the rows its columns, 8 at a time, so one row costs what eight do, and an output's
// order of summation is the same for 1 row and for 64: along K inside a share, then share by share in order.
// On Hopper the ring is filled with weights before the kernel waits for its predecessor.
//
// One launch has one or two outputs (each a matrix of its own) or one output whose K comes from two sources (x and matrix each). Of
// two outputs every block has its share of the first, then its share of the second: the first is complete early, and says so
// (Ready), so that what needs only it runs beside the second. W (weights.cuh) says how weights lie in a chunk and become fragments.
#pragma once
#include <climits>

#include "cuda/stream_group.cuh"

namespace codefuse::cuda::stream {

// Bytes of the ring's chunks; x after them begins at a multiple of 1024, as its swizzle needs.
template <class W>
CODEFUSE_HD int ring_bytes(int stages) { return (stages * W::kBytes + 1023) / 1024 * 1024; }

// One chunk: a warp's row tiles x NG groups of 8 rows of x. Sums over 64 columns in order, scaled, in order.
template <class W, int NG>
__device__ __forceinline__ void multiply(float (&acc)[kTiles<NG>][NG][4], Shared w, Shared xs, const float (&row_scale)[kTiles<NG>][2]) {
  using T = typename W::Type;
  constexpr int kBlocks = W::kCols / 64;
  const int tile = threadIdx.x / 32 * kTiles<NG>, lane = threadIdx.x % 32, r = lane % 8;
  const uint32_t lo = xs.at + r * 128 + ((lane / 8) ^ r) * 16;      // columns 0 .. 31 of 8 rows of x
  const uint32_t hi = xs.at + r * 128 + ((lane / 8 + 4) ^ r) * 16;  // columns 32 .. 63
  typename W::Group group[kTiles<NG>];
#pragma unroll (NG <= 2 ? kBlocks : 1)  // more at a time do not fit the registers
  for (int block = 0; block < kBlocks; ++block) {
    if (NG > 2 || block % W::kBlocks == 0)
#pragma unroll
      for (int i = 0; i < kTiles<NG>; ++i) group[i] = W::group(w, tile + i, block, lane);
    uint4 f[kTiles<NG>][4];
#pragma unroll
    for (int i = 0; i < kTiles<NG>; ++i) fragments<W>(f[i], W::codes(w, tile + i, block, lane), group[i]);
#pragma unroll
    for (int j = 0; j < NG; ++j) {
      uint32_t b0[4], b1[4];
      ldmatrix4(b0, lo + (block * NG + j) * kXTile);
      ldmatrix4(b1, hi + (block * NG + j) * kXTile);
#pragma unroll
      for (int i = 0; i < kTiles<NG>; ++i) {
        float z[4] = {};
        float(&sum)[4] = W::kScale == Scale::none ? acc[i][j] : z;
#pragma unroll
        for (int s = 0; s < 4; ++s)
          mma16816<T>(sum, f[i][s].x, f[i][s].y, f[i][s].z, f[i][s].w, s < 2 ? b0[2 * s] : b1[2 * s - 4], s < 2 ? b0[2 * s + 1] : b1[2 * s - 3]);
        if constexpr (W::kScale != Scale::none)
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            float scale = row_scale[i][q / 2];
            if constexpr (W::kScale == Scale::block) scale = q / 2 ? group[i].scale.y : group[i].scale.x;
            acc[i][j][q] = fmaf(scale, z[q], acc[i][j][q]);
          }
      }
    }
  }
}

template <class W, int NG>
__global__ void __launch_bounds__(NG == 1 ? kFewRegisters : kWarps<NG> * 32 + 32, 1) stream_matrix(const __grid_constant__ Args a) {
  using T = typename W::Type;
  constexpr int kXBytes = W::kCols / 64 * NG * kXTile;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float stash[kStash ? kStashFloats<NG> : 1];
  uint8_t* const ring = shared + (1024 - shared_address(shared) % 1024) % 1024;  // [stages] chunks, then [stages] x
  uint8_t* const xs = ring + ring_bytes<W>(a.stages);
  launch_dependents();
  const Shared ring_at{shared_address(ring)}, xs_at{shared_address(xs)};
  int stage = 0;
  Cursor at(a);
  const int count = int(a.by_blocks((a.chunks[0] + a.chunks[1]) * (blockIdx.x + 1)) - a.by_blocks((a.chunks[0] + a.chunks[1]) * blockIdx.x));
  float acc[kTiles<NG>][NG][4] = {}, row_scale[kTiles<NG>][2] = {};

  // Consumers: chunks of one group and one source at a time; take() waits for one, give_back() has asked for all of it.
  const auto consume = [&](const auto& take, const auto& give_back) {
    const int after[2] = {blocks_after(a, 0), a.chunks[1] ? blocks_after(a, 1) : 0};
    int left = count, first_step = at.step;
    const auto load_scales = [&] {
      if constexpr (W::kScale == Scale::row) {
        const float* const scale = a.source[at.source(a)].scale;
#pragma unroll
        for (int i = 0; i < 2 * kTiles<NG>; ++i) {
          const int row = at.group * kGroupRows + int(threadIdx.x) / 32 * Own<NG>::kRows + int(threadIdx.x) % 32 / 4 + i * 8;
          row_scale[i / 2][i % 2] = row < a.output[at.output].N ? scale[row] : 0.f;
        }
      }
    };
    load_scales();
    take.begin();
    while (true) {
      if (kStash && at.step == 0) begin_group<NG>(a, stash, at);
      const int steps = a.steps[at.output], run = min(int(at.left), (at.step < a.join ? min(a.join, steps) : steps) - at.step);
#pragma unroll 1
      for (int i = 0; i < run; ++i) {
        take();
        multiply<W, NG>(acc, ring_at + stage * W::kBytes, xs_at + stage * kXBytes, row_scale);
        give_back();
      }
      left -= run;
      const bool ends = at.step + run == steps, finished = ends || int(at.left) == run;
      if (finished) finish<T, NG>(a, acc, at, first_step == 0, ends ? 0 : at.output ? after[1] : after[0], stash);
      if (left == 0) break;
      at.skip(a, run);
      if (finished) first_step = at.step;
      load_scales();
    }
  };

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t full[2 * kStages];
  uint64_t* const empty = full + kStages;
  const auto fetch_weights = [&](const Cursor& c, int s) {
    const Source& from = a.source[c.source(a)];
    barrier_expect(&full[s], W::kBytes + kXBytes);
    const uint8_t* const chunk = from.w + (size_t(c.group) * from.steps + c.column(a)) * W::kBytes;
    bulk_copy_once(ring + s * W::kBytes, chunk, W::kBytes, &full[s]);
  };
  const int filled = min(a.stages, count);
  if (threadIdx.x == kWarps<NG> * 32) {
    for (int s = 0; s < a.stages; ++s) barrier_init(&full[s], 1), barrier_init(&empty[s], kWarps<NG>);
    barrier_init_fence();
    Cursor ahead = at;
    for (int s = 0; s < filled; ++s, ahead.skip(a, 1)) fetch_weights(ahead, s);
  }
  __syncthreads();  // the barriers are there
  if (threadIdx.x >= kWarps<NG> * 32) {  // the producer is one thread
    if (threadIdx.x > kWarps<NG> * 32) return grid_wait();
    const auto fetch_x = [&](const Cursor& c, int s) {
      const CUtensorMap* map = &a.map[c.source(a)];
#pragma unroll
      for (int b = 0; b < W::kCols / 64; ++b) tensor_copy(xs + s * kXBytes + b * NG * kXTile, map, c.column(a) * W::kCols + b * 64, 0, &full[s]);
    };
    prefetch_map(&a.map[at.source(a)]);
    grid_wait();
    for (int s = 0; s < filled; ++s, at.skip(a, 1)) fetch_x(at, s);
    uint32_t parity = 0;
    for (int c = filled; c < count; ++c, at.skip(a, 1)) {
      barrier_wait(&empty[stage], parity);
      fetch_weights(at, stage);
      fetch_x(at, stage);
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }
    return;
  }
  uint32_t full_at = shared_address(full);
  asm volatile("" : "+r"(full_at));  // kept; else computed for every chunk
  const int stages = a.stages;
  uint32_t parity = 0;
  uint32_t read = 0;  // where the stage before this one is given back
  // A stage is given back when the next chunk is taken: by then its last fragments have been multiplied, so they have come. An arrival right
  // behind the loads overtakes them, and beside a block whose loads miss (attention) they stayed behind for longer than a copy takes.
  struct {
    const uint32_t &full_at, &read, &parity;
    const int& stage;
    __device__ __forceinline__ void begin() const { grid_wait(); }
    __device__ __forceinline__ void operator()() const {
      __syncwarp();
      if (read && threadIdx.x % 32 == 0) barrier_arrive(read);
      barrier_wait(full_at + stage * 8, parity);
    }
  } take{full_at, read, parity, stage};
  consume(take, [&] {
    read = full_at + (kStages + stage) * 8;
    if (++stage == stages) stage = 0, parity ^= 1;
  });
#else
  Cursor ahead = at;
  int fetched = 0;
  const auto fetch = [&](int s) {
    if (fetched++ < count) {
      const Source& from = a.source[ahead.source(a)];
      const uint8_t* w = from.w + (size_t(ahead.group) * from.steps + ahead.column(a)) * W::kBytes;
      for (int i = threadIdx.x; i < W::kBytes / 16; i += kWarps<NG> * 32) copy16(ring + s * W::kBytes + i * 16, w + i * 16);
      for (int i = threadIdx.x; i < W::kCols / 8 * a.T; i += kWarps<NG> * 32) {
        const int unit = i % 8, block = i / 8 % (W::kCols / 64), row = i / (W::kCols / 8), col = ahead.column(a) * W::kCols + block * 64 + unit * 8;
        copy16(xs + s * kXBytes + block * NG * kXTile + row * 128 + (unit ^ row % 8) * 16, from.x + (size_t(row) * from.K + min(col, from.K - 8)) * 2,
               col < from.K ? 16 : 0);
      }
      ahead.skip(a, 1);
    }
    copy_commit();
  };
  const auto take_next = [&] {
    switch (a.stages) {
      case 2: copy_wait<0>(); break;
      case 3: copy_wait<1>(); break;
      default: copy_wait<2>(); break;
    }
    __syncthreads();
    fetch(stage == 0 ? a.stages - 1 : stage - 1);
  };
  const auto fill = [&] {
    for (int s = 0; s < a.stages - 1; ++s) fetch(s);
  };
  struct {
    const decltype(take_next)& next;
    const decltype(fill)& first;
    __device__ __forceinline__ void begin() const { first(); }
    __device__ __forceinline__ void operator()() const { next(); }
  } take{take_next, fill};
  consume(take, [&] {
    if (++stage == a.stages) stage = 0;
  });
#endif
}

constexpr int kLeastShared = 101376;  // bytes a block may have on the GPUs that have the least, 8.6 and 8.9
template <class W, int NG> constexpr int kStageBytes = W::kBytes + W::kCols / 64 * NG * kXTile;  // of a chunk and its x

template <class W, int NG>
void launch_stream(const Stream& s, DType act, Args& a) {
  constexpr int kReserve = 2048;  // alignment, and barriers
  static_assert(2 * kStageBytes<W, NG> + kReserve <= kLeastShared, "a ring has two stages at least");
  const int room = s.shared_max - kReserve - (s.bulk_copy ? kStashFloats<NG> * 4 : 0), beside = (room - s.beside) / kStageBytes<W, NG>;
  a.stages = std::min(beside >= 2 ? beside : room / kStageBytes<W, NG>, s.bulk_copy ? kStages : 4);  // attention has room beside two
  if (a.stages < 2) throw DeviceError(cat("CUDA: this device's ", s.shared_max, " bytes of shared memory per block are too few"));
  if (s.bulk_copy)
    for (int i = 0; i < 2; ++i)
      if (a.source[i].x) a.map[i] = rows_map(act, a.source[i].x, a.T, a.source[i].K, NG * 8);
  launch(s, stream_matrix<W, NG>, int(std::min(uint32_t(s.sms), a.chunks[0] + a.chunks[1])), kWarps<NG> * 32 + (s.bulk_copy ? 32 : 0),
         size_t(ring_bytes<W>(a.stages)) + size_t(a.stages) * (kStageBytes<W, NG> - W::kBytes) + 1024, a);
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
             const SplitScratch& scratch, int32_t* ready = nullptr) {
  Args a{};
  a.T = T;
  a.partial = scratch.partial;
  a.source[0] = source<W>(in, out.N);
  if (in_b) a.source[1] = source<W>(*in_b, out_b ? out_b->N : out.N);
  a.join = in_b && !out_b ? a.source[0].steps : INT_MAX;
  a.output[0] = {out.N, int(groups_of(out.N)), out.epilogue};
  a.steps[0] = a.source[0].steps + (in_b && !out_b ? a.source[1].steps : 0);
  if (out_b) a.output[1] = {out_b->N, int(groups_of(out_b->N)), out_b->epilogue}, a.steps[1] = a.source[1].steps;
  const int64_t first = int64_t(a.output[0].groups) * a.steps[0], second = int64_t(a.output[1].groups) * a.steps[1];
  if ((first + second) * (s.sms + 1) > INT32_MAX) throw DeviceError(cat("CUDA: a matrix of ", first + second, " chunks is too large"));
  a.chunks[0] = uint32_t(first), a.chunks[1] = uint32_t(second);
  const int64_t blocks = std::min<int64_t>(s.sms, first + second);
  a.in_turn = first >= blocks && (first + second) / blocks > (first + blocks - 1) / blocks;
  a.by_blocks = Divider(uint32_t(blocks));
  for (int o = 0; o < 2; ++o) a.by_steps[o] = Divider(uint32_t(std::max(1, a.steps[o])));
  a.ready = ready;
  stream_rows<W>(s, act, a);
}

// The formats of linear_decode_quantized.cu; both inputs have the same.
void product_quantized(const Stream& s, DType act, int T, const DecodeInput& in, const DecodeOutput& out, const DecodeInput* in_b,
                       const DecodeOutput* out_b, const SplitScratch& scratch, int32_t* ready);

}  // namespace codefuse::cuda::stream
