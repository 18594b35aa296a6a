#include "engine/logit_rules.h"

#include <algorithm>
#include <limits>

namespace codefuse {

void LogitChanges::clear() {
  edits_.clear();
  mask_.clear();
}

void LogitChanges::ban(int32_t token) { edit(token, -std::numeric_limits<float>::infinity()); }

void LogitChanges::allow_only(const std::vector<uint32_t>& mask) {
  if (mask_.empty()) {
    mask_ = mask;
    return;
  }
  for (size_t i = 0; i < mask_.size(); ++i) mask_[i] &= mask[i];
}

void LogitChanges::append_to(Batch* b) {
  std::stable_sort(edits_.begin(), edits_.end(), [](const LogitEdit& x, const LogitEdit& y) { return x.token < y.token; });
  const size_t first = b->edits.size();
  for (const LogitEdit& e : edits_) {
    if (b->edits.size() > first && b->edits.back().token == e.token) {
      b->edits.back().add += e.add;
      b->edits.back().penalty *= e.penalty;
    } else {
      b->edits.push_back(e);
    }
  }
  b->edit_begin.push_back(int32_t(b->edits.size()));
  b->mask_of.push_back(mask_.empty() ? -1 : int32_t(b->masks.size() / mask_.size()));
  b->masks.insert(b->masks.end(), mask_.begin(), mask_.end());
}

}  // namespace codefuse
