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

// The words of one request, and the tokens that contain one.
struct WordList {
  // words: none empty. table and order (tokens_by_bytes) must outlive it.
  WordList(std::vector<std::string> words, const TokenBytes* table, const std::vector<int32_t>* order, int vocab);
  std::vector<std::string> words;
  const TokenBytes* table;
  const std::vector<int32_t>* order;
  int vocab;
  size_t longest = 0;            // bytes of a word
  std::vector<uint32_t> inside;  // [mask_words(vocab)]
};

// Bans every token that would complete a word: inside itself, or together with the text before it, the prompt's end included.
// The words in the prompt itself do not matter. Where every token that may come completes one, nothing is banned.
class BadWords final : public LogitRules {
 public:
  BadWords(std::shared_ptr<const WordList> list, const std::vector<int32_t>& prompt);

  bool waits(const std::vector<int32_t>&) override { return list_->longest > 1; }
  void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) override;

 private:
  void read(int32_t token);
  void ban_beginning_with(const char* bytes, size_t size, std::vector<uint32_t>* banned) const;

  const std::shared_ptr<const WordList> list_;
  std::string tail_;  // the text's last bytes, one less than the longest word has
  size_t read_ = 0;   // generated tokens
};

}  // namespace codefuse
