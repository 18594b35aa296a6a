#include "engine/prefix_cache.h"

#include <algorithm>
#include <stdexcept>

#include "ops/batch.h"

namespace codefuse {

namespace {

int common(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const size_t n = std::min(a.size(), b.size());
  return int(std::mismatch(a.begin(), a.begin() + int64_t(n), b.begin()).first - a.begin());
}

}  // namespace

PrefixCache::PrefixCache(KvPages* pages) : pages_(pages) {}
PrefixCache::~PrefixCache() = default;

int PrefixCache::depth(Place place) { return place ? place->depth : 0; }

PrefixCache::Match PrefixCache::find(const std::string& salt, const std::vector<int32_t>& keys) {
  Match match;
  const auto root = roots_.find(salt);
  Node* node = root == roots_.end() ? nullptr : root->second.get();
  while (node && match.tokens < int(keys.size())) {
    const auto begin = keys.begin() + match.tokens;
    const Keys block(begin, begin + std::min<int64_t>(kPageTokens, keys.end() - begin));
    // the child with the most keys in common is next to where block itself would be
    const auto after = node->children.lower_bound(block);
    Node* best = nullptr;
    int most = 0;
    for (const auto& it : {after, after == node->children.begin() ? node->children.end() : std::prev(after)}) {
      if (it == node->children.end()) continue;
      const int n = common(it->first, block);
      if (n > most) most = n, best = it->second.get();
    }
    if (!best) break;
    pages_->share(best->page);
    match.tokens += most;
    if (most < kPageTokens) {
      match.partial = best->page;
      match.partial_tokens = most;
      break;
    }
    match.pages.push_back(best->page);
    match.place = node = best;
  }
  return match;
}

PrefixCache::Place PrefixCache::insert(const std::string& salt, Place place, const std::vector<int32_t>& keys, std::vector<int32_t>* pages) {
  Node* node = place;
  if (!node) {
    std::unique_ptr<Node>& root = roots_[salt];
    if (!root) {
      root = std::make_unique<Node>();
      root->salt = salt;
    }
    node = root.get();
  }
  for (size_t at = 0; at < keys.size(); at += kPageTokens) {
    Keys block(keys.begin() + int64_t(at), keys.begin() + int64_t(std::min(keys.size(), at + kPageTokens)));
    const bool full = int(block.size()) == kPageTokens;
    int32_t& page = (*pages)[size_t(node->depth)];
    const auto after = node->children.lower_bound(block);
    Node* next = nullptr;
    if (after != node->children.end() && common(after->first, block) == int(block.size())) {
      next = after->second.get();  // has these keys, and perhaps more
      if (full && next->page != page) {
        pages_->share(next->page);
        pages_->release(page);
        page = next->page;
      }
    } else if (after != node->children.begin()) {
      const auto before = std::prev(after);
      if (common(before->first, block) == int(before->first.size())) {  // has fewer: block takes its place
        Node* const shorter = before->second.get();
        if (shorter->page == page) {
          auto handle = node->children.extract(before);
          handle.key() = block;
          next = shorter;
          next->self = node->children.insert(std::move(handle)).position;
        } else {
          remove(shorter);
        }
      }
    }
    if (!next) next = add(node, std::move(block), page);
    stamp(next);
    if (!full) break;
    node = next;
  }
  return node->parent ? node : nullptr;
}

void PrefixCache::touch(Place place) {
  for (Node* n = place; n && n->parent; n = n->parent) stamp(n);
}

bool PrefixCache::evict() {
  for (const auto& leaf : leaves_) {
    if (pages_->references(leaf.second->page) > 0) continue;
    Node* const parent = leaf.second->parent;
    remove(leaf.second);
    if (!parent->parent && parent->children.empty()) roots_.erase(parent->salt);
    ++evictions_;
    return true;
  }
  return false;
}

PrefixCache::Node* PrefixCache::add(Node* parent, Keys keys, int32_t page) {
  pages_->keep(page);
  if (parent->parent && parent->children.empty()) leaves_.erase({parent->used, parent});
  const auto [it, added] = parent->children.emplace(std::move(keys), std::make_unique<Node>());
  if (!added) throw std::logic_error("PrefixCache: a node is added twice");
  Node* node = it->second.get();
  node->parent = parent;
  node->page = page;
  node->depth = parent->depth + 1;
  node->self = it;
  ++nodes_;
  return node;
}

void PrefixCache::remove(Node* leaf) {
  Node* const parent = leaf->parent;
  pages_->drop(leaf->page);
  leaves_.erase({leaf->used, leaf});
  parent->children.erase(leaf->self);
  --nodes_;
  if (parent->parent && parent->children.empty()) leaves_.emplace(parent->used, parent);
}

void PrefixCache::stamp(Node* node) {
  if (node->children.empty()) leaves_.erase({node->used, node});
  node->used = ++clock_;
  if (node->children.empty()) leaves_.emplace(node->used, node);
}

}  // namespace codefuse
