// Text that must begin with given bytes: which tokens may come next until they are spelled.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/logit_rules.h"
#include "engine/text.h"

namespace codefuse {

// A byte trie over a vocabulary, held as its leaves in order: a node is the run of tokens that share its path.
class TokenTrie {
 public:
  struct Node {
    int begin = 0, end = 0;  // of order()
    bool empty() const { return begin == end; }
  };

  // order: tokens_by_bytes; those in never are in no node. The table must outlive the trie.
  TokenTrie(const TokenBytes* table, const std::vector<int32_t>& order, const std::vector<int32_t>& never);

  Node root() const { return {0, int(order_.size())}; }
  // The node behind one more byte; depth is the length of node's own path.
  Node child(Node node, size_t depth, uint8_t byte) const;
  // Tokens that end at the node come first among its own.
  int ending(Node node, size_t depth) const;  // how many: tokens of the same bytes
  int32_t token(int place) const { return order_[size_t(place)]; }
  const std::string& bytes(int32_t token) const { return (*table_)[size_t(token)]; }

 private:
  const TokenBytes* table_;
  std::vector<int32_t> order_;  // ids by their bytes
};

// The bytes that the text of one request must begin with. A token may come when it begins with all that is left of them, or is its
// beginning and leaves bytes that tokens can spell: there is no dead end.
class PrefixConstraint {
 public:
  PrefixConstraint(const TokenTrie* trie, std::string bytes);

  size_t size() const { return bytes_.size(); }
  // False: no sequence of tokens spells the bytes.
  bool possible() const { return spells_[0]; }
  // Sets bit t % 32 of mask[t / 32] for every token t that may come when the first `at` bytes are spelled, at < size(), by
  // tokens that were allowed; needs possible().
  void allow(size_t at, uint32_t* mask) const;
  size_t bytes_of(int32_t token) const { return trie_->bytes(token).size(); }

 private:
  const TokenTrie* trie_;
  std::string bytes_;
  std::vector<bool> spells_;  // [bytes + 1] tokens spell bytes_[i:], the last of them possibly more
};

// The constraint as a rule of a sequence.
class PrefixRule final : public LogitRules {
 public:
  // end_ids are banned from the first min_tokens tokens that do not lie wholly in the bytes.
  PrefixRule(PrefixConstraint constraint, int vocab, std::vector<int32_t> end_ids, int min_tokens)
      : constraint_(std::move(constraint)), mask_(size_t(mask_words(vocab))), end_ids_(std::move(end_ids)), min_tokens_(min_tokens) {}
  bool waits(const std::vector<int32_t>& generated) override;
  void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) override;
  bool looks_ahead() const override { return true; }

 private:
  struct Spelled {
    size_t bytes = 0;
    int within = 0;  // tokens that lie wholly in the constraint's
  };
  Spelled spelled(const std::vector<int32_t>& generated) const;

  const PrefixConstraint constraint_;
  std::vector<uint32_t> mask_;
  const std::vector<int32_t> end_ids_;
  const int min_tokens_;
};

}  // namespace codefuse
