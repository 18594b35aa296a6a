#include "engine/prefix_constraint.h"

#include <algorithm>
#include <iterator>
#include <unordered_set>

namespace codefuse {

TokenTrie::TokenTrie(const TokenBytes* table, const std::vector<int32_t>& order, const std::vector<int32_t>& never) : table_(table) {
  const std::unordered_set<int32_t> out(never.begin(), never.end());
  order_.reserve(order.size());
  std::copy_if(order.begin(), order.end(), std::back_inserter(order_), [&](int32_t id) { return out.count(id) == 0; });
}

int TokenTrie::ending(Node node, size_t depth) const {
  int count = 0;
  while (node.begin + count < node.end && bytes(token(node.begin + count)).size() == depth) ++count;
  return count;
}

TokenTrie::Node TokenTrie::child(Node node, size_t depth, uint8_t byte) const {
  const auto at = [&](int32_t id) { return int(uint8_t(bytes(id)[depth])); };
  const auto end = order_.begin() + node.end;
  const auto begin = order_.begin() + node.begin + ending(node, depth);
  const auto low = std::partition_point(begin, end, [&](int32_t id) { return at(id) < byte; });
  const auto high = std::partition_point(low, end, [&](int32_t id) { return at(id) == byte; });
  return {int(low - order_.begin()), int(high - order_.begin())};
}

PrefixConstraint::PrefixConstraint(const TokenTrie* trie, std::string bytes)
    : trie_(trie), bytes_(std::move(bytes)), spells_(bytes_.size() + 1, false) {
  const size_t size = bytes_.size();
  spells_[size] = true;
  for (size_t i = size; i-- > 0;) {
    TokenTrie::Node node = trie->root();
    for (size_t depth = 0; !spells_[i] && !node.empty(); ++depth) {
      if (i + depth == size || (depth > 0 && spells_[i + depth] && trie->ending(node, depth) > 0))
        spells_[i] = true;
      else
        node = trie->child(node, depth, uint8_t(bytes_[i + depth]));
    }
  }
}

void PrefixConstraint::allow(uint32_t* mask) const {
  const auto set = [&](int begin, int end) {
    for (int p = begin; p < end; ++p) {
      const int32_t t = trie_->token(p);
      mask[t / 32] |= uint32_t(1) << (t % 32);
    }
  };
  TokenTrie::Node node = trie_->root();
  for (size_t depth = 0; !node.empty(); ++depth) {
    if (at_ + depth == bytes_.size()) return set(node.begin, node.end);
    if (depth > 0 && spells_[at_ + depth]) set(node.begin, node.begin + trie_->ending(node, depth));
    node = trie_->child(node, depth, uint8_t(bytes_[at_ + depth]));
  }
}

bool PrefixRule::waits(const std::vector<int32_t>& generated) {
  for (; seen_ < generated.size() && !constraint_.done(); ++seen_) within_ += constraint_.next(generated[seen_]);
  return !constraint_.done();
}

void PrefixRule::prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) {
  if (!waits(generated)) {
    if (index < min_tokens_ + within_)
      for (int32_t id : end_ids_) changes->ban(id);
    return;
  }
  std::fill(mask_.begin(), mask_.end(), 0);
  constraint_.allow(mask_.data());
  changes->allow_only(mask_);
}

}  // namespace codefuse
