// Bytes that a text must not contain, however they are cut into tokens.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/logit_rules.h"
#include "engine/text.h"

namespace codefuse {

// Tokens with bytes, ordered by them.
std::vector<int32_t> tokens_by_bytes(const TokenBytes& table, int vocab);

// Bans every token that would complete a word: inside itself, or together with the text before it, the prompt's end included.
// The words in the prompt itself do not matter. Where every token that may come completes one, nothing is banned.
class BadWords final : public LogitRules {
 public:
  // words: none empty. table and order (tokens_by_bytes) must outlive the rules.
  BadWords(std::vector<std::string> words, const TokenBytes* table, const std::vector<int32_t>* order, int vocab, const std::vector<int32_t>& prompt);

  bool waits(const std::vector<int32_t>&) override { return longest_ > 1; }
  void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) override;

 private:
  void read(int32_t token);
  void ban_beginning_with(const char* bytes, size_t size, std::vector<uint32_t>* banned) const;

  const std::vector<std::string> words_;
  const TokenBytes* table_;
  const std::vector<int32_t>* order_;
  const int vocab_;
  size_t longest_ = 0;            // bytes of a word
  std::vector<uint32_t> inside_;  // [mask_words(vocab)] tokens that contain a word
  std::string tail_;              // the text's last bytes, at most longest_ - 1
  size_t read_ = 0;               // generated tokens
};

}  // namespace codefuse
