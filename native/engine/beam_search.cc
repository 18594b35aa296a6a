#include "engine/beam_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace codefuse {

BeamSearch::BeamSearch(const BeamOptions& options, int max_tokens, std::vector<int32_t> end_ids, const TextCut& text)
    : options_(options), max_tokens_(max_tokens), end_ids_(std::move(end_ids)) {
  running_.push_back({{}, 0.f, text, Finish::none});
}

bool BeamSearch::advance(const std::vector<TopTokens>& next) {
  struct Candidate {
    size_t beam, rank;
    float score, key;
  };
  std::vector<Candidate> chosen;
  for (size_t b = 0; b < running_.size(); ++b)
    for (size_t r = 0; r < next[b].tokens.size(); ++r) {
      const float logprob = next[b].logprobs[r], score = running_[b].score + logprob;
      if (next[b].tokens[r] < 0 || !(logprob > -std::numeric_limits<float>::infinity())) continue;
      chosen.push_back({b, r, score, score + options_.diversity_rate * float(r)});
    }
  std::stable_sort(chosen.begin(), chosen.end(), [](const Candidate& x, const Candidate& y) { return x.key > y.key; });
  const size_t width = size_t(options_.width);
  chosen.resize(std::min(chosen.size(), size_t(candidates(options_.width, int(end_ids_.size())))));

  const int length = int(running_[0].tokens.size()) + 1;
  const auto penalty = float(std::pow(double(length), double(options_.length_penalty)));
  const bool full = options_.early_stopping && finished_.size() == width;
  std::vector<Beam> runs;
  for (size_t i = 0; i < chosen.size() && (runs.size() < width || i < width); ++i) {
    const Candidate& c = chosen[i];
    const int32_t token = next[c.beam].tokens[c.rank];
    Beam beam = running_[c.beam];
    beam.score = c.score;
    if (std::find(end_ids_.begin(), end_ids_.end(), token) != end_ids_.end()) {
      beam.finish = Finish::eos;
    } else {
      beam.tokens.push_back(token);
      if (beam.text.push(token, next[c.beam].logprobs[c.rank])) {
        beam.finish = Finish::stop;
      } else if (length == max_tokens_) {
        beam.finish = Finish::length;
      }
    }
    if (beam.finish == Finish::none) {
      if (runs.size() < width) runs.push_back(std::move(beam));
    } else if (i < width && !full) {  // worse ones were only looked at for beams to go on
      beam.score /= penalty;
      finished_.push_back(std::move(beam));
    }
  }
  std::stable_sort(finished_.begin(), finished_.end(), [](const Beam& x, const Beam& y) { return x.score > y.score; });
  if (finished_.size() > width) finished_.erase(finished_.begin() + int64_t(width), finished_.end());
  running_ = std::move(runs);
  if (running_.empty()) return true;
  // the best that runs is taken to end now, as transformers does unless early_stopping is "never"
  return finished_.size() == width && (options_.early_stopping || running_[0].score / penalty <= finished_.back().score);
}

}  // namespace codefuse
