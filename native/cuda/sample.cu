// Sampling by the rule of native/cpu/sample.cc, whose order-dependent sums are integers here too. Every pass over a row is shared by
// many blocks, and the last to arrive goes on with what all found: the greatest logit and the sum of the exponentials; for a row with
// edits or a mask a changed copy and its greatest logit; for top_k and top_p the threshold, by three digits of its key, greatest
// first, from histograms of counts and masses; then the greatest d + noise. A row takes only the passes that its parameters ask for.
#include "cuda/sample.cuh"

namespace codefuse::cuda {

namespace {

using namespace sampling;

constexpr int kOwnBins = kBins / kThreads;

__device__ __forceinline__ U64 block_sum(U64 v, U64* parts /*[kWarps]*/) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v += parts[i];
  return v;
}

// exp(x - m), 0 for a row of -inf
__device__ __forceinline__ float weight_of(float x, float m) { return m == -INFINITY ? 0.f : expf(x - m); }

// grid (kSampleParts, S)
__global__ void __launch_bounds__(kThreads) row_top(const Args a) {
  __shared__ U64 keys[kWarps];
  __shared__ float sums[kWarps];
  launch_dependents();
  grid_wait();
  const int s = blockIdx.y;
  const Goal to(a, s);
  if (to.slot < 0) return;
  const SampleParams p = a.m.sample[s];  // what is needed last is asked for first
  const float* row = a.logits + int64_t(s) * a.vocab;
  const int begin = begin_of(a.vocab), end = end_of(a.vocab);
  float v[kEach];
  const auto load = [&](int i0) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) v[j] = i0 + j * kThreads < end ? row[i0 + j * kThreads] : 0.f;
  };
  U64 best = 0;
  for (int i0 = begin + threadIdx.x; i0 < end; i0 += kEach * kThreads) {
    load(i0);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (i0 + j * kThreads < end) best = max(best, ranked(rule::order_key(v[j]), i0 + j * kThreads));
  }
  best = block_max(best, keys);
  const float m = best ? logit_of(best) : 0.f;  // 0: a part without tokens
  float sum = 0.f;
  for (int i0 = begin + threadIdx.x; i0 < end; i0 += kEach * kThreads) {
    if (end - begin > kEach * kThreads) load(i0);
#pragma unroll
    for (int j = 0; j < kEach; ++j) sum += i0 + j * kThreads < end ? weight_of(v[j], m) : 0.f;
  }
#pragma unroll
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += sums[i];
    __stcg(a.scratch.best + s * kSampleParts + blockIdx.x, best);
    __stcg(a.scratch.sum + s * kSampleParts + blockIdx.x, sum);
  }
  if (!last_to_arrive(a, s) || threadIdx.x >= kSampleParts) return;
  const U64 part = __ldcg(a.scratch.best + s * kSampleParts + threadIdx.x);
  const float part_sum = __ldcg(a.scratch.sum + s * kSampleParts + threadIdx.x), part_top = part ? logit_of(part) : 0.f;
  best = part;
#pragma unroll
  for (int o = 16; o > 0; o /= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
  const float most = logit_of(best);
  double total = part ? double(part_sum) * double(weight_of(part_top, most)) : 0.0;
#pragma unroll
  for (int o = 16; o > 0; o /= 2) total += __shfl_xor_sync(~0u, total, o);
  if (threadIdx.x == 0) {
    const float2 top = make_float2(most, float(log(total)));
    a.scratch.top[s] = top;
    if (!is_edited(a, s) && start(a, s, p, id_of(best), most)) give(a, s, to, id_of(best), most, top);
  }
}

__device__ __forceinline__ int shift_of(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }
__device__ __forceinline__ int bins_of(int digit) { return digit == 2 ? 1024 : 2048; }

struct Digit {
  int digit;
  U64 need;  // that the digit's own bin still has to give
};

