#include "engine/bad_words.h"

#include <algorithm>
#include <string_view>

namespace codefuse {

namespace {

void set(std::vector<uint32_t>* mask, int32_t token) { (*mask)[size_t(token) / 32] |= 1u << (token % 32); }

bool begins_with(std::string_view text, std::string_view beginning) { return text.substr(0, beginning.size()) == beginning; }

// Sorted, without those that begin with another one: of these at most one begins a text, the greatest that is not greater.
std::vector<std::string_view> shortest(const std::vector<std::string>& words) {
  std::vector<std::string_view> sorted(words.begin(), words.end()), kept;
  std::sort(sorted.begin(), sorted.end());
  for (std::string_view word : sorted)
    if (kept.empty() || !begins_with(word, kept.back())) kept.push_back(word);
  return kept;
}

bool contains_any(std::string_view text, const std::vector<std::string_view>& shortest) {
  for (; !text.empty(); text.remove_prefix(1)) {
    const auto after = std::upper_bound(shortest.begin(), shortest.end(), text);
    if (after != shortest.begin() && begins_with(text, after[-1])) return true;
  }
  return false;
}

}  // namespace

std::vector<int32_t> tokens_by_bytes(const TokenBytes& table, int vocab) {
  std::vector<int32_t> order;
  for (size_t t = 0; t < std::min(table.size(), size_t(vocab)); ++t)
    if (!table[t].empty()) order.push_back(int32_t(t));
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return table[size_t(a)] < table[size_t(b)]; });
  return order;
}

WordList::WordList(std::vector<std::string> given, const TokenBytes* token_bytes, const std::vector<int32_t>* by_bytes, int vocab_size)
    : words(std::move(given)), table(token_bytes), order(by_bytes), vocab(vocab_size), inside(size_t(mask_words(vocab_size)), 0) {
  for (const std::string& word : words) longest = std::max(longest, word.size());
  const std::vector<std::string_view> sought = shortest(words);
  for (int32_t t : *order)
    if (contains_any((*table)[size_t(t)], sought)) set(&inside, t);
}

BadWords::BadWords(std::shared_ptr<const WordList> list, const std::vector<int32_t>& prompt) : list_(std::move(list)) {
  size_t first = prompt.size();
  for (size_t bytes = 0; first > 0 && bytes < list_->longest;) {
    const size_t t = size_t(prompt[--first]);
    bytes += t < list_->table->size() ? (*list_->table)[t].size() : 0;
  }
  for (; first < prompt.size(); ++first) read(prompt[first]);
}

void BadWords::read(int32_t token) {
  if (size_t(token) < list_->table->size()) tail_ += (*list_->table)[size_t(token)];
  if (tail_.size() >= list_->longest) tail_.erase(0, tail_.size() - (list_->longest - 1));
}

void BadWords::ban_beginning_with(const char* bytes, size_t size, std::vector<uint32_t>* banned) const {
  const auto compare = [&](int32_t t) { return (*list_->table)[size_t(t)].compare(0, size, bytes, size); };
  auto it = std::partition_point(list_->order->begin(), list_->order->end(), [&](int32_t t) { return compare(t) < 0; });
  for (; it != list_->order->end() && compare(*it) == 0; ++it) set(banned, *it);
}

void BadWords::prepare(const std::vector<int32_t>& generated, int /*index*/, LogitChanges* changes) {
  for (; read_ < generated.size(); ++read_) read(generated[read_]);
  std::vector<uint32_t> banned = list_->inside;
  for (const std::string& word : list_->words)
    for (size_t begun = 1; begun < word.size() && begun <= tail_.size(); ++begun)
      if (tail_.compare(tail_.size() - begun, begun, word, 0, begun) == 0) ban_beginning_with(word.data() + begun, word.size() - begun, &banned);
  changes->forbid(banned, list_->vocab);
}

}  // namespace codefuse
