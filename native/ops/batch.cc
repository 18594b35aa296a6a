#include "ops/batch.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "core/check.h"

namespace codefuse {

namespace {

void in_range(const char* what, int index, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    throw ValueError(cat("batch: ", what, "[", index, "] is ", value, "; expected ", low, " to ", high));
}

void size_is(const char* what, size_t found, size_t expected) {
  if (found != expected) throw ValueError(cat("batch: ", what, " has ", found, " elements; expected ", expected));
}

void check_edits(const Batch& b, int limit, int vocab) {
  if (b.edit_begin.empty() && b.edits.empty()) return;
  size_is("edit_begin", b.edit_begin.size(), size_t(b.samples()) + 1);
  const int end = int(b.edits.size());
  if (b.edit_begin.front() != 0 || b.edit_begin.back() != end)
    throw ValueError(cat("batch: edit_begin is ", b.edit_begin.front(), " to ", b.edit_begin.back(), "; expected 0 to ", end));
  for (int s = 0; s < b.samples(); ++s) {
    const int first = b.edit_begin[s];
    in_range("edit_begin", s + 1, b.edit_begin[s + 1], first, std::min(end, first + limit));
    for (int i = first; i < b.edit_begin[s + 1]; ++i) {
      const LogitEdit& e = b.edits[i];
      in_range("edits", i, e.token, i > first ? b.edits[i - 1].token + 1 : 0, vocab - 1);
      if (std::isnan(e.add) || !(e.penalty > 0) || std::isinf(e.penalty))
        throw ValueError(cat("batch: edits[", i, "] adds ", e.add, " with penalty ", e.penalty, "; expected a number, and a finite one above 0"));
    }
  }
}

void check_copies(const Batch& b, const Limits& limits) {
  if (b.copies.empty()) return;
  if (b.copies.size() > size_t(kDecodeRows)) throw ValueError(cat("batch: ", b.copies.size(), " copies; expected at most ", kDecodeRows));
  std::vector<int32_t> begin(size_t(limits.slots), INT32_MAX);  // [slots] position of the first row
  for (int t = 0; t < b.rows(); ++t) begin[size_t(b.slot[t])] = std::min(begin[size_t(b.slot[t])], b.position[t]);
  for (int i = 0; i < int(b.copies.size()); ++i) {
    const PageCopy& c = b.copies[size_t(i)];
    in_range("copies.from", i, c.from, 0, limits.pages - 1);
    in_range("copies.to", i, c.to, 0, limits.pages - 1);
    in_range("copies.tokens", i, c.tokens, 1, kPageTokens - 1);
    for (int j = 0; j < int(b.copies.size()); ++j)
      if (b.copies[size_t(j)].from == c.to || (i != j && b.copies[size_t(j)].to == c.to))
        throw ValueError(cat("batch: copy ", i, " writes page ", c.to, ", which copy ", j, " uses"));
    for (size_t n = 0; n < b.table_slot.size(); ++n) {
      const int32_t p = begin[size_t(b.table_slot[n])], pages = p == INT32_MAX ? 0 : p / kPageTokens + 1;
      const int32_t* table = b.table.data() + n * size_t(limits.max_pages());
      for (int32_t q = 0; q < pages; ++q)
        if (table[q] == c.to && (q + 1 < pages || p % kPageTokens < c.tokens))
          throw ValueError(cat("batch: copy ", i, " writes ", c.tokens, " tokens of page ", c.to, "; slot ", b.table_slot[n], " goes on at position ", p,
                               ", expected to be behind them in that page"));
    }
  }
}

void check_masks(const Batch& b, int vocab) {
  if (b.mask_of.empty() && b.masks.empty()) return;
  size_is("mask_of", b.mask_of.size(), size_t(b.samples()));
  const int words = mask_words(vocab), masks = int(b.masks.size()) / words;
  size_is("masks", b.masks.size(), size_t(std::min(masks, b.samples())) * size_t(words));
  for (int s = 0; s < b.samples(); ++s) in_range("mask_of", s, b.mask_of[s], -1, masks - 1);
  for (int m = 0; m < masks; ++m) {
    const uint32_t* word = b.masks.data() + size_t(m) * size_t(words);
    const uint32_t last = word[words - 1] << (31 - (vocab - 1) % 32);  // without the bits behind the vocabulary
    if (last == 0 && std::all_of(word, word + words - 1, [](uint32_t w) { return w == 0; }))
      throw ValueError(cat("batch: mask ", m, " allows no token"));
  }
}

}  // namespace

std::optional<KeptRows> kept_rows(const Batch& b) {
  if (b.decode_rows == b.rows()) return {};
  KeptRows kept;
  kept.from.resize(size_t(b.decode_rows));
  std::iota(kept.from.begin(), kept.from.end(), 0);
  for (const int32_t row : b.logit_row) {
    kept.logit_row.push_back(row < b.decode_rows ? row : int32_t(kept.from.size()));
    if (row >= b.decode_rows) kept.from.push_back(row);
  }
  if (int(kept.from.size()) >= b.rows()) return {};
  return kept;
}

void check_batch(const Batch& b, const Limits& limits, int vocab) {
  const int rows = b.rows(), samples = b.samples();
  if (rows < 1 || rows > limits.rows) throw ValueError(cat("batch: ", rows, " rows; expected 1 to ", limits.rows));
  if (b.decode_rows < 0 || b.decode_rows > rows || b.decode_rows > kDecodeRows)
    throw ValueError(cat("batch: ", b.decode_rows, " decode rows of ", rows, "; expected at most ", kDecodeRows));
  if (samples > kDecodeRows) throw ValueError(cat("batch: ", samples, " samples; expected at most ", kDecodeRows));
  size_is("slot", b.slot.size(), size_t(rows));
  size_is("position", b.position.size(), size_t(rows));
  size_is("sample", b.sample.size(), size_t(samples));
  size_is("table", b.table.size(), b.table_slot.size() * size_t(limits.max_pages()));

  std::vector<int> table_of(size_t(limits.slots), -1);
  for (int i = 0; i < int(b.table_slot.size()); ++i) {
    in_range("table_slot", i, b.table_slot[i], 0, limits.slots - 1);
    if (table_of[b.table_slot[i]] >= 0) throw ValueError(cat("batch: slot ", b.table_slot[i], " has two page tables"));
    table_of[b.table_slot[i]] = i;
  }
  std::vector<int> last(b.table_slot.size(), -kPageTokens);  // position of the last row of each table; none: before its first page
  for (int t = 0; t < rows; ++t) {
    if (b.token[t] != kLastToken) in_range("token", t, b.token[t], 0, vocab - 1);
    in_range("slot", t, b.slot[t], 0, limits.slots - 1);
    in_range("position", t, b.position[t], 0, limits.max_len - 1);
    const int table = table_of[b.slot[t]];
    if (table < 0) throw ValueError(cat("batch: slot ", b.slot[t], " of row ", t, " has no page table"));
    last[size_t(table)] = std::max(last[size_t(table)], b.position[t]);
  }
  for (size_t i = 0; i < last.size(); ++i)  // a row reads up to its own page; earlier ones were filled by earlier rows
    for (int p = 0; p <= last[i] / kPageTokens; ++p) {
      const int entry = int(i) * limits.max_pages() + p;
      in_range("table", entry, b.table[size_t(entry)], 0, limits.pages - 1);
    }
  check_copies(b, limits);
  int next = b.decode_rows;
  for (int i = 0; i < int(b.chunks.size()); ++i) {
    const Chunk& c = b.chunks[i];
    if (c.row != next || c.count < 1 || c.row + c.count > rows)
      throw ValueError(cat("batch: chunk ", i, " has rows ", c.row, " to ", c.row + c.count - 1, "; expected a run from row ", next));
    for (int j = 0; j < c.count; ++j)
      if (b.slot[c.row + j] != c.slot || b.position[c.row + j] != c.position + j)
        throw ValueError(cat("batch: row ", c.row + j, " is not token ", j, " of its chunk"));
    next += c.count;
  }
  if (next != rows) throw ValueError(cat("batch: chunks end at row ", next, " of ", rows));
  for (int s = 0; s < samples; ++s) in_range("top_tokens", s, b.sample[s].top_tokens, 0, kTopTokens);
  for (int s = 0; s < samples; ++s) in_range("logit_row", s, b.logit_row[s], 0, rows - 1);
  check_edits(b, limits.edits(vocab), vocab);
  check_masks(b, vocab);
}

}  // namespace codefuse