// The greatest digit whose bin and those above it have at least `need`. Thread t has bins kBins - 1 - kOwnBins t and below.
__device__ Digit find_digit(const U64 (&bin)[kOwnBins], U64 need, int bins, U64* parts /*[kWarps]*/) {
  __shared__ Digit found;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  U64 own = 0;
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) own += bin[i];
  U64 above = own;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const U64 other = __shfl_up_sync(~0u, above, o);
    if (lane >= o) above += other;
  }
  __syncthreads();
  if (lane == 31) parts[warp] = above;
  if (threadIdx.x == 0) found = need == 0 ? Digit{bins - 1, 0} : Digit{0, need};
  __syncthreads();
  above -= own;
  for (int i = 0; i < warp; ++i) above += parts[i];
  if (above < need && need <= above + own) {
    int digit = kBins - 1 - int(threadIdx.x) * kOwnBins;
#pragma unroll
    for (int i = 0; i < kOwnBins - 1; ++i) {
      if (above + bin[i] >= need) break;
      above += bin[i], --digit;
    }
    found = Digit{digit, need - above};
  }
  __syncthreads();
  return found;
}

// One more digit of the threshold of the rows that are at digit 0 (FIRST) or past it. grid (parts, S)
template <bool FIRST>
__global__ void __launch_bounds__(kThreads, 2) next_digit(const Args a) {
  __shared__ uint32_t count[kBins], low[kBins], high[kBins];
  __shared__ U64 parts[kWarps];
  launch_dependents();
  grid_wait();
  const int s = blockIdx.y, n = a.vocab;
  if (slot_of(a, s) < 0) return;
  const SampleParams p = a.m.sample[s];
  SampleSelect at = a.scratch.select[s];
  if (!(p.temperature > 0.f) || (FIRST ? at.digits != 0 : at.digits == 0 || at.digits == kDigits)) return;
  const bool counts = by_count(p, n) && !at.by_mass, masses = by_mass(p);
  const int shift = shift_of(at.digits), bins = bins_of(at.digits), before = FIRST ? 0 : shift_of(at.digits - 1);
  for (int i = threadIdx.x; i < kBins; i += kThreads) count[i] = low[i] = high[i] = 0;
  __syncthreads();
  const float* row = row_of(a, s);
  const float m = a.scratch.most[s];
  const int end = end_of(n);
  for (int i0 = begin_of(n) + threadIdx.x; i0 < end; i0 += kEach * kThreads) {
    float v[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) v[j] = i0 + j * kThreads < end ? row[i0 + j * kThreads] : 0.f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const uint32_t key = rule::order_key(v[j]);
      if (i0 + j * kThreads >= end || (!FIRST && (key ^ at.prefix) >> before != 0)) continue;
      const int digit = key >> shift & (bins - 1);
      if (counts) atomicAdd(count + digit, 1u);
      if (masses) {
        const U64 mass = rule::mass_of(rule::exp_of(rule::div(rule::add(v[j], -m), p.temperature)));
        if (mass == 0) continue;
        const uint32_t old = atomicAdd(low + digit, uint32_t(mass)), carry = old + uint32_t(mass) < old;
        if (uint32_t(mass >> 32) + carry) atomicAdd(high + digit, uint32_t(mass >> 32) + carry);
      }
    }
  }
  __syncthreads();
  uint32_t* const row_count = a.scratch.count + ((FIRST ? 0 : kDecodeRows) + s) * kBins;
  U64* const row_mass = a.scratch.mass + ((FIRST ? 0 : kDecodeRows) + s) * kBins;
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (count[i]) atomicAdd(row_count + i, count[i]);
    const U64 mass = U64(high[i]) << 32 | low[i];
    if (mass) atomicAdd(row_mass + i, mass);
  }
  if (!last_to_arrive(a, s)) return;

  U64 bin[kOwnBins], mass[kOwnBins];
  const int top_bin = kBins - 1 - int(threadIdx.x) * kOwnBins;
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) {
    mass[i] = __ldcg(row_mass + top_bin - i);
    bin[i] = counts ? __ldcg(row_count + top_bin - i) : mass[i];
  }
  if (!FIRST)
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) __stcg(row_count + top_bin - i, 0u), __stcg(row_mass + top_bin - i, U64(0));
  const auto total_from = [&](int digit) {  // mass of the bins from digit up
    U64 sum = 0;
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) sum += top_bin - i >= digit ? mass[i] : 0;
    return block_sum(sum, parts);
  };
  if (FIRST) {
    at.by_mass = !counts;
    at.need = counts ? U64(p.top_k) : rule::mass_needed(p.top_p, total_from(0));
  }
  Digit d = find_digit(bin, at.need, bins, parts);
  at.prefix |= uint32_t(d.digit) << shift;
  at.need = d.need;
  ++at.digits;
  if (counts && masses) at.above += total_from(d.digit + (at.digits < kDigits));
  if (at.digits == kDigits) {
    at.threshold = max(1u, at.prefix);
    if (!at.by_mass && masses) {  // top_p of what top_k has left: its first digit is in the first histogram
#pragma unroll
      for (int i = 0; i < kOwnBins; ++i) bin[i] = __ldcg(a.scratch.mass + s * kBins + top_bin - i);
      d = find_digit(bin, rule::mass_needed(p.top_p, at.above), kBins, parts);
      at.need = d.need;
      at.prefix = uint32_t(d.digit) << shift_of(0);
      at.digits = 1;
      at.by_mass = 1;
    }
  }
  if (threadIdx.x == 0) a.scratch.select[s] = at;
}

