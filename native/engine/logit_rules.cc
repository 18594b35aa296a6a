#include "engine/logit_rules.h"

#include <algorithm>
#include <limits>

namespace codefuse {

void LogitChanges::clear() {
  edits_.clear();
  mask_.clear();
  forbidden_.clear();
}

void LogitChanges::ban(int32_t token) { edit(token, -std::numeric_limits<float>::infinity()); }

void LogitChanges::allow_only(const std::vector<uint32_t>& mask) {
  if (mask_.empty()) {
    mask_ = mask;
    return;
  }
  for (size_t i = 0; i < mask_.size(); ++i) mask_[i] &= mask[i];
}

void LogitChanges::forbid(const std::vector<uint32_t>& mask, int vocab) {
  forbidden_.resize(mask.size(), 0);
  for (size_t i = 0; i < mask.size(); ++i) forbidden_[i] |= mask[i];
  if (vocab % 32 != 0) forbidden_.back() |= ~0u << (vocab % 32);
}

void LogitChanges::append_to(Batch* b) {
  const auto before = [](const LogitEdit& x, const LogitEdit& y) { return x.token < y.token; };
  if (!std::is_sorted(edits_.begin(), edits_.end(), before)) std::stable_sort(edits_.begin(), edits_.end(), before);
  const size_t first = b->edits.size();
  for (const LogitEdit& e : edits_) {
    if (b->edits.size() > first && b->edits.back().token == e.token) {
      b->edits.back().add = add_bias(b->edits.back().add, e.add);
      b->edits.back().penalty *= e.penalty;
    } else {
      b->edits.push_back(e);
    }
  }
  b->edit_begin.push_back(int32_t(b->edits.size()));
  if (!forbidden_.empty()) {
    if (mask_.empty()) mask_.assign(forbidden_.size(), ~0u);
    uint32_t left = 0;
    for (size_t i = 0; i < mask_.size(); ++i) left |= mask_[i] & ~forbidden_[i];
    for (size_t i = 0; left != 0 && i < mask_.size(); ++i) mask_[i] &= ~forbidden_[i];
  }
  b->mask_of.push_back(mask_.empty() ? -1 : int32_t(b->masks.size() / mask_.size()));
  b->masks.insert(b->masks.end(), mask_.begin(), mask_.end());
}

}  // namespace codefuse
