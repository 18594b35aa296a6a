// What a request changes about the logits of its tokens. Rules say it per sequence, on the engine's thread, without a device;
// the scheduler puts it into the batch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "ops/batch.h"

namespace codefuse {

// The sum of two biases, finite or -inf: -inf, a ban, outweighs everything.
inline float add_bias(float a, float b) {
  constexpr float most = std::numeric_limits<float>::max();
  if (a == -std::numeric_limits<float>::infinity() || b == -std::numeric_limits<float>::infinity()) return -std::numeric_limits<float>::infinity();
  return std::clamp(a + b, -most, most);
}

// The changes for one token, gathered from all rules of a sequence.
class LogitChanges {
 public:
  void clear();
  // One logit: penalties multiply, what is added adds up; rules may name a token in any order and several times.
  void edit(int32_t token, float add, float penalty = 1.f) { edits_.push_back({token, add, penalty}); }
  void ban(int32_t token);  // add = -inf
  // Only these tokens; with several rules those that all of them allow, at least one. Stronger than a ban.
  void allow_only(const std::vector<uint32_t>& mask /*[mask_words(vocab)]*/);
  // None of these tokens, unless nothing would be left. Any number of them, unlike bans.
  void forbid(const std::vector<uint32_t>& mask /*[mask_words(vocab)]*/, int vocab);
  // As those of the batch's next sample; edit_begin has its first 0 already.
  void append_to(Batch* batch);

 private:
  std::vector<LogitEdit> edits_;
  std::vector<uint32_t> mask_;       // empty: every token is allowed
  std::vector<uint32_t> forbidden_;  // empty: none; the bits from vocab on are set
};

class LogitRules {
 public:
  virtual ~LogitRules() = default;
  // generated: the sequence's tokens after the prompt that are known; between two calls it only grows.
  // True while the changes of a token depend on all tokens before it: the sequence then runs one step at a time.
  virtual bool waits(const std::vector<int32_t>& generated) = 0;
  // The changes for generated token number `index` (from 0). index > generated.size() only while waits() is false.
  virtual void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) = 0;
  // True when prepare() may also be given tokens that are only guessed: it keeps nothing of them.
  virtual bool looks_ahead() const { return false; }
};

using RuleList = std::vector<std::unique_ptr<LogitRules>>;

}  // namespace codefuse
