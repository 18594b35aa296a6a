// Rules on single tokens: logit_bias, penalties for tokens that have occurred, end tokens that may not come yet.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "engine/logit_rules.h"
#include "engine/text.h"

namespace codefuse {

using LogitBias = std::vector<std::pair<int32_t, float>>;  // (token, what is added to its logit)

struct Penalties {
  float repetition = 1.f;  // divides positive logits of tokens of the prompt and of the text, multiplies others (Keskar et al., 2019)
  float presence = 0.f;    // subtracted from the logits of tokens of the text
  float frequency = 0.f;   // the same times how often they occur in it
  bool any() const { return repetition != 1.f || presence != 0.f || frequency != 0.f; }
};

class TokenRules final : public LogitRules {
 public:
  // A token of bias given twice gets the sum. end_ids are banned from the first min_tokens tokens. text: what has been generated behind the
  // prompt, where the sequence has it in its prompt; min_tokens then counts from its end.
  TokenRules(const LogitBias& bias, const Penalties& penalties, const std::vector<int32_t>& prompt, const std::vector<int32_t>& end_ids, int min_tokens,
             const std::vector<int32_t>& text = {});

  // So many bytes at the beginning of the output are the prompt's; tokens that lie wholly in them are no tokens of the text.
  void begin_with(size_t typed, const TokenBytes* table) { typed_ = typed, table_ = table; }

  bool waits(const std::vector<int32_t>&) override { return penalties_.any(); }
  bool looks_ahead() const override { return !penalties_.any(); }
  void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) override;

 private:
  struct Entry {
    int32_t token;
    float bias = 0.f;
    int count = 0;        // in the text
    bool prompt = false;  // it is in the prompt
    bool end = false;
  };
  Entry& entry(int32_t token);
  void count(int32_t token);

  const Penalties penalties_;
  const int min_tokens_;
  std::vector<Entry> entries_;  // tokens ascending
  size_t counted_ = 0;          // generated tokens
  size_t typed_ = 0;            // bytes still to come
  const TokenBytes* table_ = nullptr;
};

}  // namespace codefuse
