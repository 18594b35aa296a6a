// Sampling one token from one row of logits. The rule, which every device follows:
//   edits (sampling_rule.h, edited()), then the mask: a forbidden token becomes NaN, so it ranks below every allowed one
//   m = the greatest logit; key = order_key(logit) (sampling_rule.h; NaN ranks below everything)
//   temperature 0: the greatest key, the lowest id on a tie. Otherwise
//   1. d = (logit - m) / temperature, w = exp(d), mass = floor(w 2^40)
//   2. top_k: t = the k-th greatest key (every token tied with it stays)
//   3. top_p: M = mass of the tokens with key >= t; t = the greatest key such that the tokens with key >= t have a mass of at
//      least ceil(top_p M) (every token tied with it stays)
//   4. kept: key >= t and w >= min_p
//   5. of the kept, the greatest d + gumbel(seed, position, token), the lowest id on a tie
// log-prob = logit - log(sum(exp(logits))): of the raw logits, whatever was edited, forbidden or kept.
#include "cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/sampling_rule.h"

namespace codefuse::cpu {

namespace {

constexpr int kBlock = 256;          // tokens whose noise is made at once
constexpr float kMostNoise = 22.9f;  // above the greatest gumbel_of()

// The greatest key t such that the tokens with key >= t have at least `need` of mass_of(token): digit by digit from the top.
template <class MassOf>
uint32_t select_key(const uint32_t* key, int n, uint64_t need, MassOf mass_of) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint64_t bin[256] = {};
    for (int i = 0; i < n; ++i)
      if (shift == 24 || (key[i] >> (shift + 8)) == (prefix >> (shift + 8))) bin[(key[i] >> shift) & 255] += mass_of(i);
    int digit = 255;
    while (digit > 0 && bin[digit] < need) need -= bin[digit--];
    prefix |= uint32_t(digit) << shift;
  }
  return prefix;
}

// The lowest id with the greatest key.
int32_t greatest(const uint32_t* key, int vocab) {
  int32_t id = 0;
  for (int i = 1; i < vocab; ++i)
    if (key[i] > key[id]) id = i;
  return id;
}

// The k ids with the greatest keys, greatest first, the lower one first on a tie; -1 when there are no more.
void find_top(int32_t* top, int k, const uint32_t* key, int vocab) {
  int found = 0;
  for (int i = 0; i < vocab; ++i) {
    if (found == k && key[i] <= key[top[k - 1]]) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && key[top[at - 1]] < key[i]; --at) top[at] = top[at - 1];
    top[at] = i;
  }
  std::fill(top + found, top + k, -1);
}

void change_row(float* row, const float* logits, int vocab, const RowChanges& changes) {
  std::copy(logits, logits + vocab, row);
  for (int i = 0; i < changes.count; ++i) {
    const LogitEdit& e = changes.edits[i];
    row[e.token] = rule::edited(row[e.token], e.add, e.penalty);
  }
  if (!changes.mask) return;
  for (int i = 0; i < vocab; ++i)
    if (!rule::allows(changes.mask, i)) row[i] = std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

void sample_row(const Kernels& kernels, const float* raw, int vocab, const SampleParams& p, const RowChanges& changes, int position,
                SampleScratch& s, int32_t& token, float& logprob, int32_t* top_token, float* top_logprob) {
  s.key.resize(size_t(vocab));
  const uint32_t* key = s.key.data();
  kernels.order_keys(s.key.data(), raw, vocab);
  token = greatest(key, vocab);
  const float raw_m = raw[token];
  if (p.top_tokens > 0 && !p.top_edited) find_top(top_token, p.top_tokens, key, vocab);
  const float* logits = raw;
  if (changes.count > 0 || changes.mask) {
    s.edited.resize(size_t(vocab));
    change_row(s.edited.data(), raw, vocab, changes);
    logits = s.edited.data();
    kernels.order_keys(s.key.data(), logits, vocab);
    token = greatest(key, vocab);
  }
  if (p.top_tokens > 0 && p.top_edited) find_top(top_token, p.top_tokens, key, vocab);
  const float m = logits[token];

  if (p.temperature > 0) {
    s.d.resize(size_t(vocab));
    s.w.resize(size_t(vocab));
    const float *d = s.d.data(), *w = s.w.data();
    kernels.weigh(s.d.data(), s.w.data(), logits, m, p.temperature, vocab);
    uint32_t t = 1;  // everything but NaN
    if (p.top_k > 0 && p.top_k < vocab) t = std::max(t, select_key(key, vocab, uint64_t(p.top_k), [](int) { return 1; }));
    if (p.top_p < 1) {
      const auto mass = [&](int i) { return key[i] >= t ? rule::mass_of(w[i]) : 0; };
      uint64_t total = 0;
      for (int i = 0; i < vocab; ++i) total += mass(i);
      t = std::max(t, select_key(key, vocab, rule::mass_needed(p.top_p, total), mass));
    }
    float best = -std::numeric_limits<float>::infinity();
    for (int begin = 0; begin < vocab; begin += kBlock) {
      const int end = std::min(vocab, begin + kBlock);
      float top = -std::numeric_limits<float>::infinity();
      for (int i = begin; i < end; ++i)
        if (key[i] >= t && w[i] >= p.min_p && d[i] > top) top = d[i];
      if (!(top + kMostNoise > best)) continue;  // none here can win
      float noise[kBlock];
      kernels.noise(noise, p.seed, position, begin / 4, (end - begin + 3) / 4);
      for (int i = begin; i < end; ++i) {
        const float score = rule::add(d[i], noise[i - begin]);
        if (key[i] >= t && w[i] >= p.min_p && score > best) best = score, token = i;
      }
    }
  }
  const double log_sum = std::log(kernels.sum_exp(raw, raw_m, vocab));
  const auto logprob_of = [&](float logit) { return float(double(logit) - raw_m - log_sum); };
  logprob = logprob_of(raw[token]);
  for (int i = 0; i < p.top_tokens; ++i) top_logprob[i] = top_token[i] < 0 ? 0.f : logprob_of((p.top_edited ? logits : raw)[top_token[i]]);
}

}  // namespace codefuse::cpu
