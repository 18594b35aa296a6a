// Attention of single rows over their pages. Positions are taken in splits of 64 tokens aligned at 0, a split by one block, an
// equal part of it by each warp; softmax sums of the warps, then of the splits, are combined in order. So a row's result depends
// on its position alone, not on how many blocks share its splits. Any head_dim up to 256 that is a multiple of 8.
// K and V of a split are read into registers at once: those of earlier steps before the kernel waits for its predecessor, K of the next
// split when this one's scores are there, V when its parts are combined.
// With rope (FUSE) a row comes as the projection left it: a block rotates its Q, and whoever reads the split of the row's own position
// rotates K, stores K and V, and goes on with them from registers; no other row of the step may look at that position.
#include "cuda/kernels.h"
#include "cuda/rotate.cuh"

namespace codefuse::cuda {

namespace {

struct Args {
  StepMeta m;
  int row0, heads, kv_heads, head_dim, window, rope_dim;
  float scale;       // log2(e) / sqrt(head_dim)
  float* partial;    // [rows, heads, splits, head_dim + 2]: sum of p v, greatest score, sum of p
  int32_t* arrived;  // [rows, kv_heads]
  int splits;
  const float2* angles;  // [max_len, rope_dim / 2], FUSE; rope_dim a multiple of 16
  Ready ready;           // FUSE: of qkv
};

// 8 elements, 16 bytes at a time; not through L1, which could hold a line from before another kernel wrote to it
template <class T> struct Eight { uint4 raw[sizeof(T) / 2]; };
template <class T>
__device__ __forceinline__ Eight<T> load8(const T* p) {
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) v.raw[i] = __ldcg(reinterpret_cast<const uint4*>(p) + i);
  return v;
}
__device__ __forceinline__ void unpack(const Eight<float>& v, float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    f[4 * i] = __uint_as_float(v.raw[i].x), f[4 * i + 1] = __uint_as_float(v.raw[i].y);
    f[4 * i + 2] = __uint_as_float(v.raw[i].z), f[4 * i + 3] = __uint_as_float(v.raw[i].w);
  }
}
__device__ __forceinline__ float2 two(uint32_t u, __half) { return __half22float2(*reinterpret_cast<__half2*>(&u)); }
__device__ __forceinline__ float2 two(uint32_t u, __nv_bfloat16) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&u)); }
template <class T>
__device__ __forceinline__ void unpack(const Eight<T>& v, float (&f)[8]) {
  const uint32_t u[4] = {v.raw[0].x, v.raw[0].y, v.raw[0].z, v.raw[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 p = two(u[i], T());
    f[2 * i] = p.x, f[2 * i + 1] = p.y;
  }
}

// LANES lanes hold one token's head; a warp looks at 32 / LANES tokens at a time. HOLD: there are registers for V beside K. SINGLE: each KV
// head has one head of Q, which is kept. grid: (kv_heads, rows, blocks sharing splits)
template <class T, int LANES, int WARPS, bool HOLD, bool FUSE, bool SINGLE>
__global__ void __launch_bounds__(WARPS * 32, 16 / WARPS) attend_rows(T* __restrict__ out, const T* __restrict__ qkv, T* keys,
                                                                       T* values, const Args a) {
  static_assert(!FUSE || (HOLD && sizeof(T) == 2), "");
  constexpr int kTokens = kSplitTokens / WARPS, kRound = 32 / LANES, kRounds = kTokens / kRound;  // tokens of a warp, and at a time
  constexpr int kSame = LANES / kRounds;   // lanes that come to hold one token's score
  constexpr int kOwn = 8 / kRound;         // elements of the head that a lane comes to hold
  constexpr int kMerge = 16;               // splits combined at once
  __shared__ __align__(16) float sums[2][WARPS][LANES * 8];
  __shared__ float tops[2][WARPS], weights[2][WARPS];
  __shared__ int is_last;
  launch_dependents();
  const int row = a.row0 + blockIdx.y, kv_head = blockIdx.x, d = a.head_dim, group = SINGLE ? 1 : a.heads / a.kv_heads;
  const int last = a.m.position[row], first = a.window > 0 ? max(0, last - a.window + 1) : 0;
  const int first_split = first / kSplitTokens, splits = last / kSplitTokens - first_split + 1;
  const int each = (splits + gridDim.z - 1) / gridDim.z, share = (splits + each - 1) / each;  // blocks that have splits
  const bool is_first = blockIdx.x + blockIdx.y + blockIdx.z == 0;
  const bool early = FUSE && a.ready.counter;
  if (int(blockIdx.z) >= share || a.m.slot[row] < 0) {
    if (is_first) grid_wait();
    return;  // a block of this kernel waits, so it ends after its predecessors
  }
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

  const int pairs = a.rope_dim / 2, partner = at < pairs ? at + pairs : at - pairs, stored = FUSE ? last : last + 1;  // end of what is read from pages
  float2 angle[8];
  if (FUSE && at < a.rope_dim) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float4 two = __ldg(reinterpret_cast<const float4*>(a.angles + int64_t(last) * pairs + min(at, partner) + i));
      angle[i] = make_float2(two.x, two.y), angle[i + 1] = make_float2(two.z, two.w);
    }
  }
  // the lane's part of a head of Q or K, rotated
  const auto turned = [&](const T* head) {
    Eight<T> own = load8(head + at);
    if constexpr (FUSE) {
      if (at < a.rope_dim) {
        float x[8], y[8];
        unpack(load8(head + partner), y);
        unpack(own, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = at < pairs ? rotate_first(x[i], y[i], angle[i]) : rotate_second(y[i], x[i], angle[i]);
        own.raw[0] = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
      }
    }
    return own;
  };

  Eight<T> k[kRounds] = {}, v[kRounds] = {}, own_k = {}, own_v = {};
  int split = blockIdx.z, page = page_of(split), buffer = 0;
  load(k, keys, split, page, first, min(settled, stored));
  if (HOLD) load(v, values, split, page, first, min(settled, stored));
  if (early) {
    if (threadIdx.x == 0) {
      int32_t stored = 0;
      while (true) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(stored) : "l"(a.ready.counter) : "memory");
        if (stored >= a.ready.expected) break;
        __nanosleep(32);
      }
    }
    __syncthreads();
  } else {
    grid_wait();
  }
  load(k, keys, split, page, max(first, settled), stored);
  if (HOLD) load(v, values, split, page, max(first, settled), stored);
  const int own_token = (splits - 1) % share == int(blockIdx.z) && last - token_of(splits - 1) < kTokens ? last - token_of(splits - 1) : -1;  // the warp's
  if (FUSE && own_token >= 0 && active) {
    own_k = turned(qkv + (a.heads + kv_head) * d);
    own_v = load8(qkv + (a.heads + a.kv_heads + kv_head) * d + at);
    if (lane / LANES == own_token % kRound) {
      const int64_t to = ((int64_t(page_of(splits - 1)) * a.kv_heads + kv_head) * kPageTokens + last % kPageTokens) * d + at;
      *reinterpret_cast<uint4*>(keys + to) = own_k.raw[0];
      *reinterpret_cast<uint4*>(values + to) = own_v.raw[0];
    }
  }
  const auto put_own = [&](Eight<T>(&to)[kRounds], const Eight<T>& own, int split) {
    if (!FUSE || split != splits - 1 || own_token < 0) return;
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
      if (lane / LANES + r * kRound == own_token) to[r] = own;
  };
  Eight<T> own_q = {};
  if (SINGLE && active) own_q = turned(qkv + kv_head * d);
  put_own(k, own_k, split);
  put_own(v, own_v, split);

  for (; split < splits; split += share) {
    const int next_page = page_of(split + share);
    const int mine = token_of(split) + lane % LANES / kSame * kRound + lane / LANES;  // whose score this lane comes to hold
    for (int h = 0; h < group; ++h, buffer ^= 1) {
      float q[8] = {}, z[kRounds];
      if (active) unpack(SINGLE ? own_q : turned(qkv + (kv_head * group + h) * d), q);
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
      if (goes_on) {
        load(k, keys, split + share, next_page, first, stored);
        put_own(k, own_k, split + share);
      }
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
        load(v, values, split + share, next_page, first, stored);
        put_own(v, own_v, split + share);
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
  const auto leave = [&] {
    if (early && is_first) grid_wait();
  };
  if (splits == 1) return leave();
  if (share > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t* arrived = a.arrived + blockIdx.y * a.kv_heads + kv_head;
      is_last = atomicAdd(arrived, 1) == share - 1;
      if (is_last) *arrived = 0;
    }
    __syncthreads();
    if (!is_last) return leave();
    __threadfence();
  } else {
    __syncthreads();
  }
  for (int i = threadIdx.x; i < group * d; i += WARPS * 32) {
    const int h = i / d, e = i % d;
    const float* p = partial + int64_t(h) * a.splits * (d + 2);
    float most = -INFINITY, sum = 0.f, total = 0.f;
    for (int s0 = 0; s0 < splits; s0 += kMerge) {
      float value[kMerge];
      float2 part[kMerge];
#pragma unroll
      for (int j = 0; j < kMerge; ++j) {
        const bool there = s0 + j < splits;
        value[j] = there ? __ldcg(p + int64_t(s0 + j) * (d + 2) + e) : 0.f;
        part[j] = there ? __ldcg(reinterpret_cast<const float2*>(p + int64_t(s0 + j) * (d + 2) + d)) : make_float2(-INFINITY, 0.f);
      }
      float top = most;
#pragma unroll
      for (int j = 0; j < kMerge; ++j) top = fmaxf(top, part[j].x);
      const float before = exp2f(most - top);
      sum *= before, total *= before, most = top;
#pragma unroll
      for (int j = 0; j < kMerge; ++j) {
        const float scale = exp2f(part[j].x - top);
        sum = fmaf(scale, value[j], sum);
        total = fmaf(scale, part[j].y, total);
      }
    }
    out[i] = from_float<T>(sum / total);
  }
  leave();
}

