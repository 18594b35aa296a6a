#include "engine/kv_pages.h"

#include <stdexcept>

namespace codefuse {

KvPages::KvPages(int pages) : references_(size_t(pages), 0), kept_(size_t(pages), 0) {
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
  if (references_[size_t(page)] < 1 && !kept_[size_t(page)]) throw std::logic_error("KvPages::share of a free page");
  if (references_[size_t(page)]++ == 0) --idle_;
}

void KvPages::release(int32_t page) {
  if (references_[size_t(page)] < 1) throw std::logic_error("KvPages::release of a page without references");
  if (--references_[size_t(page)] > 0) return;
  if (kept_[size_t(page)])
    ++idle_;
  else
    free_.push_back(page);
}

void KvPages::keep(int32_t page) {
  if (references_[size_t(page)] < 1 || kept_[size_t(page)]) throw std::logic_error("KvPages::keep of a page that is free or kept");
  kept_[size_t(page)] = 1;
}

void KvPages::drop(int32_t page) {
  if (!kept_[size_t(page)]) throw std::logic_error("KvPages::drop of a page that is not kept");
  kept_[size_t(page)] = 0;
  if (references_[size_t(page)] > 0) return;
  --idle_;
  free_.push_back(page);
}

}  // namespace codefuse
