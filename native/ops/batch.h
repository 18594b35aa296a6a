// One ragged step, as plain host data: what the scheduler makes and every device reads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace codefuse {

constexpr int kPageTokens = 32;     // tokens of one KV page
constexpr int kDecodeRows = 64;     // most decode rows of one step (columns of the streaming matrix kernel)
constexpr int kRuleEdits = 4096;    // logits that a request's own lists may edit, beyond those of the tokens of its text
constexpr int kTopTokens = 128;     // most likely tokens that a sample reports at most
constexpr int32_t kLastToken = -1;  // Batch::token: the token sampled last for this slot, still on the device

// How one row's next token is chosen. Fields hold validated values.
struct SampleParams {
  float temperature = 0.f;  // 0: greedy (argmax, lowest id on a tie)
  int top_k = 0;            // 0: off
  float top_p = 1.f;        // 1: off
  float min_p = 0.f;        // 0: off
  uint64_t seed = 0;
  int top_tokens = 0;       // most likely tokens to report, at most kTopTokens
  bool top_edited = false;  // they are those of the row after edits and mask
};

// What happens to one logit l before a token is chosen: l = (penalty == 1 ? l : l > 0 ? l / penalty : l * penalty) + add, in
// float32.
struct LogitEdit {
  int32_t token = 0;
  float add = 0.f;      // may be -inf, not NaN
  float penalty = 1.f;  // > 0, finite
};

// A set of allowed tokens: bit t % 32 of word t / 32 is token t; bits from vocab on do not matter.
constexpr int mask_words(int vocab) { return (vocab + 31) / 32; }

// A run of prompt tokens of one sequence.
struct Chunk {
  int row = 0;       // first row in the batch
  int count = 0;     // rows
  int slot = 0;
  int position = 0;  // position of the first row's token
};

// K and V of the first `tokens` places of one page, copied to another one in every layer before the rows of a step run.
struct PageCopy {
  int32_t from = 0, to = 0;
  int32_t tokens = 0;  // 1 .. kPageTokens - 1; the first row of the sequence that has page `to`, if in the step, goes there, behind them
};

// Rows [0, decode_rows) are decode rows: generated tokens, one row each, and short prompts (several of one sequence, in order of position,
// then or when it resumes). Rows [decode_rows, rows()) are prefill rows, grouped in chunks. A row attends to positions 0..its own; the
// rows' own K and V are stored before any row attends.
struct Batch {
  int decode_rows = 0;
  std::vector<int32_t> token;     // [rows] token id or kLastToken
  std::vector<int32_t> slot;      // [rows] sequence slot, 0 <= slot < slots
  std::vector<int32_t> position;  // [rows]
  std::vector<Chunk> chunks;      // prefill rows, in row order
  std::vector<PageCopy> copies;   // at most kDecodeRows, in no order: none reads a page that one writes

  std::vector<int32_t> logit_row;     // [samples] rows whose next token is sampled; decode rows first; samples <= kDecodeRows
  std::vector<SampleParams> sample;   // [samples]; position of the sampled token = position[row] + 1
  // Edits come first, then the mask; both vectors of a kind may be empty when no sample has any.
  std::vector<int32_t> edit_begin;    // [samples + 1] the sample's edits are edits[edit_begin[s]] .. before edits[edit_begin[s + 1]]
  std::vector<LogitEdit> edits;       // of one sample: tokens ascending, at most Limits::edits()
  std::vector<int32_t> mask_of;       // [samples] row of masks or -1
  std::vector<uint32_t> masks;        // [n, mask_words(vocab)], each with an allowed token

  // Page table of the sequences in this batch: table[i * max_pages + p] is the page of tokens [p*kPageTokens, ...) of the
  // sequence in slot table_slot[i].
  std::vector<int32_t> table_slot;    // [n]
  std::vector<int32_t> table;         // [n, max_pages]

  int rows() const { return int(token.size()); }
  int samples() const { return int(logit_row.size()); }
};

// The rows that are there after Ops::keep_sampled(), fewer than the batch has.
struct KeptRows {
  std::vector<int32_t> from;       // what each was; at most 2 kDecodeRows
  std::vector<int32_t> logit_row;  // [samples] which of them is sampled
};
std::optional<KeptRows> kept_rows(const Batch& batch);

// Result of one step, read one step behind.
struct Sampled {
  std::vector<int32_t> token;  // [samples]
  std::vector<float> logprob;  // [samples] log softmax of the raw logits at the token
  // [samples, kTopTokens] of each sample the first top_tokens: the most likely tokens by the raw logits, the lower id first on a tie,
  // and their log softmax; -1 behind the vocabulary's end. With top_edited by the edited logits, whose difference to the raw ones is added
  // to the log softmax; NaN for forbidden tokens. Empty when no sample asks.
  std::vector<int32_t> top_token;
  std::vector<float> top_logprob;
};

// Everything `forward` may need, fixed at load; a device allocates for it once.
struct Limits {
  int slots = 0;      // sequences alive at once, <= kDecodeRows
  int rows = 0;       // rows of one step (prefill chunk budget + decode rows)
  int max_len = 0;    // tokens of one sequence, prompt and generated
  int pages = 0;      // KV pages in the pool
  int max_pages() const { return (max_len + kPageTokens - 1) / kPageTokens; }
  int edits(int vocab) const { return std::min(vocab, max_len + kRuleEdits); }  // of one sample
};

// ValueError unless every field is in range and consistent; what a device may rely on.
void check_batch(const Batch& batch, const Limits& limits, int vocab);

}  // namespace codefuse
