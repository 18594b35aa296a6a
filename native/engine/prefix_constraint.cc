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

void PrefixConstraint::allow(size_t at, uint32_t* mask) const {
  const auto set = [&](int begin, int end) {
    for (int p = begin; p < end; ++p) {
      const int32_t t = trie_->token(p);
      mask[t / 32] |= uint32_t(1) << (t % 32);
    }
  };
  TokenTrie::Node node = trie_->root();
  for (size_t depth = 0; !node.empty(); ++depth) {
    if (at + depth == bytes_.size()) return set(node.begin, node.end);
    if (depth > 0 && spells_[at + depth]) set(node.begin, node.begin + trie_->ending(node, depth));
    node = trie_->child(node, depth, uint8_t(bytes_[at + depth]));
  }
}

PrefixRule::Spelled PrefixRule::spelled(const std::vector<int32_t>& generated) const {
  Spelled s;
  for (size_t i = 0; i < generated.size() && s.bytes < constraint_.size(); ++i) {
    s.bytes += constraint_.bytes_of(generated[i]);
    s.within += s.bytes <= constraint_.size();
  }
  return s;
}

bool PrefixRule::waits(const std::vector<int32_t>& generated) { return spelled(generated).bytes < constraint_.size(); }

void PrefixRule::prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) {
  const Spelled s = spelled(generated);
  if (s.bytes < constraint_.size()) {
    std::fill(mask_.begin(), mask_.end(), 0);
    constraint_.allow(s.bytes, mask_.data());
    changes->allow_only(mask_);
  } else if (index < min_tokens_ + s.within) {
    for (int32_t id : end_ids_) changes->ban(id);
  }
}

}  // namespace codefuse
