#include "engine/bad_words.h"

#include <algorithm>

namespace codefuse {

namespace {

void set(std::vector<uint32_t>* mask, int32_t token) { (*mask)[size_t(token) / 32] |= 1u << (token % 32); }

}  // namespace

std::vector<int32_t> tokens_by_bytes(const TokenBytes& table, int vocab) {
  std::vector<int32_t> order;
  for (size_t t = 0; t < std::min(table.size(), size_t(vocab)); ++t)
    if (!table[t].empty()) order.push_back(int32_t(t));
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return table[size_t(a)] < table[size_t(b)]; });
  return order;
}

BadWords::BadWords(std::vector<std::string> words, const TokenBytes* table, const std::vector<int32_t>* order, int vocab, const std::vector<int32_t>& prompt)
    : words_(std::move(words)), table_(table), order_(order), vocab_(vocab), inside_(size_t(mask_words(vocab)), 0) {
  for (const std::string& word : words_) longest_ = std::max(longest_, word.size());
  for (int32_t t : *order_)
    for (const std::string& word : words_)
      if ((*table_)[size_t(t)].find(word) != std::string::npos) {
        set(&inside_, t);
        break;
      }
  size_t first = prompt.size();
  for (size_t bytes = 0; first > 0 && bytes < longest_;) {
    const size_t t = size_t(prompt[--first]);
    bytes += t < table_->size() ? (*table_)[t].size() : 0;
  }
  for (; first < prompt.size(); ++first) read(prompt[first]);
}

void BadWords::read(int32_t token) {
  if (size_t(token) < table_->size()) tail_ += (*table_)[size_t(token)];
  if (tail_.size() >= longest_) tail_.erase(0, tail_.size() - (longest_ - 1));
}

void BadWords::ban_beginning_with(const char* bytes, size_t size, std::vector<uint32_t>* banned) const {
  const auto compare = [&](int32_t t) { return (*table_)[size_t(t)].compare(0, size, bytes, size); };
  auto it = std::partition_point(order_->begin(), order_->end(), [&](int32_t t) { return compare(t) < 0; });
  for (; it != order_->end() && compare(*it) == 0; ++it) set(banned, *it);
}

void BadWords::prepare(const std::vector<int32_t>& generated, int /*index*/, LogitChanges* changes) {
  for (; read_ < generated.size(); ++read_) read(generated[read_]);
  std::vector<uint32_t> banned = inside_;
  for (const std::string& word : words_)
    for (size_t begun = 1; begun < word.size() && begun <= tail_.size(); ++begun)
      if (tail_.compare(tail_.size() - begun, begun, word, 0, begun) == 0) ban_beginning_with(word.data() + begun, word.size() - begun, &banned);
  changes->forbid(banned, vocab_);
}

}  // namespace codefuse
