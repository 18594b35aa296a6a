// Requests with beams. Each step of a search is one sequence per beam, the prompt with the beam's tokens behind it and one token to
// come, so a beam takes over its parent's K and V from the prefix cache: full pages in place, of the last page a copy.
#include <cmath>
#include <limits>

#include "engine/engine.h"

namespace codefuse {

void Engine::validate_beams(const Request& r) const {
  const BeamOptions& b = r.beams;
  if (b.width < 1 || b.width > kDecodeRows) throw ValueError(cat("beam_width is ", b.width, "; expected 1..", kDecodeRows));
  if (b.count < 1 || b.count > b.width) throw ValueError(cat("beam_count is ", b.count, "; expected 1..", b.width, " (beam_width)"));
  if (!std::isfinite(b.length_penalty)) throw ValueError(cat("length_penalty is ", b.length_penalty, "; expected a finite number"));
  if (!std::isfinite(b.diversity_rate)) throw ValueError(cat("beam_diversity_rate is ", b.diversity_rate, "; expected a finite number"));
  if (b.width == 1) return;
  const int ends = int(r.eos_ids.size()), candidates = BeamSearch::candidates(b.width, ends);
  if (candidates > kTopTokens)
    throw ValueError(cat("beam_width is ", b.width, " with ", ends, " end tokens; expected at most ", kTopTokens / std::max(2, ends + 1)));
  const auto refuse = [](const char* field, auto value, auto expected) {
    throw ValueError(cat(field, " is ", value, "; with beam_width above 1 expected ", expected));
  };
  if (r.sample.temperature != 0) refuse("temperature", r.sample.temperature, 0);
  if (r.sample.top_tokens != 0) refuse("top_logprobs", r.sample.top_tokens, 0);
  if (!r.prefix.empty()) refuse("prefix_bytes", cat(r.prefix.size(), " bytes"), "none");
}

void Engine::run_beams(Live& live) {
  const Request& r = live.request;
  SampleParams sample;
  sample.top_tokens = BeamSearch::candidates(r.beams.width, int(r.eos_ids.size()));
  sample.top_edited = true;
  const std::vector<BeamSearch::Beam>& running = live.beams->running();
  live.next.assign(running.size(), {});
  live.missing = int(running.size());
  for (size_t i = 0; i < running.size(); ++i) {
    std::vector<int32_t> tokens = r.prompt;
    tokens.insert(tokens.end(), running[i].tokens.begin(), running[i].tokens.end());
    RuleList rules;
    const int early = std::max(0, r.min_tokens - int(running[i].tokens.size()));  // tokens before which no end may come
    if (!r.logit_bias.empty() || r.penalties.any() || early > 0)
      rules.push_back(std::make_unique<TokenRules>(r.logit_bias, r.penalties, r.prompt, r.eos_ids, early, running[i].tokens));
    if (r.word_list) rules.push_back(std::make_unique<BadWords>(r.word_list, tokens));
    const int64_t row = next_beam_row_--;
    beam_rows_.emplace(row, std::pair(live.uid, i));
    scheduler_.add(row, std::move(tokens), 1, sample, std::move(rules), r.cache_salt, running[i].tokens.empty() ? 0 : Scheduler::kAll);
  }
}

void Engine::take_beam(int64_t row, const int32_t* tokens, const float* logprobs) {
  const auto [uid, beam] = beam_rows_.at(row);
  beam_rows_.erase(row);
  scheduler_.remove(row);
  Live& live = *live_.at(uid);
  const int count = BeamSearch::candidates(live.request.beams.width, int(live.request.eos_ids.size()));
  live.next[beam].tokens.assign(tokens, tokens + count);
  live.next[beam].logprobs.assign(logprobs, logprobs + count);
  if (--live.missing > 0) return;
  if (!live.beams->advance(live.next)) return run_beams(live);
  const bool enough = live.beams->finished().size() >= size_t(live.request.beams.count);
  end(uid, enough ? Finish::length : Finish::error, enough ? "" : "beam search: fewer tokens are possible than beams");
}

void Engine::stop_beams(const Live& live) {
  for (auto it = beam_rows_.begin(); it != beam_rows_.end();) {
    if (it->second.first != live.uid) {
      ++it;
      continue;
    }
    scheduler_.remove(it->first);
    it = beam_rows_.erase(it);
  }
}

void Engine::deliver_beams(Live& live, Finish finish, const std::string& error) {
  const int64_t first = live.uid;
  std::vector<BeamSearch::Beam> best;
  if (live.beams) {  // it has begun
    best = std::move(live.beams->finished());
    best.insert(best.end(), live.beams->running().begin(), live.beams->running().end());  // of a search that was ended
  }
  for (size_t i = 0; i < size_t(live.request.beams.count); ++i) {
    live.uid = first + int64_t(i);
    live.output_tokens = 0;
    live.cum_logprob = 0;
    if (i < best.size()) {
      live.text = std::move(best[i].text);
      live.text.release(true, &live.piece);
    }
    deliver(live, finish == Finish::length ? best[i].finish : finish, error);
  }
}

}  // namespace codefuse
