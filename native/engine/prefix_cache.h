// Which KV pages hold the keys and values of which tokens: a tree of pages, so that a sequence takes over what another one with
// the same beginning has computed, to the token. Holds token keys and page numbers, no tensors.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/kv_pages.h"

namespace codefuse {

// A key stands for one token and all that its K and V depend on besides the tokens before it. Trees of different salts share nothing.
//
// A node is one page that the cache keeps; its children are the pages that may follow. A page with kPageTokens keys is full: it never
// changes, and any number of sequences may read it in place. One with fewer has no children, its sequence may still be filling it,
// and its tokens are copied, never shared. No node's keys begin with all the keys of a sibling.
class PrefixCache {
 private:
  struct Node;

 public:
  explicit PrefixCache(KvPages* pages);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // Where a sequence stands in the tree: its full pages so far. Valid while it holds a reference to each of them.
  using Place = Node*;
  struct Match {
    std::vector<int32_t> pages;  // full ones, in order
    Place place = nullptr;
    int32_t partial = -1;        // page whose first partial_tokens tokens come next, or -1
    int partial_tokens = 0;
    int tokens = 0;              // in all
  };

  // The longest prefix of keys that is cached. Takes a reference to every page of the match.
  Match find(const std::string& salt, const std::vector<int32_t>& keys);

  // Keeps the pages of a sequence that hold `keys`, which come behind the full pages of `place` (nullptr: there are none). `pages` are all of
  // the sequence; a full one whose keys the cache has in another page is replaced by that one. Returns the place now.
  Place insert(const std::string& salt, Place place, const std::vector<int32_t>& keys, std::vector<int32_t>* pages);

  // Marks a place and all before it as used now, the deepest first.
  void touch(Place place);

  // Frees the page that was used longest ago and that no sequence refers to; false when there is none.
  bool evict();

  static int depth(Place place);  // full pages up to place
  int nodes() const { return nodes_; }
  int64_t evictions() const { return evictions_; }

 private:
  using Keys = std::vector<int32_t>;
  using Children = std::map<Keys, std::unique_ptr<Node>>;
  struct Node {
    Node* parent = nullptr;  // nullptr: the root of a salt
    int32_t page = -1;
    int depth = 0;
    uint64_t used = 0;       // unique; 0: a root
    Children children;
    Children::iterator self;  // in parent->children
    std::string salt;         // of a root
  };

  Node* add(Node* parent, Keys keys, int32_t page);
  void remove(Node* leaf);
  void stamp(Node* node);

  KvPages* pages_;
  std::map<std::string, std::unique_ptr<Node>> roots_;
  std::set<std::pair<uint64_t, Node*>> leaves_;  // oldest first
  uint64_t clock_ = 0;
  int nodes_ = 0;
  int64_t evictions_ = 0;
};

}  // namespace codefuse
