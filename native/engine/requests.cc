// What a request may ask for, and the rules for the logits of its tokens that follow from it.
#include <algorithm>
#include <cmath>

#include "engine/engine.h"

namespace codefuse {

namespace {

constexpr int kTopLogprobs = 20;
constexpr size_t kListedTokens = kRuleEdits / 4;  // of logit_bias and of eos_ids
constexpr size_t kMaxPrefix = 1024;
constexpr size_t kBadWords = 1024, kBadWordBytes = 1024;  // so that looking for them at every token takes no time

void check_words(const char* field, const std::vector<std::string>& words) {
  size_t bytes = 0;
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i].empty()) throw ValueError(cat(field, "[", i, "] is empty"));
    bytes += words[i].size();
  }
  if (bytes > 65536) throw ValueError(cat(field, " has ", bytes, " bytes; expected at most 65536"));
}

}  // namespace

void Engine::validate(const Request& r) const {
  const Limits& limits = scheduler_.limits();
  const int vocab = runner_->config().vocab, size = int(r.prompt.size() + r.prefix_ids.size());
  if (r.prompt.empty()) throw ValueError("prompt has no tokens; expected at least 1");
  if (size >= limits.max_len)
    throw ValueError(cat("prompt has ", size, " tokens; expected at most ", limits.max_len - 1, " (max_len ", limits.max_len, " less one new token)"));
  for (size_t i = 0; i < r.prompt.size(); ++i)
    if (r.prompt[i] < 0 || r.prompt[i] >= vocab) throw ValueError(cat("prompt[", i, "] is token ", r.prompt[i], "; expected 0..", vocab - 1));
  std::string spelled;
  for (size_t i = 0; i < r.prefix_ids.size(); ++i) {
    const int32_t id = r.prefix_ids[i];
    if (id < 0 || id >= vocab || size_t(id) >= token_bytes_.size() || token_bytes_[size_t(id)].empty())
      throw ValueError(cat("prefix_ids[", i, "] is ", id, "; expected a token of 0..", vocab - 1, " that stands for bytes"));
    spelled += token_bytes_[size_t(id)];
  }
  if (!r.prefix_ids.empty() && spelled != r.prefix)
    throw ValueError(cat("prefix_ids are ", r.prefix_ids.size(), " tokens of other bytes than prefix_bytes; expected its tokens, or none"));
  if (r.prefix.size() > kMaxPrefix) throw ValueError(cat("prefix_bytes has ", r.prefix.size(), " bytes; expected at most ", kMaxPrefix));
  if (r.max_tokens < 1) throw ValueError(cat("max_tokens is ", r.max_tokens, "; expected at least 1"));
  if (r.max_tokens > limits.max_len - size)
    throw ValueError(cat("max_tokens is ", r.max_tokens, "; expected at most ", limits.max_len - size, " with a prompt of ", size,
                         " tokens (max_len ", limits.max_len, ")"));
  const int need = Scheduler::pages_for(size + r.max_tokens - 1);
  if (need > limits.pages)
    throw ValueError(cat("prompt of ", size, " tokens and max_tokens ", r.max_tokens, " need ", need, " KV pages; the pool has ", limits.pages));
  if (r.min_tokens < 0 || r.min_tokens > r.max_tokens)
    throw ValueError(cat("min_tokens is ", r.min_tokens, "; expected 0..", r.max_tokens, " (max_tokens)"));
  const SampleParams& s = r.sample;
  if (!std::isfinite(s.temperature) || s.temperature < 0)
    throw ValueError(cat("temperature is ", s.temperature, "; expected a finite number, 0 or more"));
  if (s.top_k < 0) throw ValueError(cat("top_k is ", s.top_k, "; expected 0 (off) or more"));
  if (!(s.top_p > 0 && s.top_p <= 1)) throw ValueError(cat("top_p is ", s.top_p, "; expected more than 0, at most 1"));
  if (!(s.min_p >= 0 && s.min_p <= 1)) throw ValueError(cat("min_p is ", s.min_p, "; expected 0..1"));
  const int most = std::min(kTopLogprobs, vocab);
  if (s.top_tokens < 0 || s.top_tokens > most) throw ValueError(cat("top_logprobs is ", s.top_tokens, "; expected 0..", most));
  const Penalties& p = r.penalties;
  if (!(p.repetition > 0) || !std::isfinite(p.repetition))
    throw ValueError(cat("repetition_penalty is ", p.repetition, "; expected a finite number above 0"));
  for (auto [name, value] : {std::pair("presence_penalty", p.presence), std::pair("frequency_penalty", p.frequency)})
    if (!std::isfinite(value)) throw ValueError(cat(name, " is ", value, "; expected a finite number"));
  if (r.logit_bias.size() > kListedTokens) throw ValueError(cat("logit_bias has ", r.logit_bias.size(), " tokens; expected at most ", kListedTokens));
  for (auto [token, value] : r.logit_bias) {
    if (token < 0 || token >= vocab) throw ValueError(cat("logit_bias has token ", token, "; expected 0..", vocab - 1));
    if (!(value < INFINITY)) throw ValueError(cat("logit_bias of token ", token, " is ", value, "; expected a finite number, or -inf to ban it"));
  }
  check_words("bad_words", r.bad_words);
  if (r.bad_words.size() > kBadWords) throw ValueError(cat("bad_words has ", r.bad_words.size(), " strings; expected at most ", kBadWords));
  for (size_t i = 0; i < r.bad_words.size(); ++i)
    if (r.bad_words[i].size() > kBadWordBytes)
      throw ValueError(cat("bad_words[", i, "] has ", r.bad_words[i].size(), " bytes; expected at most ", kBadWordBytes));
  check_words("stop", r.stop);
  if (r.eos_ids.size() > kListedTokens) throw ValueError(cat("eos_ids and stop_token_ids have ", r.eos_ids.size(), " tokens; expected at most ", kListedTokens));
  for (size_t i = 0; i < r.eos_ids.size(); ++i)
    if (r.eos_ids[i] < 0 || r.eos_ids[i] >= vocab)
      throw ValueError(cat("eos_ids[", i, "] is ", r.eos_ids[i], "; expected 0..", vocab - 1));
  validate_beams(r);
  if (r.cache_salt.size() > 256) throw ValueError(cat("cache_salt has ", r.cache_salt.size(), " bytes; expected at most 256"));
  if (r.max_time_ms < 0) throw ValueError(cat("max_time_ms is ", r.max_time_ms, "; expected 0 (no limit) or more"));
  if (r.session.size() > 256) throw ValueError(cat("session has ", r.session.size(), " bytes; expected at most 256"));
  if (r.deadline_ms < 0) throw ValueError(cat("deadline_ms is ", r.deadline_ms, "; expected 0 (none) or more"));
  if (!r.outbox) throw ValueError("outbox is missing");
}

void Engine::add_rules(Request& r) const {
  if (!r.bad_words.empty()) r.word_list = std::make_shared<const WordList>(r.bad_words, &token_bytes_, &tokens_by_bytes_, runner_->config().vocab);
  if (r.beams.width > 1) return;  // its rows have rules of their own
  if (!r.prefix.empty()) {
    PrefixConstraint constraint(&trie_, r.prefix);
    if (!constraint.possible()) throw ValueError(cat("prefix_bytes has ", r.prefix.size(), " bytes; expected what tokens of this model spell"));
    r.rules.push_back(std::make_unique<PrefixRule>(std::move(constraint), runner_->config().vocab, r.eos_ids, r.min_tokens));
  }
  if (!r.logit_bias.empty() || r.penalties.any() || (r.min_tokens > 0 && !r.eos_ids.empty())) {
    auto rules = std::make_unique<TokenRules>(r.logit_bias, r.penalties, r.prompt, r.eos_ids, r.min_tokens);
    rules->begin_with(r.prefix.size(), &token_bytes_);
    r.rules.push_back(std::move(rules));
  }
  if (r.word_list) r.rules.push_back(std::make_unique<BadWords>(r.word_list, r.prompt));
}

}  // namespace codefuse
