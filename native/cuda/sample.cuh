// What the passes of sampling share: sample.cu chooses tokens, sample_rows.cu makes edited rows and finds the most likely tokens.
#pragma once
#include "cuda/kernels.h"
#include "ops/sampling_rule.h"

namespace codefuse::cuda::sampling {

static_assert(kSampleParts == 32, "one warp combines the parts");
constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kEach = 10;                        // logits of a part in a thread's registers
constexpr int kDigits = 3, kBins = kSampleBins;  // of a key: 11, 11 and 10 bits
using U64 = unsigned long long;

struct Args {
  const float* logits;  // [S, V]
  int vocab;
  bool edited;
  StepMeta m;
  SampleScratch scratch;
};

__device__ __forceinline__ int slot_of(const Args& a, int s) { return a.m.slot[a.m.logit_row[s]]; }
__device__ __forceinline__ bool is_edited(const Args& a, int s) {
  return a.edited && (a.m.mask_of[s] >= 0 || a.m.edit_begin[s] < a.m.edit_begin[s + 1]);
}
// The logits that the token of sample s is chosen from.
__device__ __forceinline__ const float* row_of(const Args& a, int s) { return (is_edited(a, s) ? a.scratch.edited : a.logits) + int64_t(s) * a.vocab; }
__device__ __forceinline__ bool by_count(const SampleParams& p, int vocab) { return p.top_k > 0 && p.top_k < vocab; }
__device__ __forceinline__ bool by_mass(const SampleParams& p) { return p.top_p < 1.f; }

// Where what sample s becomes goes.
struct Goal {
  int slot;
  StepResults* results;
  __device__ __forceinline__ Goal(const Args& a, int s) : slot(slot_of(a, s)), results(*a.m.results) {}
};
// logit: the token's in the raw row; top: SampleScratch::top
__device__ __forceinline__ void give(const Args& a, int s, const Goal& to, int token, float logit, float2 top) {
  to.results->token[s] = token;
  to.results->logprob[s] = logit - top.x - top.y;
  a.m.last_token[to.slot] = token;
}

// greater key first, then the lower id
__device__ __forceinline__ U64 ranked(uint32_t key, int id) { return U64(key) << 32 | uint32_t(~id); }
__device__ __forceinline__ int id_of(U64 ranked) { return int(~uint32_t(ranked)); }
__device__ __forceinline__ float logit_of(U64 ranked) { return rule::float_of_key(uint32_t(ranked >> 32)); }

__device__ __forceinline__ U64 block_max(U64 v, U64* parts /*[kWarps]*/) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v = max(v, __shfl_xor_sync(~0u, v, o));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = parts[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) v = max(v, parts[i]);
  return v;
}

// True in every thread of the last of a row's blocks to arrive; it sees what the others wrote.
__device__ __forceinline__ bool last_to_arrive(const Args& a, int s) {
  __shared__ int is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(a.scratch.arrived + s, 1) == int(gridDim.x) - 1;
    if (is_last) a.scratch.arrived[s] = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

__device__ __forceinline__ int begin_of(int64_t n) { return int(n * blockIdx.x / gridDim.x); }
__device__ __forceinline__ int end_of(int64_t n) { return int(n * (blockIdx.x + 1) / gridDim.x); }

// The greatest logit of the row is known: the choice begins. True for a greedy sample, which is this token.
__device__ __forceinline__ bool start(const Args& a, int s, const SampleParams& p, int token, float most) {
  a.scratch.most[s] = most;
  a.scratch.token[s] = token;
  SampleSelect select{};
  select.threshold = 1;  // everything but NaN
  select.digits = by_count(p, a.vocab) || by_mass(p) ? 0 : kDigits;
  a.scratch.select[s] = select;
  return !(p.temperature > 0.f);
}

// Both after the raw rows' greatest logits are known; S samples.
void edit_rows(const Stream& s, const Args& a, int S);   // makes the edited rows, finds their greatest logits and starts their choice
void top_tokens(const Stream& s, const Args& a, int S);  // of the rows that report them

}  // namespace codefuse::cuda::sampling