template <class T>
void run(const Stream& s, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int row, int rows, const AttentionShape& a, const AttentionScratch& scratch,
         bool fuse, const float2* angles, const Ready& ready) {
  Args args{m, row, a.heads, a.kv_heads, a.head_dim, a.window, a.rope_dim, 1.44269504088896341f / sqrtf(float(a.head_dim)), scratch.partial, scratch.arrived, scratch.splits, angles, ready};
  constexpr bool f32 = sizeof(T) == 4;
  // so that K and V of a split are 64 registers
  auto kernel = a.head_dim <= 64    ? attend_rows<T, 8, 4, true, false, false>
                : a.head_dim <= 128 ? attend_rows<T, 16, f32 ? 8 : 4, true, false, false>
                                    : attend_rows<T, 32, 8, !f32, false, false>;
  if constexpr (!f32) {  // wider heads have no registers left for it
    if (fuse && a.heads == a.kv_heads)
      kernel = a.head_dim <= 64 ? attend_rows<T, 8, 4, true, true, true> : attend_rows<T, 16, 4, true, true, true>;
    else if (fuse)
      kernel = a.head_dim <= 64 ? attend_rows<T, 8, 4, true, true, false> : attend_rows<T, 16, 4, true, true, false>;
  }
  const int threads = a.head_dim > 128 || (f32 && a.head_dim > 64) ? 256 : 128;
  for (; args.row0 < row + rows; args.row0 += scratch.rows) {
    const int count = std::min(scratch.rows, row + rows - args.row0), heads = a.kv_heads * count;
    // few rows: one wave of blocks, so that the next kernel can start; a block without a split ends at once
    const int waves = ready.counter && rows <= 8 ? 1 : heads <= s.sms ? 2 : 6;
    const int share = std::max(1, std::min(scratch.splits, waves * s.sms / heads));
    launch(s, kernel, dim3(a.kv_heads, count, share), threads, 0, static_cast<T*>(out), static_cast<const T*>(qkv), static_cast<T*>(kv.k),
           static_cast<T*>(kv.v), args);
    args.ready = {};  // the next launch has the scratch of this one, and so waits for its end
  }
}

}  // namespace

void attention_rows(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int row, int T,
                    const AttentionShape& a, const AttentionScratch& scratch) {
  if (act == DType::f32) return run<float>(s, out, qkv, kv, m, row, T, a, scratch, false, nullptr, {});
  act == DType::f16 ? run<__half>(s, out, qkv, kv, m, row, T, a, scratch, false, nullptr, {}) : run<__nv_bfloat16>(s, out, qkv, kv, m, row, T, a, scratch, false, nullptr, {});
}

bool rope_attention_fits(DType act, const AttentionShape& a) { return act != DType::f32 && a.rope_dim % 16 == 0 && a.head_dim <= 128; }

void rope_attention_rows(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int T,
                         const AttentionShape& a, const AttentionScratch& scratch, const Ready& ready) {
  act == DType::f16 ? run<__half>(s, out, qkv, kv, m, 0, T, a, scratch, true, angles, ready) : run<__nv_bfloat16>(s, out, qkv, kv, m, 0, T, a, scratch, true, angles, ready);
}

}  // namespace codefuse::cuda
