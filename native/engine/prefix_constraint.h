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

// What is left of the bytes that the text of one request must begin with. Each token either begins with all that is left, or is
// its beginning and leaves bytes that tokens can spell: there is no dead end.
class PrefixConstraint {
 public:
  PrefixConstraint(const TokenTrie* trie, std::string bytes);

  // False: no sequence of tokens spells the bytes.
  bool possible() const { return done() || spells_[0]; }
  bool done() const { return at_ >= bytes_.size(); }
  size_t left() const { return done() ? 0 : bytes_.size() - at_; }
  // Sets bit t % 32 of mask[t / 32] for every token t that may come next; needs possible() and not done().
  void allow(uint32_t* mask) const;
  // A token that was allowed; true when it lies wholly in the bytes.
  bool next(int32_t token) { return (at_ += trie_->bytes(token).size()) <= bytes_.size(); }

 private:
  const TokenTrie* trie_;
  std::string bytes_;
  std::vector<bool> spells_;  // [bytes + 1] tokens spell bytes_[i:], the last of them possibly more
  size_t at_ = 0;             // bytes spelled
};

// The constraint as a rule of a sequence.
class PrefixRule final : public LogitRules {
 public:
  // end_ids are banned from the first min_tokens tokens that do not lie wholly in the bytes.
  PrefixRule(PrefixConstraint constraint, int vocab, std::vector<int32_t> end_ids, int min_tokens)
      : constraint_(std::move(constraint)), mask_(size_t(mask_words(vocab))), end_ids_(std::move(end_ids)), min_tokens_(min_tokens) {}
  bool waits(const std::vector<int32_t>& generated) override;
  void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) override;

 private:
  PrefixConstraint constraint_;
  std::vector<uint32_t> mask_;
  const std::vector<int32_t> end_ids_;
  const int min_tokens_;
  size_t seen_ = 0;  // tokens that the constraint has taken
  int within_ = 0;   // those of them that lie wholly in the bytes
};

}  // namespace codefuse
