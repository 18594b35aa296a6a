// Attention of single rows over their pages. Positions are taken in splits of 64 tokens aligned at 0, a split by one block, an
// equal part of it by each warp; softmax sums of the warps, then of the splits, are combined in order. So a row's result depends
// on its position alone, not on how many blocks share its splits. Any head_dim up to 256 that is a multiple of 8.
// K and V of a split are read into registers at once: those of earlier steps before the kernel waits for its predecessor, K of the next
// split when this one's scores are there, V when its parts are combined. Where it fits attention_decode_mma.cu goes first.
#include <algorithm>

#include "cuda/attention_parts.cuh"

namespace codefuse::cuda {

namespace {

// LANES lanes hold one token's head; a warp looks at 32 / LANES tokens at a time. HOLD: there are registers for V beside K.
// grid: (kv_heads, rows, blocks sharing splits)
template <class T, int LANES, int WARPS, bool HOLD>
__global__ void __launch_bounds__(WARPS * 32, 16 / WARPS) attend_rows(T* __restrict__ out, const T* __restrict__ qkv, const T* keys,
                                                                       const T* values, const DecodeAttention a) {
  constexpr int kTokens = kSplitTokens / WARPS, kRound = 32 / LANES, kRounds = kTokens / kRound;  // tokens of a warp, and at a time
  constexpr int kSame = LANES / kRounds;   // lanes that come to hold one token's score
  constexpr int kOwn = 8 / kRound;         // elements of the head that a lane comes to hold
  __shared__ __align__(16) float sums[2][WARPS][LANES * 8];
  __shared__ float tops[2][WARPS], weights[2][WARPS];
  launch_dependents();
  const int row = a.row0 + blockIdx.y, kv_head = blockIdx.x, d = a.head_dim, group = a.heads / a.kv_heads;
  const int last = a.m.position[row], first = a.window > 0 ? max(0, last - a.window + 1) : 0;
  const int first_split = first / kSplitTokens, splits = last / kSplitTokens - first_split + 1;
  const int each = (splits + gridDim.z - 1) / gridDim.z, share = (splits + each - 1) / each;  // blocks that have splits
  if (int(blockIdx.z) >= share || a.m.slot[row] < 0) return grid_wait();
  const int settled = a.m.settled ? a.m.settled[row] : 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = lane % LANES * 8;
  const int32_t* table = a.m.table + int64_t(a.m.sequence[row]) * a.m.max_pages;
  const bool active = at < d;
  const int64_t round_stride = int64_t(kRound) * d;
  qkv += int64_t(row) * (a.heads + 2 * a.kv_heads) * d;
  out += (int64_t(row) * a.heads + kv_head * group) * d;
  float* const partial = a.partial + (int64_t(blockIdx.y) * a.heads + kv_head * group) * a.splits * (d + 2);

  const auto token_of = [&](int split) { return (first_split + split) * kSplitTokens + warp * kTokens; };  // the warp's first
  const auto page_of = [&](int split) { return split < splits && token_of(split) <= last ? table[token_of(split) / kPageTokens] : 0; };
  // the lane's part of tokens [from, to)
  const auto load = [&](Eight<T>(&to)[kRounds], const T* base, int split, int page, int from, int end) {
    const int token0 = token_of(split) + lane / LANES;
    const T* p = base + ((int64_t(page) * a.kv_heads + kv_head) * kPageTokens + token0 % kPageTokens) * d + at;
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
      if (active && token0 + r * kRound >= from && token0 + r * kRound < end) to[r] = load8(p + r * round_stride);
  };

  Eight<T> k[kRounds] = {}, v[kRounds] = {};
  int split = blockIdx.z, page = page_of(split), buffer = 0;
  load(k, keys, split, page, first, min(settled, last + 1));
  if (HOLD) load(v, values, split, page, first, min(settled, last + 1));
  grid_wait();
  load(k, keys, split, page, max(first, settled), last + 1);
  if (HOLD) load(v, values, split, page, max(first, settled), last + 1);

  for (; split < splits; split += share) {
    const int next_page = page_of(split + share);
    const int mine = token_of(split) + lane % LANES / kSame * kRound + lane / LANES;  // whose score this lane comes to hold
    for (int h = 0; h < group; ++h, buffer ^= 1) {
      float q[8] = {}, z[kRounds];
      if (active) unpack(load8(qkv + (kv_head * group + h) * d + at), q);
#pragma unroll
      for (int i = 0; i < 8; ++i) q[i] *= a.scale;
      if (!HOLD && (h > 0 || split != int(blockIdx.z))) load(k, keys, split, page, first, last + 1);
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        float f[8];
        unpack(k[r], f);
        z[r] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) z[r] = fmaf(q[i], f[i], z[r]);
      }
      const bool goes_on = HOLD && h == group - 1 && split + share < splits;
      if (goes_on) load(k, keys, split + share, next_page, first, last + 1);
      // sums over the lanes of a token: each exchange halves the tokens a lane goes on with
#pragma unroll
      for (int n = kRounds / 2, o = LANES / 2; n > 0; n /= 2, o /= 2) {
        const bool upper = lane & o;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const float other = __shfl_xor_sync(~0u, upper ? z[i] : z[i + n], o);
          z[i] = (upper ? z[i + n] : z[i]) + other;
        }
      }
#pragma unroll
      for (int o = kSame / 2; o > 0; o /= 2) z[0] += __shfl_xor_sync(~0u, z[0], o);
      const float score = mine >= first && mine <= last ? z[0] : -INFINITY;
      float top = score;
#pragma unroll
      for (int o = 16; o >= kSame; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
      const float p = score == -INFINITY ? 0.f : exp2f(score - top);
      float weight = p, acc[8] = {};
#pragma unroll
      for (int o = 16; o >= kSame; o /= 2) weight += __shfl_xor_sync(~0u, weight, o);
      if (!HOLD) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) v[r] = {};
        load(v, values, split, page, first, last + 1);
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const float w = __shfl_sync(~0u, p, lane / LANES * LANES + r * kSame);
        float f[8];
        unpack(v[r], f);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] = fmaf(w, f[i], acc[i]);
      }
      if (goes_on) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) v[r] = {};
        load(v, values, split + share, next_page, first, last + 1);
      }
      int own = at;
