// Sampling by the rule of native/cpu/sample.cc, whose order-dependent sums are integers here too. The greatest logit and the sum of
// the exponentials come from 32 blocks a row; what a temperature adds, from one block a row.
#include "cuda/kernels.h"
#include "ops/sampling_rule.h"

namespace codefuse::cuda {

namespace {

static_assert(kSampleParts == 32, "one warp combines the parts");
constexpr int kThreads = 256;          // of row_top
constexpr int kChooseThreads = 1024;   // of choose
constexpr int kChooseWarps = kChooseThreads / 32;
using U64 = unsigned long long;

struct Args {
  const float* logits;  // [S, V]
  int vocab;
  StepMeta m;
  SampleScratch scratch;
};

__device__ __forceinline__ int slot_of(const Args& a, int s) { return a.m.slot[a.m.logit_row[s]]; }

__device__ __forceinline__ void give(const Args& a, int s, int token) {
  const float2 top = a.scratch.top[s];
  a.scratch.token[s] = token;
  a.scratch.logprob[s] = a.logits[int64_t(s) * a.vocab + token] - top.x - top.y;
  a.m.last_token[slot_of(a, s)] = token;
}

// greater key first, then the lower id
__device__ __forceinline__ U64 ranked(uint32_t key, int id) { return U64(key) << 32 | uint32_t(~id); }
__device__ __forceinline__ int id_of(U64 ranked) { return int(~uint32_t(ranked)); }

template <int WARPS>
__device__ __forceinline__ U64 block_max(U64 v, U64* parts /*[WARPS]*/) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v = max(v, __shfl_xor_sync(~0u, v, o));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = parts[0];
  for (int i = 1; i < WARPS; ++i) v = max(v, parts[i]);
  return v;
}

template <int WARPS>
__device__ __forceinline__ U64 block_sum(U64 v, U64* parts /*[WARPS]*/) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
  for (int i = 0; i < WARPS; ++i) v += parts[i];
  return v;
}

// exp(x - m), 0 for a row of -inf
__device__ __forceinline__ float weight_of(float x, float m) { return m == -INFINITY ? 0.f : expf(x - m); }

// grid (parts, S)
__global__ void __launch_bounds__(kThreads) row_top(const Args a) {
  __shared__ U64 keys[kThreads / 32];
  __shared__ float sums[kThreads / 32];
  __shared__ int is_last;
  launch_dependents();
  grid_wait();
  const int s = blockIdx.y;
  if (slot_of(a, s) < 0) return;
  const float* row = a.logits + int64_t(s) * a.vocab;
  const int begin = int(int64_t(a.vocab) * blockIdx.x / gridDim.x), end = int(int64_t(a.vocab) * (blockIdx.x + 1) / gridDim.x);
  U64 best = 0;
#pragma unroll 8
  for (int i = begin + threadIdx.x; i < end; i += kThreads) best = max(best, ranked(rule::order_key(row[i]), i));
  best = block_max<kThreads / 32>(best, keys);
  const float m = best ? row[id_of(best)] : 0.f;  // 0: a part without tokens
  float sum = 0.f;
#pragma unroll 8
  for (int i = begin + threadIdx.x; i < end; i += kThreads) sum += weight_of(row[i], m);
#pragma unroll
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.f;
    for (int i = 0; i < kThreads / 32; ++i) sum += sums[i];
    __stcg(a.scratch.best + s * kSampleParts + blockIdx.x, best);
    __stcg(a.scratch.sum + s * kSampleParts + blockIdx.x, sum);
    __threadfence();
    is_last = atomicAdd(a.scratch.arrived + s, 1) == int(gridDim.x) - 1;
    if (is_last) a.scratch.arrived[s] = 0;
  }
  __syncthreads();
  if (!is_last || threadIdx.x >= kSampleParts) return;
  __threadfence();
  const U64 part = __ldcg(a.scratch.best + s * kSampleParts + threadIdx.x);
  best = part;
#pragma unroll
  for (int o = 16; o > 0; o /= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
  const float most = row[id_of(best)];
  double total = part ? double(__ldcg(a.scratch.sum + s * kSampleParts + threadIdx.x)) * double(weight_of(row[id_of(part)], most)) : 0.0;
#pragma unroll
  for (int o = 16; o > 0; o /= 2) total += __shfl_xor_sync(~0u, total, o);
  if (threadIdx.x == 0) {
    a.scratch.top[s] = make_float2(most, float(log(total)));
    a.scratch.token[s] = id_of(best);
    if (!(a.m.sample[s].temperature > 0.f)) give(a, s, id_of(best));
  }
}

