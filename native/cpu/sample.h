// One row's next token; the rule is in sample.cc.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "ops/batch.h"

namespace codefuse::cpu {

struct SampleScratch {
  std::vector<uint32_t> key;  // [V]
  std::vector<float> d, w;    // [V]
  void reserve(int vocab) { key.reserve(size_t(vocab)), d.reserve(size_t(vocab)), w.reserve(size_t(vocab)); }
};

// position: where the sampled token will stand
void sample_row(const Kernels& kernels, const float* logits /*[V]*/, int vocab, const SampleParams& p, int position,
                SampleScratch& s, int32_t& token, float& logprob);

}  // namespace codefuse::cpu