#pragma unroll
      for (int n = 4, o = 16; o >= LANES; n /= 2, o /= 2) {
        const bool upper = lane & o;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const float other = __shfl_xor_sync(~0u, upper ? acc[i] : acc[i + n], o);
          acc[i] = (upper ? acc[i + n] : acc[i]) + other;
        }
        own += upper ? n : 0;
      }
#pragma unroll
      for (int i = 0; i < kOwn; i += 2) *reinterpret_cast<float2*>(&sums[buffer][warp][own + i]) = make_float2(acc[i], acc[i + 1]);
      if (lane == 0) tops[buffer][warp] = top, weights[buffer][warp] = weight;
      __syncthreads();
      if (int(threadIdx.x) < d) {
        float most = tops[buffer][0], sum = 0.f, total = 0.f;
#pragma unroll
        for (int w = 1; w < WARPS; ++w) most = fmaxf(most, tops[buffer][w]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          const float scale = exp2f(tops[buffer][w] - most);  // 0 for a warp without tokens
          sum = fmaf(scale, sums[buffer][w][threadIdx.x], sum);
          total = fmaf(scale, weights[buffer][w], total);
        }
        if (splits == 1) {
          out[h * d + threadIdx.x] = from_float<T>(sum / total);
        } else {
          float* to = partial + (int64_t(h) * a.splits + split) * (d + 2);
          __stcg(to + threadIdx.x, sum);
          if (threadIdx.x == 0) __stcg(reinterpret_cast<float2*>(to + d), make_float2(most, total));
        }
      }
    }
    page = next_page;
  }
  if (splits == 1) return;
  if (share == 1)
    __syncthreads();
  else if (!is_last_of(a.arrived + blockIdx.y * a.kv_heads + kv_head, share))
    return;
  add_parts(out, partial, group, d, a.splits, splits);
}

template <class T>
void run(const Stream& s, void* out, const void* qkv, const KvLayer& kv, DecodeAttention a, int rows, int rows_at_once) {
  constexpr bool f32 = sizeof(T) == 4;
  // so that K and V of a split are 64 registers
  const auto kernel = a.head_dim <= 64 ? attend_rows<T, 8, 4, true> : a.head_dim <= 128 ? attend_rows<T, 16, f32 ? 8 : 4, true> : attend_rows<T, 32, 8, !f32>;
  const int threads = a.head_dim > 128 || (f32 && a.head_dim > 64) ? 256 : 128;
  for (int row = 0; row < rows; row += rows_at_once, a.row0 += rows_at_once) {
    const int count = std::min(rows_at_once, rows - row), heads = a.kv_heads * count;
    const int share = std::max(1, std::min(a.splits, (heads <= s.sms ? 2 : 6) * s.sms / heads));  // a block without a split ends at once
    launch(s, kernel, dim3(a.kv_heads, count, share), threads, 0, static_cast<T*>(out), static_cast<const T*>(qkv), static_cast<const T*>(kv.k),
           static_cast<const T*>(kv.v), a);
  }
}

DecodeAttention arguments(const StepMeta& m, int row, const AttentionShape& a, const AttentionScratch& scratch) {
  return {m, row, a.heads, a.kv_heads, a.head_dim, a.window, a.rope_dim, 1.44269504088896341f / sqrtf(float(a.head_dim)), scratch.partial, scratch.arrived, scratch.splits, nullptr, {}};
}

}  // namespace

void attention_rows(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int row, int T,
                    const AttentionShape& a, const AttentionScratch& scratch) {
  const DecodeAttention args = arguments(m, row, a, scratch);
  if (attention_mma_fits(act, a.head_dim)) return attention_mma(s, act, out, qkv, kv, args, T, scratch.rows, false);
  switch (act) {
    case DType::f32: return run<float>(s, out, qkv, kv, args, T, scratch.rows);
    case DType::f16: return run<__half>(s, out, qkv, kv, args, T, scratch.rows);
    default: return run<__nv_bfloat16>(s, out, qkv, kv, args, T, scratch.rows);
  }
}

bool rope_attention_fits(DType act, const AttentionShape& a) { return attention_mma_fits(act, a.head_dim) && a.rope_dim % 16 == 0; }

void rope_attention_rows(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int T,
                         const AttentionShape& a, const AttentionScratch& scratch, const Ready& ready) {
  DecodeAttention args = arguments(m, 0, a, scratch);
  args.angles = angles, args.ready = ready;
  attention_mma(s, act, out, qkv, kv, args, T, scratch.rows, true);
}

}  // namespace codefuse::cuda
