// One row's next token; the rule is in sample.cc.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "ops/batch.h"

namespace codefuse::cpu {

struct SampleScratch {
  std::vector<uint32_t> key;  // [V]
  std::vector<float> edited, d, w;  // [V]
  void reserve(int vocab) { key.reserve(size_t(vocab)), edited.reserve(size_t(vocab)), d.reserve(size_t(vocab)), w.reserve(size_t(vocab)); }
};

// What changes one row before its token is chosen.
struct RowChanges {
  const LogitEdit* edits = nullptr;
  int count = 0;                   // of edits
  const uint32_t* mask = nullptr;  // [mask_words(V)] or nullptr
};

// position: where the sampled token will stand. top_token, top_logprob: [kTopTokens] of Sampled, unless p asks for none.
void sample_row(const Kernels& kernels, const float* logits /*[V]*/, int vocab, const SampleParams& p, const RowChanges& changes,
                int position, SampleScratch& s, int32_t& token, float& logprob, int32_t* top_token, float* top_logprob);

}  // namespace codefuse::cpu
