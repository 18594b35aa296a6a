// The pool of KV pages: which are free, and how many sequences refer to each.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace codefuse {

class KvPages {
 public:
  explicit KvPages(int pages);

  int total() const { return int(references_.size()); }
  int free() const { return int(free_.size()); }
  int references(int32_t page) const { return references_[size_t(page)]; }

  int32_t take();             // a page with one reference; -1 when none is free
  void share(int32_t page);   // one more reference
  void release(int32_t page); // one less; free at zero

 private:
  std::vector<int32_t> free_;        // last in, first out: a page still in the device's cache is reused first
  std::vector<int32_t> references_;  // [pages]
};

}  // namespace codefuse
