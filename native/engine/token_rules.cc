#include "engine/token_rules.h"

#include <algorithm>
#include <limits>

namespace codefuse {

TokenRules::TokenRules(const LogitBias& bias, const Penalties& penalties, const std::vector<int32_t>& prompt, const std::vector<int32_t>& end_ids, int min_tokens,
                       const std::vector<int32_t>& text)
    : penalties_(penalties), min_tokens_(min_tokens) {
  if (penalties.repetition != 1.f) {
    std::vector<int32_t> tokens = prompt;
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    for (int32_t t : tokens) {
      entries_.push_back({t});
      entries_.back().prompt = true;
    }
  }
  for (auto [token, value] : bias) {
    float& sum = entry(token).bias;
    sum = add_bias(sum, value);
  }
  if (min_tokens > 0)
    for (int32_t t : end_ids) entry(t).end = true;
  if (penalties.any())
    for (int32_t t : text) ++entry(t).count;
}

TokenRules::Entry& TokenRules::entry(int32_t token) {
  auto at = std::lower_bound(entries_.begin(), entries_.end(), token, [](const Entry& e, int32_t t) { return e.token < t; });
  return at != entries_.end() && at->token == token ? *at : *entries_.insert(at, {token});
}

void TokenRules::count(int32_t token) {
  const size_t bytes = typed_ > 0 && size_t(token) < table_->size() ? (*table_)[size_t(token)].size() : 0;
  if (bytes > 0 && bytes <= typed_) {
    entry(token).prompt = true;
  } else {
    ++entry(token).count;
  }
  typed_ -= std::min(typed_, bytes);
}

void TokenRules::prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) {
  if (penalties_.any())
    for (; counted_ < generated.size(); ++counted_) count(generated[counted_]);
  for (const Entry& e : entries_) {
    float add = e.bias;
    if (e.count > 0) {
      constexpr float most = std::numeric_limits<float>::max();
      add = add_bias(add, std::clamp(-penalties_.presence - penalties_.frequency * float(e.count), -most, most));
    }
    if (e.end && index < min_tokens_) add = -std::numeric_limits<float>::infinity();
    const float penalty = e.prompt || e.count > 0 ? penalties_.repetition : 1.f;
    if (add != 0.f || penalty != 1.f) changes->edit(e.token, add, penalty);
  }
}

}  // namespace codefuse
