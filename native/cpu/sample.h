// One row's next token; the rule is in sample.cc.
#pragma once
#include <cstdint>
#include <vector>

#include "ops/batch.h"

namespace codefuse::cpu {

struct SampleScratch {
  std::vector<uint32_t> key;  // [V]
  std::vector<float> d, w;    // [V]
};

// position: where the sampled token will stand
void sample_row(const float* logits /*[V]*/, int vocab, const SampleParams& p, int position, SampleScratch& s, int32_t& token, float& logprob);

}  // namespace codefuse::cpu
