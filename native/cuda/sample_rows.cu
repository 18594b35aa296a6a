// Rows of logits beside the choice of tokens: with edits and masks applied, and their most likely tokens.
#include "cuda/sample.cuh"

namespace codefuse::cuda::sampling {

namespace {

// Makes the edited rows and finds their greatest logits. grid (kSampleParts, S)
__global__ void __launch_bounds__(kThreads) edit_kernel(const Args a) {
  __shared__ U64 keys[kWarps];
  launch_dependents();
  grid_wait();
  const int s = blockIdx.y, n = a.vocab;
  if (slot_of(a, s) < 0 || !is_edited(a, s)) return;
  const float* raw = a.logits + int64_t(s) * n;
  float* row = a.scratch.edited + int64_t(s) * n;
  const int begin = begin_of(n), end = end_of(n), mask = a.m.mask_of[s], last = a.m.edit_begin[s + 1];
  const uint32_t* allowed = mask < 0 ? nullptr : a.m.masks + int64_t(mask) * mask_words(n);
  const auto put = [&](int token, float logit) { row[token] = !allowed || rule::allows(allowed, token) ? logit : rule::float_of(0x7fffffffu); };
  for (int i = begin + threadIdx.x; i < end; i += kThreads) put(i, raw[i]);
  __syncthreads();
  for (int i = a.m.edit_begin[s] + threadIdx.x; i < last; i += kThreads) {
    const LogitEdit e = a.m.edits[i];
    if (e.token >= begin && e.token < end) put(e.token, rule::edited(raw[e.token], e.add, e.penalty));
  }
  __syncthreads();
  U64 best = 0;
  for (int i = begin + threadIdx.x; i < end; i += kThreads) best = max(best, ranked(rule::order_key(row[i]), i));
  best = block_max(best, keys);
  if (threadIdx.x == 0) __stcg(a.scratch.best + s * kSampleParts + blockIdx.x, best);
  if (!last_to_arrive(a, s) || threadIdx.x >= kSampleParts) return;
  best = __ldcg(a.scratch.best + s * kSampleParts + threadIdx.x);
#pragma unroll
  for (int o = 16; o > 0; o /= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
  if (threadIdx.x == 0 && start(a, s, a.m.sample[s], id_of(best), logit_of(best)))
    give(a, s, Goal(a, s), id_of(best), a.logits[int64_t(s) * n + id_of(best)], a.scratch.top[s]);
}

// The most likely tokens of the rows that report them: those of each part, then of all parts. grid (kSampleParts, S)
__global__ void __launch_bounds__(kThreads) top_kernel(const Args a) {
  __shared__ U64 keys[kWarps];
  launch_dependents();
  grid_wait();
  const int s = blockIdx.y, n = a.vocab;
  if (slot_of(a, s) < 0) return;
  const int k = a.m.sample[s].top_tokens;
  if (k == 0) return;
  const float* row = a.m.sample[s].top_edited ? row_of(a, s) : a.logits + int64_t(s) * n;
  U64* const parts = a.scratch.top_part + s * kSampleParts * kTopTokens;
  const int end = end_of(n);
  U64 own[kEach], last = ~U64(0);
  const int begin = begin_of(n) + threadIdx.x;
  const auto load = [&](int i0) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) own[j] = i0 + j * kThreads < end ? ranked(rule::order_key(row[i0 + j * kThreads]), i0 + j * kThreads) : 0;
  };
  load(begin);
  const bool fits = end - begin_of(n) <= kEach * kThreads;
  for (int r = 0; r < k; ++r) {
    U64 best = 0;
    for (int i0 = begin; i0 < end; i0 += kEach * kThreads) {
      if (!fits) load(i0);
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        if (own[j] < last) best = max(best, own[j]);
    }
    last = block_max(best, keys);
    if (threadIdx.x == 0) __stcg(parts + blockIdx.x * kTopTokens + r, last);
  }
  if (!last_to_arrive(a, s)) return;
  constexpr int kCandidates = kSampleParts * kTopTokens / kThreads;  // of a thread
  static_assert(kCandidates <= kEach && kCandidates * kThreads == kSampleParts * kTopTokens);
#pragma unroll
  for (int j = 0; j < kCandidates; ++j) {
    const int i = threadIdx.x + j * kThreads;
    own[j] = i % kTopTokens < k ? __ldcg(parts + i) : 0;
  }
  const float2 top = a.scratch.top[s];
  StepResults* const results = *a.m.results;
  last = ~U64(0);
  for (int r = 0; r < k; ++r) {
    U64 best = 0;
#pragma unroll
    for (int j = 0; j < kCandidates; ++j)
      if (own[j] < last) best = max(best, own[j]);
    last = block_max(best, keys);
    if (threadIdx.x != 0) continue;
    const int id = last ? id_of(last) : -1;
    results->top_token[s * kTopTokens + r] = id;
    results->top_logprob[s * kTopTokens + r] = id < 0 ? 0.f : row[id] - top.x - top.y;
  }
}

}  // namespace

void edit_rows(const Stream& s, const Args& a, int S) { launch(s, edit_kernel, dim3(kSampleParts, S), kThreads, 0, a); }
void top_tokens(const Stream& s, const Args& a, int S) { launch(s, top_kernel, dim3(kSampleParts, S), kThreads, 0, a); }

}  // namespace codefuse::cuda::sampling
