// Beam search over one prompt: which continuations run on and which texts are finished, as transformers decides it. No tensors.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/outbox.h"
#include "engine/text.h"

namespace codefuse {

struct BeamOptions {
  int width = 1;                 // beams; 1: no beam search
  int count = 1;                 // texts that are returned, at most width
  float length_penalty = 1.f;    // a finished text's score is the sum of its log-probabilities / (tokens, the end token too) ^ length_penalty
  float diversity_rate = 0.f;    // times a token's rank among those of its beam, added to its score when beams are chosen
  bool early_stopping = false;   // end with width finished texts, even if one that still runs could beat them
};

class BeamSearch {
 public:
  struct Beam {
    std::vector<int32_t> tokens;
    float score = 0.f;  // sum of log-probabilities; of a finished one with the length penalty
    TextCut text;
    Finish finish = Finish::none;
  };

  // Tokens per beam that advance() needs to choose from: enough for width beams to go on when as many end.
  static int candidates(int width, int end_ids) { return (end_ids > 1 ? 1 + end_ids : 2) * width; }

  BeamSearch(const BeamOptions& options, int max_tokens, std::vector<int32_t> end_ids, const TextCut& text);

  const std::vector<Beam>& running() const { return running_; }  // all of the same length, best first
  // next: for each running beam its candidates() most likely tokens, likeliest first, and their log-probabilities; ones that may not come
  // have -inf, ones that do not exist are -1. True when the search has ended.
  bool advance(const std::vector<TopTokens>& next);
  std::vector<Beam>& finished() { return finished_; }  // at most width, best first

 private:
  const BeamOptions options_;
  const int max_tokens_;
  const std::vector<int32_t> end_ids_;
  std::vector<Beam> running_, finished_;
};

}  // namespace codefuse
