// The pool of KV pages: which are free, how many sequences refer to each, and which the prefix cache keeps.
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
  int idle() const { return idle_; }  // kept, with no sequence referring to it
  int references(int32_t page) const { return references_[size_t(page)]; }  // of sequences

  int32_t take();             // a page with one reference; -1 when none is free
  void share(int32_t page);   // one more reference, of a page that has one or is kept
  void release(int32_t page); // one less; at zero free, unless kept
  void keep(int32_t page);    // of a page with a reference: not freed before drop()
  void drop(int32_t page);    // no longer kept

 private:
  std::vector<int32_t> free_;        // last in, first out: a page still in the device's cache is reused first
  std::vector<int32_t> references_;  // [pages]
  std::vector<char> kept_;           // [pages]
  int idle_ = 0;
};

}  // namespace codefuse
