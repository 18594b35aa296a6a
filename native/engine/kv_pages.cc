#include "engine/kv_pages.h"

#include <stdexcept>

namespace codefuse {

KvPages::KvPages(int pages) : references_(size_t(pages), 0) {
  free_.reserve(size_t(pages));
  for (int p = pages - 1; p >= 0; --p) free_.push_back(p);
}

int32_t KvPages::take() {
  if (free_.empty()) return -1;
  int32_t page = free_.back();
  free_.pop_back();
  references_[size_t(page)] = 1;
  return page;
}

void KvPages::share(int32_t page) {
  if (references_[size_t(page)] < 1) throw std::logic_error("KvPages::share of a free page");
  ++references_[size_t(page)];
}

void KvPages::release(int32_t page) {
  if (references_[size_t(page)] < 1) throw std::logic_error("KvPages::release of a free page");
  if (--references_[size_t(page)] == 0) free_.push_back(page);
}

}  // namespace codefuse
