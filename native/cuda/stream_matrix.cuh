// The kernel under the linear layers of decode rows: as fast as the weights can be read. One block per multiprocessor streams
// its equal share of the chunks (weights.cuh) through a ring in shared memory, with each chunk the rows' activations. The weights
// are the A operand of the tensor cores and the rows its columns, 8 at a time, so one row costs what eight do, and an output's
// order of summation is the same for 1 row and for 64: along K inside a share, then share by share in order. Quantized weights are multiplied
// as integers, by x as integers (stream_x.cuh).
// On Hopper the ring is filled with weights before the kernel waits for its predecessor.
//
// One launch has one or two outputs (each a matrix of its own) or one output whose K comes from two sources (x and matrix each). Of
// two outputs every block has its share of the first, then its share of the second: the first is complete early, and says so
// (Ready), so that what needs only it runs beside the second. W (weights.cuh) says how weights lie in a chunk and become fragments.
#pragma once
#include <climits>

#include "cuda/stream_group.cuh"
#include "cuda/stream_multiply.cuh"

namespace codefuse::cuda::stream {

// Bytes of the ring's chunks; x after them begins at a multiple of 1024, as its swizzle needs.
template <class W>
CODEFUSE_HD constexpr int ring_bytes(int stages) { return (stages * W::kBytes + 1023) / 1024 * 1024; }

// Threads of a block: the consumers; with bulk copies a warp that asks for them, and that warp
template <class W, int NG, bool ONE> CODEFUSE_HD constexpr int threads(bool bulk_copy) { return 32 * (kWarps<NG> + (bulk_copy ? 1 + kTurnsX<W, ONE> : 0)); }

// ONE: T is 1
template <class W, int NG, bool ONE>
__global__ void __launch_bounds__(NG == 1 ? kFewRegisters : threads<W, NG, ONE>(true), 1) stream_matrix(const __grid_constant__ Args a) {
  using T = typename W::Type;
  constexpr int kXBytes = x_bytes<W, NG, ONE>(kBulkCopies), kTermsBytes = NG * terms_bytes<W>();
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float stash[kStash ? kStashFloats<NG, ONE> : 1];
  uint8_t* const ring = shared + (1024 - shared_address(shared) % 1024) % 1024;  // [stages] chunks, then [stages] x
  uint8_t* const xs = ring + ring_bytes<W>(a.stages);
  launch_dependents();
  const Shared xs_at{shared_address(xs)}, terms_at = xs_at + a.stages * kXBytes;  // what goes with x, [stages]
  int stage = 0;
  Cursor at(a);
  const int count = int(a.by_blocks((a.chunks[0] + a.chunks[1]) * (blockIdx.x + 1)) - a.by_blocks((a.chunks[0] + a.chunks[1]) * blockIdx.x));
  float acc[kTiles<NG>][NG][4] = {}, row_scale[kTiles<NG>][2] = {};

  // Consumers: chunks of one group and one source at a time; take() waits for one and says where, give_back() has asked for all of it.
  const auto consume = [&](const auto& take, const auto& give_back) {
    const Lane lane = lane_of<W, NG, ONE>({shared_address(ring)}, xs_at, terms_at);
    const int after[2] = {blocks_after(a, 0), a.chunks[1] ? blocks_after(a, 1) : 0};
    int left = count, first_step = at.step;
    constexpr bool kHolds = kStash && ONE;
    Held held;
    const auto stash_of = [&](int output) { return stash + (kHolds && output ? kSecondStash : 0); };
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
      if (kStash && at.step == 0) begin_group<NG>(a, stash_of(at.output), at);
      const int steps = a.steps[at.output];
      int run = min(int(at.left), (at.step < a.join ? min(a.join, steps) : steps) - at.step);
      if constexpr (kHolds)
        if (held.chunks) run = min(run, held.chunks);
#pragma unroll 1
      for (int i = 0; i < run; ++i) {
        const int now = take();
        if constexpr (kCodes<W>)
          multiply_codes<W, NG, ONE>(acc, lane, now, row_scale);
        else
          multiply_values<W, NG, ONE>(acc, lane, now);
        give_back(now);
      }
      left -= run;
      const bool ends = at.step + run == steps, finished = ends || int(at.left) == run;
      if constexpr (kHolds)
        if (held.chunks && ((held.chunks -= run) == 0 || left == 0)) end_held<T, NG>(a, held, stash);
      if (finished)
        finish<T, NG, ONE>(a, acc, at, first_step == 0, ends ? 0 : at.output ? after[1] : after[0], stash_of(at.output), kHolds && at.output == 0 && left > 0 ? &held : nullptr);
      if (left == 0) break;
      at.skip(a, run);
      if (finished) first_step = at.step;
      load_scales();
    }
  };

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t full[3 * kStages<ONE>];  // [stages] each: copies have come, x is integers, all has been read
  uint64_t *const ready = full + kStages<ONE>, *const empty = ready + kStages<ONE>;
  constexpr bool kPrepared = kCodes<W> && !ONE;  // x comes as integers
  const auto fetch_weights = [&](const Cursor& c, int s) {
    const Source& from = a.source[c.source(a)];
    barrier_expect(&full[s], W::kBytes + kXBytes + (kPrepared ? kTermsBytes : 0));
    const uint8_t* const chunk = from.w + (size_t(c.group) * from.steps + c.column(a)) * W::kBytes;
    bulk_copy_once(ring + s * W::kBytes, chunk, W::kBytes, &full[s]);
  };
  const int filled = min(a.stages, count);
  if (threadIdx.x == kWarps<NG> * 32) {
    for (int s = 0; s < a.stages; ++s) barrier_init(&full[s], 1), barrier_init(&ready[s], 32), barrier_init(&empty[s], 32 * kWarps<NG>);
    barrier_init_fence();
    Cursor ahead = at;
    for (int s = 0; s < filled; ++s, ahead.skip(a, 1)) fetch_weights(ahead, s);
  }
  __syncthreads();  // the barriers are there
  if (kTurnsX<W, ONE> && threadIdx.x >= (kWarps<NG> + 1) * 32) {
    grid_wait();
    uint32_t parity = 0;
    for (int c = 0; c < count; ++c) {
      barrier_wait(&full[stage], parity);
      if constexpr (kTurnsX<W, ONE>) row_to_integers<T, W::kGroupCols>(xs_at + stage * kXBytes, terms_at + stage * kTermsBytes);
      proxy_fence();  // the next copy into the stage comes after these stores
      barrier_arrive(&ready[stage]);
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }
    return;
  }
  if (threadIdx.x >= kWarps<NG> * 32) {  // the producer is one thread
    if (threadIdx.x > kWarps<NG> * 32) return grid_wait();
    const auto fetch_x = [&](const Cursor& c, int s) {
      if constexpr (kPrepared) {
        const uint8_t* const chunk = a.integers + size_t(c.chunk_of_x(a)) * chunk_integers(NG, terms_bytes<W>());
        bulk_copy(xs + s * kXBytes, chunk, kXBytes, &full[s]);
        bulk_copy(xs + a.stages * kXBytes + s * kTermsBytes, chunk + kXBytes, kTermsBytes, &full[s]);
      } else {
        const CUtensorMap* map = &a.map[c.source(a)];
        constexpr int kBoxes = ONE ? 1 : W::kCols / 64;
#pragma unroll
        for (int b = 0; b < kBoxes; ++b) tensor_copy(xs + s * kXBytes + b * NG * kXTile, map, c.column(a) * W::kCols + b * 64, 0, &full[s]);
      }
    };
    if constexpr (!kPrepared) prefetch_map(&a.map[at.source(a)]);
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
  const uint32_t full_at = kept({shared_address(full)}, 0).at, come_at = full_at + (kTurnsX<W, ONE> ? kStages<ONE> * 8 : 0);
  const int stages = a.stages;
  uint32_t parity = 0;
  uint32_t read = 0;  // where the stage before this one is given back
  bool come = false;  // what the next chunk's barrier said, asked before this one was multiplied
  // A stage is given back when the next chunk is taken, and by each lane for what it has read itself: by then its last fragments have been
  // multiplied, so they have come. An arrival right behind the loads overtakes them, and beside a block whose loads miss (attention) they
  // stayed behind for longer than a copy takes.
  struct {
    const uint32_t &come_at, &read;
    uint32_t& parity;
    int& stage;
    const int& stages;
    bool& come;
    __device__ __forceinline__ void begin() const { grid_wait(); }
    __device__ __forceinline__ int operator()() const {
      if (read) barrier_arrive(read);
      if (!come) barrier_wait(come_at + stage * 8, parity);
      const int now = stage;
      if (++stage == stages) stage = 0, parity ^= 1;
      if constexpr (ONE) come = barrier_passed(come_at + stage * 8, parity);
      return now;
    }
  } take{come_at, read, parity, stage, stages, come};
  consume(take, [&](int now) { read = full_at + (2 * kStages<ONE> + now) * 8; });
#else
  Cursor ahead = at;
  int fetched = 0;
  const auto fetch = [&](int s) {
    if (fetched++ < count) {
      const Source& from = a.source[ahead.source(a)];
      const uint8_t* w = from.w + (size_t(ahead.group) * from.steps + ahead.column(a)) * W::kBytes;
      for (int i = threadIdx.x; i < W::kBytes / 16; i += kWarps<NG> * 32) copy16(ring + s * W::kBytes + i * 16, w + i * 16);
      if constexpr (kCodes<W>) {
        const uint8_t* const chunk = a.integers + size_t(ahead.chunk_of_x(a)) * chunk_integers(NG, terms_bytes<W>());
        for (int i = threadIdx.x; i < kXBytes / 16; i += kWarps<NG> * 32) copy16(xs + s * kXBytes + i * 16, chunk + i * 16);
        for (int i = threadIdx.x; i < kTermsBytes / 16; i += kWarps<NG> * 32)
          copy16(xs + a.stages * kXBytes + s * kTermsBytes + i * 16, chunk + kXBytes + i * 16);
      } else {
        for (int i = threadIdx.x; i < W::kCols / 8 * a.T; i += kWarps<NG> * 32) {
          const int unit = i % 8, block = i / 8 % (W::kCols / 64), row = i / (W::kCols / 8), col = ahead.column(a) * W::kCols + block * 64 + unit * 8;
          copy16(xs + s * kXBytes + block * NG * kXTile + row * 128 + (unit ^ row % 8) * 16, from.x + (size_t(row) * from.K + min(col, from.K - 8)) * 2,
                 col < from.K ? 16 : 0);
        }
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
    int& stage;
    const int stages;
    __device__ __forceinline__ void begin() const { first(); }
    __device__ __forceinline__ int operator()() const {
      next();
      const int now = stage;
      if (++stage == stages) stage = 0;
      return now;
    }
  } take{take_next, fill, stage, a.stages};
  consume(take, [](int) {});
#endif
}

constexpr int kLeastShared = 101376;  // bytes a block may have on the GPUs that have the least, 8.6 and 8.9
// Of a ring of chunks and their x, wherever it begins.
template <class W, int NG, bool ONE>
constexpr int shared_bytes(int stages, bool bulk_copy) {
  return ring_bytes<W>(stages) + stages * (x_bytes<W, NG, ONE>(bulk_copy) + NG * terms_bytes<W>()) + 1024;
}

// Bytes of shared memory left of a multiprocessor.
template <class W, int NG, bool ONE = false>
int launch_stream(const Stream& s, DType act, Args& a, const SplitScratch& scratch) {
  constexpr int kSystem = 1024;  // what the system takes of a block's multiprocessor
  static_assert(shared_bytes<W, NG, ONE>(2, false) <= kLeastShared, "a ring has two stages at least");
  const int fixed = s.bulk_copy ? kStashFloats<NG, ONE> * 4 + 256 : 0;  // static: the stash, barriers
  const auto shared_with = [&](int stages) { return shared_bytes<W, NG, ONE>(stages, s.bulk_copy); };
  const auto most = [&](int bytes) {
    int stages = s.bulk_copy ? kStages<ONE> : 4;
    while (stages >= 2 && shared_with(stages) + fixed > bytes) --stages;
    return stages;
  };
  const int beside = most(s.shared_max - (ONE ? s.beside_one : s.beside));
  a.stages = beside >= 2 ? beside : most(s.shared_max);  // attention has room beside two
  if (a.stages < 2) throw DeviceError(cat("CUDA: this device's ", s.shared_max, " bytes of shared memory per block are too few"));
  if constexpr (kCodes<W>)
    if (!ONE || !s.bulk_copy) {
      static_assert(chunk_integers(NG, terms_bytes<W>()) <= kIntegersBytes, "what a plan has room for");
      const Source &x = a.source[0], &y = a.source[1];
      const int chunks = x.steps + y.steps;
      if (chunks * kIntegersBytes > scratch.integers_bytes) throw DeviceError(cat("CUDA: no room for integers of ", chunks, " chunks of x"));
      launch(s, prepare_rows<typename W::Type, W::kGroupCols>, dim3(chunks, NG), 256, 0, x.x, x.K, y.x, y.K, a.T, scratch.integers);
      a.integers = scratch.integers;
    }
  if (s.bulk_copy && !a.integers)
    for (int i = 0; i < 2; ++i)
      if (a.source[i].x)
        a.map[i] = ONE ? row_map(act, a.source[i].x, a.source[i].K, W::kCols) : rows_map(act, a.source[i].x, a.T, a.source[i].K, NG * 8);
  // Two never fit a multiprocessor: a block that waited for room would come to lie beside another of its launch, which then has half the
  // bandwidth while a multiprocessor is idle.
  const int shared = std::max(shared_with(a.stages), s.shared_sm / 2 - fixed);
  launch(s, stream_matrix<W, NG, ONE>, int(std::min(uint32_t(s.sms), a.chunks[0] + a.chunks[1])), threads<W, NG, ONE>(s.bulk_copy), size_t(shared), a);
  return s.shared_sm - shared - fixed - kSystem;
}

// rows [T, K] x matrix of chunks of W; x of kDecodeRows rows at most
template <class W>
int stream_rows(const Stream& s, DType act, Args& a, const SplitScratch& scratch) {
  if (a.T < 1 || a.T > kDecodeRows) throw DeviceError(cat("CUDA: a decode product of ", a.T, " rows; at most ", kDecodeRows));
  if (a.T == 1) return launch_stream<W, 1, true>(s, act, a, scratch);
  if (a.T <= 8) return launch_stream<W, 1>(s, act, a, scratch);
  if (a.T <= 16) return launch_stream<W, 2>(s, act, a, scratch);
  if (a.T <= 32) return launch_stream<W, 4>(s, act, a, scratch);
  return launch_stream<W, 8>(s, act, a, scratch);
}

template <class W>
Source source(const LinearInput& in, int N) {
  Source s{};
  s.x = static_cast<const uint8_t*>(in.x);
  s.w = static_cast<const uint8_t*>(in.w);
  s.scale = row_scales(in.format, in.w, N, in.K);
  s.K = in.K;
  s.steps = (in.K + W::kCols - 1) / W::kCols;
  return s;
}

// b: nullptr, or a second product (out_b given) or a second part of K. Returns the bytes of shared memory left of a multiprocessor.
template <class W>
int product(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const LinearInput* in_b, const LinearOutput* out_b,
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
  return stream_rows<W>(s, act, a, scratch);
}

// The formats of linear_decode_quantized.cu; both inputs have the same.
int product_quantized(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const LinearInput* in_b,
                      const LinearOutput* out_b, const SplitScratch& scratch, int32_t* ready);

}  // namespace codefuse::cuda::stream