// grid (parts, S)
__global__ void __launch_bounds__(kThreads) choose(const Args a) {
  __shared__ U64 parts[kWarps];
  launch_dependents();
  grid_wait();
  const int s = blockIdx.y;
  if (slot_of(a, s) < 0) return;
  const SampleParams p = a.m.sample[s];
  if (!(p.temperature > 0.f)) return;
  const int n = a.vocab, groups = (n + 3) / 4, end = end_of(groups);
  if (by_count(p, n) || by_mass(p))  // the first histogram is done with
    for (int i = begin_of(kBins) + threadIdx.x; i < end_of(kBins); i += kThreads)
      a.scratch.count[s * kBins + i] = 0, a.scratch.mass[s * kBins + i] = 0;
  const float* row = row_of(a, s);
  const float m = a.scratch.most[s];
  const uint32_t t = a.scratch.select[s].threshold;
  const int position = a.m.position[a.m.logit_row[s]] + 1;
  U64 best = 0;
  for (int group = begin_of(groups) + threadIdx.x; group < end; group += kThreads) {
    float x[4], d[4], noise[4];
    bool kept[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = group * 4 + j < n ? row[group * 4 + j] : 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      kept[j] = group * 4 + j < n && rule::order_key(x[j]) >= t;
      d[j] = kept[j] ? rule::div(rule::add(x[j], -m), p.temperature) : 0.f;
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
  best = block_max(best, parts);
  if (threadIdx.x == 0) __stcg(a.scratch.best + s * kSampleParts + blockIdx.x, best);
  if (!last_to_arrive(a, s) || threadIdx.x >= 32) return;
  best = threadIdx.x < gridDim.x ? __ldcg(a.scratch.best + s * kSampleParts + threadIdx.x) : 0;
#pragma unroll
  for (int o = 16; o > 0; o /= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
  if (threadIdx.x != 0) return;
  const int token = best ? id_of(best) : a.scratch.token[s];  // no score that is a number: the greatest logit
  give(a, s, Goal(a, s), token, a.logits[int64_t(s) * n + token], a.scratch.top[s]);
}

}  // namespace

void sample(const Stream& s, const float* logits, int vocab, int S, const SamplingPasses& passes, const StepMeta& m, const SampleScratch& scratch) {
  const Args a{logits, vocab, passes.edited, m, scratch};
  const Sampling kind = passes.kind;
  launch(s, row_top, dim3(kSampleParts, S), kThreads, 0, a);
  if (passes.edited) edit_rows(s, a, S);
  if (passes.top) top_tokens(s, a, S);
  if (kind == Sampling::greedy) return;
  const dim3 grid(std::clamp(4 * s.sms / S, 8, kSampleParts), S);  // integers: the number of parts changes nothing
  if (kind != Sampling::temperature) {
    launch(s, next_digit<true>, grid, kThreads, 0, a);
    for (int i = 1; i < (kind == Sampling::top_k_and_p ? 2 : 1) * (kDigits - 1) + 1; ++i) launch(s, next_digit<false>, grid, kThreads, 0, a);
  }
  launch(s, choose, grid, kThreads, 0, a);
}

Sampling sampling_of(const SampleParams& p) {
  if (!(p.temperature > 0.f)) return Sampling::greedy;
  return p.top_k > 0 && p.top_p < 1.f ? Sampling::top_k_and_p : p.top_k > 0 || p.top_p < 1.f ? Sampling::top_k_or_p : Sampling::temperature;
}

}  // namespace codefuse::cuda