// The greatest key t such that the tokens with key >= t have at least `need`, digit by digit from the top. value(i, key): the
// token's part. Each warp has its own histogram: lanes with the same digit are added first, so nothing is added twice at once.
template <class Value>
__device__ uint32_t select_key(const float* row, int n, U64 need, U64* bins /*[kChooseWarps, 256]*/, Value value) {
  __shared__ U64 chosen_need;
  __shared__ int chosen_digit;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kChooseWarps * 256; i += kChooseThreads) bins[i] = 0;
    __syncthreads();
    for (int i0 = warp * 32; i0 < n; i0 += kChooseThreads) {
      const int i = i0 + lane;
      U64 v = 0;
      uint32_t key = 0;
      if (i < n) {
        key = rule::order_key(row[i]);
        if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) v = value(i, key);
      }
      const unsigned live = __ballot_sync(~0u, v != 0);
      if (v != 0) {
        const int digit = key >> shift & 255;
        const unsigned peers = __match_any_sync(live, digit);
        // a part is at most 2^40: its halves of 20 bits, added over 32 lanes, fit 32 bits
        const U64 sum = U64(__reduce_add_sync(peers, uint32_t(v & 0xfffff))) + (U64(__reduce_add_sync(peers, uint32_t(v >> 20))) << 20);
        if (lane == __ffs(peers) - 1) bins[warp * 256 + digit] += sum;
      }
      __syncwarp();
    }
    __syncthreads();
    if (threadIdx.x < 256) {
      U64 sum = 0;
      for (int w = 0; w < kChooseWarps; ++w) sum += bins[w * 256 + threadIdx.x];
      bins[threadIdx.x] = sum;  // this thread's own column
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      while (digit > 0 && bins[digit] < need) need -= bins[digit--];
      chosen_need = need, chosen_digit = digit;
    }
    __syncthreads();
    need = chosen_need;
    prefix |= uint32_t(chosen_digit) << shift;
    __syncthreads();
  }
  return prefix;
}

// grid (S)
__global__ void __launch_bounds__(kChooseThreads) choose(const Args a) {
  extern __shared__ __align__(16) unsigned char smem[];
  U64* const bins = reinterpret_cast<U64*>(smem);
  __shared__ U64 parts[kChooseWarps];
  launch_dependents();
  grid_wait();
  const int s = blockIdx.x;
  if (slot_of(a, s) < 0) return;
  const SampleParams p = a.m.sample[s];
  if (!(p.temperature > 0.f)) return;
  const int n = a.vocab;
  const float* row = a.logits + int64_t(s) * n;
  const float m = a.scratch.top[s].x;
  auto distance = [&](int i) { return rule::div(rule::add(row[i], -m), p.temperature); };
  uint32_t t = 1;  // everything but NaN
  if (p.top_k > 0 && p.top_k < n) t = max(t, select_key(row, n, U64(p.top_k), bins, [](int, uint32_t) { return U64(1); }));
  if (p.top_p < 1.f) {
    auto mass = [&](int i, uint32_t key) { return key >= t ? U64(rule::mass_of(rule::exp_of(distance(i)))) : U64(0); };
    U64 total = 0;
    for (int i = threadIdx.x; i < n; i += kChooseThreads) total += mass(i, rule::order_key(row[i]));
    total = block_sum<kChooseWarps>(total, parts);
    t = max(t, select_key(row, n, rule::mass_needed(p.top_p, total), bins, mass));
  }
  const int position = a.m.position[a.m.logit_row[s]] + 1;
  U64 best = 0;
  for (int group = threadIdx.x; group * 4 < n; group += kChooseThreads) {
    float d[4], noise[4];
    bool kept[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = group * 4 + j;
      kept[j] = i < n && rule::order_key(row[i]) >= t;
      d[j] = kept[j] ? distance(i) : 0.f;
      kept[j] = kept[j] && rule::exp_of(d[j]) >= p.min_p;
    }
    if (!(kept[0] || kept[1] || kept[2] || kept[3])) continue;
    rule::gumbel4(p.seed, position, group, noise);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (kept[j]) {
        const uint32_t key = rule::order_key(rule::add(d[j], noise[j]));
        if (key) best = max(best, ranked(key, group * 4 + j));
      }
  }
  best = block_max<kChooseWarps>(best, parts);
  if (threadIdx.x == 0) give(a, s, best ? id_of(best) : a.scratch.token[s]);  // no score that is a number: the greatest logit
}

}  // namespace

void sample(const Stream& s, const float* logits, int vocab, int S, bool general, const StepMeta& m, const SampleScratch& scratch) {
  const Args a{logits, vocab, m, scratch};
  launch(s, row_top, dim3(kSampleParts, S), kThreads, 0, a);
  if (general) launch(s, choose, S, kChooseThreads, kChooseWarps * 256 * sizeof(U64), a);
}

}  // namespace codefuse::cuda
