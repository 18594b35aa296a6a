// Sampling one token from one row of logits. The rule, which every device follows:
//   m = the greatest logit; key = order_key(logit) (sampling_rule.h; NaN ranks below everything)
//   temperature 0: the greatest key, the lowest id on a tie. Otherwise
//   1. d = (logit - m) / temperature, w = exp(d), mass = floor(w 2^40)
//   2. top_k: t = the k-th greatest key (every token tied with it stays)
//   3. top_p: M = mass of the tokens with key >= t; t = the greatest key such that the tokens with key >= t have a mass of at
//      least ceil(top_p M) (every token tied with it stays)
//   4. kept: key >= t and w >= min_p
//   5. of the kept, the greatest d + gumbel(seed, position, token), the lowest id on a tie
// log-prob = logit - log(sum(exp(logits))): of the raw logits, whatever was kept.
#include "cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/sampling_rule.h"

namespace codefuse::cpu {

namespace {

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

}  // namespace

void sample_row(const float* logits, int vocab, const SampleParams& p, int position, SampleScratch& s, int32_t& token, float& logprob) {
  s.key.resize(vocab);
  int best = 0;
  for (int i = 0; i < vocab; ++i) {
    s.key[i] = rule::order_key(logits[i]);
    if (s.key[i] > s.key[best]) best = i;
  }
  const float m = logits[best];
  double sum = 0;
  for (int i = 0; i < vocab; ++i) sum += std::exp(logits[i] - m);

  token = best;
  if (p.temperature > 0) {
    s.d.resize(vocab);
    s.w.resize(vocab);
    for (int i = 0; i < vocab; ++i) {
      s.d[i] = rule::div(rule::add(logits[i], -m), p.temperature);
      s.w[i] = rule::exp_of(s.d[i]);
    }
    uint32_t t = 1;  // everything but NaN
    if (p.top_k > 0 && p.top_k < vocab) t = std::max(t, select_key(s.key.data(), vocab, uint64_t(p.top_k), [](int) { return 1; }));
    if (p.top_p < 1) {
      auto mass = [&](int i) { return s.key[i] >= t ? rule::mass_of(s.w[i]) : 0; };
      uint64_t total = 0;
      for (int i = 0; i < vocab; ++i) total += mass(i);
      t = std::max(t, select_key(s.key.data(), vocab, rule::mass_needed(p.top_p, total), mass));
    }
    float best_score = -std::numeric_limits<float>::infinity(), noise[4];
    for (int group = 0; group * 4 < vocab; ++group) {
      auto kept = [&](int i) { return i < vocab && s.key[i] >= t && s.w[i] >= p.min_p; };
      const int i = group * 4;
      if (!(kept(i) || kept(i + 1) || kept(i + 2) || kept(i + 3))) continue;
      rule::gumbel4(p.seed, position, group, noise);
      for (int j = 0; j < 4; ++j) {
        if (!kept(i + j)) continue;
        float score = rule::add(s.d[i + j], noise[j]);
        if (score > best_score) best_score = score, token = i + j;
      }
    }
  }
  logprob = float(double(logits[token]) - m - std::log(sum));
}

}  // namespace codefuse::cpu
