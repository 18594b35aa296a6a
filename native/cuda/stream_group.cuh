// The end of a row group in the streaming kernel (stream_matrix.cuh): the sums of the blocks that share it, and what becomes of them.
#pragma once
#include "cuda/epilogue.cuh"
#include "cuda/stream_args.cuh"

namespace codefuse::cuda::stream {

// What the end of a group needs is read at its beginning (bias and, of up to kStashRows rows, what is added to), so that no block's end
// waits for memory behind the weights that the next launch asks for.
constexpr bool kStash = kBulkCopies;  // else cp.async is the ring's
constexpr int kStashRows = 8;
template <int NG, bool ONE> constexpr int kStashFloats = (ONE ? 6 : 2 + (NG == 1 ? kStashRows : 0)) * kGroupRows;
// One token needs three rows of it: output 1 has some of its own, so that a group of output 0 can be held.
constexpr int kSecondStash = 3 * kGroupRows;
constexpr uint32_t kAbsent = 0xffffffffu;  // in place of a part that has not come yet; SplitScratch is full of it between launches

__device__ __forceinline__ float load_part(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_part(float* p, float v) { asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"); }
__device__ __forceinline__ bool absent(float v) { return __float_as_uint(v) == kAbsent; }
__device__ __forceinline__ float present(float v) { return absent(v) ? __uint_as_float(0x7fffffffu) : v; }

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What a lane has of a group at its end: a row of the group, and tokens: all, or every other one where 16 lanes have all rows of a warp.
template <int NG>
struct Own {
  static constexpr int kRows = 16 * kTiles<NG>, kStep = 32 / kRows;
  static __device__ __forceinline__ int row() { return int(threadIdx.x) / 32 * kRows + int(threadIdx.x) % kRows; }
  static __device__ __forceinline__ int token() { return int(threadIdx.x) % 32 / kRows; }  // the first
};

// At the beginning of a group, whose first block ends it: bias, bias_b, rows of y to stash [.][kGroupRows]. A warp
// has its rows of them for itself.
template <int NG>
__device__ __forceinline__ void begin_group(const Args& a, float* stash, const Cursor& at) {
  using O = Own<NG>;
  const Output& out = a.output[at.output];
  const Epilogue& e = out.epilogue;
  const int local = O::row(), row = at.group * kGroupRows + local;
  if (row < out.N) {
    if (e.bias && O::token() == 0) copy4(stash + local, e.bias + row);
    if (e.bias_b && O::token() == O::kStep - 1) copy4(stash + kGroupRows + local, e.bias_b + row);
    if (e.store == Store::add && a.T <= kStashRows)
      for (int t = O::token(); t < a.T; t += O::kStep) copy4(stash + (2 + t) * kGroupRows + local, static_cast<const float*>(e.y) + int64_t(t) * out.N + row);
  }
  if (e.store == Store::add && a.T > kStashRows && row / O::kRows * O::kRows < out.N)
    for (int t = threadIdx.x % 32; t < a.T; t += 32) prefetch_l2(static_cast<const float*>(e.y) + int64_t(t) * out.N + row / O::kRows * O::kRows);
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

// z[i] of token STEP i += the parts of the next `parts` blocks, in their order, as they arrive: every word of a part says by itself
// whether it is there.
template <int TOKENS, int STEP, int BATCH /*blocks asked for at once*/>
__device__ __forceinline__ void add_parts(float (&z)[TOKENS], float* from, int parts, int tokens) {
#pragma unroll 1
  for (int p = 0; p < parts; p += BATCH, from += BATCH * kPart) {
    float v[BATCH][TOKENS];
#pragma unroll
    for (int k = 0; k < BATCH; ++k)
#pragma unroll
      for (int i = 0; i < TOKENS; ++i)
        if (p + k < parts && STEP * i < tokens) v[k][i] = load_part(from + k * kPart + STEP * i * kGroupRows);
#pragma unroll
    for (int k = 0; k < BATCH; ++k)
#pragma unroll
      for (int i = 0; i < TOKENS; ++i)
        if (p + k < parts && STEP * i < tokens) {
          float* const at = from + k * kPart + STEP * i * kGroupRows;
          while (absent(v[k][i])) v[k][i] = load_part(at);
          store_part(at, __uint_as_float(kAbsent));
          z[i] += v[k][i];
        }
  }
}

// The sums of a group's first block, of tokens first, first + O::kStep .. that the lane has: with the sums of the next `parts` blocks they
// become the output.
template <class T, int NG, int TOKENS>
__device__ __forceinline__ void end_rows(const Args& a, float (&z)[TOKENS], int output, int group, int first, int parts, const float* stash) {
  using O = Own<NG>;
  const Output& out = a.output[output];
  const int local = O::row(), row = group * kGroupRows + local, tokens = a.T - first;  // of token O::kStep i: O::kStep i < tokens
  add_parts<TOKENS, O::kStep, TOKENS == 1 ? 8 : 4>(z, part_of(a, output, blockIdx.x) + first * kGroupRows + local + kPart, parts, tokens);
  if constexpr (kStash) {
    copy_wait_all();
    __syncwarp();
  }
  if (row >= out.N) return;
#pragma unroll
  for (int i = 0; i < TOKENS; ++i)
    if (O::kStep * i < tokens) {
      if constexpr (kStash)
        store_stashed<T, NG>(out.epilogue, stash, z[i], first + O::kStep * i, row, out.N, local);
      else
        store_output<T>(out.epilogue, z[i], first + O::kStep * i, row, out.N);
    }
}
// after the warp has stored its rows of a group
template <int NG>
__device__ __forceinline__ void tell(const Args& a, int output) {
  __syncwarp();
  if (a.ready && output == 0 && threadIdx.x % 32 == 0) asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(a.ready), "n"(kTiles<NG>) : "memory");
}

// The sums of one token's group of output 0 that other blocks have parts of: they are put off until these parts have come, while the
// block goes on with output 1.
struct Held {
  float z;
  int group, parts, chunks = 0;  // chunks: until then; 0: nothing is held
  static constexpr int kChunks = 3;
};
template <class T, int NG>
__device__ __forceinline__ void end_held(const Args& a, Held& held, const float* stash) {
  float z[1] = {held.z};
  end_rows<T, NG>(a, z, 0, held.group, 0, held.parts, stash);
  tell<NG>(a, 0);
  held.chunks = 0;
}

// Sums of a row group over this block's columns are in acc. The first of the
// blocks that share the group adds the others' sums. All blocks of a launch are resident at once (one per multiprocessor, and a
// launch starts when all blocks of its predecessor have), so waiting for them is safe.
// mine: the group began in this block; parts: blocks that have more of it; held: where sums are left rather than waiting, or nullptr. ONE: T is 1.
template <class T, int NG, bool ONE>
__device__ __forceinline__ void finish(const Args& a, float (&acc)[kTiles<NG>][NG][4], const Cursor& at, bool mine, int parts, const float* stash, Held* held) {
  using O = Own<NG>;
  const int lane = threadIdx.x % 32, local = O::row();
  const auto rows_of = [&](auto lane_tokens, int j) {
    constexpr int kTokens = decltype(lane_tokens)::value;  // of a lane
    float z[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float v[4];  // two tiles: of rows lane % 8, + 8, + 16, + 24; one: of row lane % 8 and + 8, each of two tokens
#pragma unroll
      for (int q = 0; q < 4; ++q)
        v[q] = kTiles<NG> == 2 ? __shfl_sync(~0u, acc[q / 2 % kTiles<NG>][j][q % 2 * 2 + i % 2], lane % 8 * 4 + i / 2)
                               : __shfl_sync(~0u, acc[0][j][q % 2 * 2 + q / 2], lane % 8 * 4 + i);
      const float low = lane & 8 ? v[1] : v[0], high = lane & 8 ? v[3] : v[2];
      z[i] = lane & 16 ? high : low;
    }
    const int first = j * 8 + O::token(), tokens = a.T - first;
    if (mine) {
      if (kTokens == 1 && held && parts > 0)
        held->z = z[0], held->group = at.group, held->parts = parts, held->chunks = Held::kChunks;
      else
        end_rows<T, NG>(a, z, at.output, at.group, first, parts, stash);
      return;
    }
    float* const part = part_of(a, at.output, blockIdx.x) + first * kGroupRows + local;
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (O::kStep * i < tokens) store_part(part + O::kStep * i * kGroupRows, present(z[i]));
  };
  if constexpr (ONE) {
    rows_of(std::integral_constant<int, 1>(), 0);
  } else {
#pragma unroll
    for (int j = 0; j < NG; ++j)
      if (j * 8 < a.T) rows_of(std::integral_constant<int, 8 / O::kStep>(), j);
  }
#pragma unroll
  for (int i = 0; i < kTiles<NG>; ++i)
#pragma unroll
    for (int j = 0; j < NG; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[i][j][q] = 0.f;
  if (mine && !(held && held->chunks)) tell<NG>(a, at.output);
}

}  // namespace codefuse::cuda::stream
