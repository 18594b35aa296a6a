// Which rows run in the next step: continuous batching over a fixed number of slots and a pool of KV pages.
// Holds token ids, slots and pages, no tensors. Not thread-safe: the engine's thread owns it.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/kv_pages.h"
#include "engine/logit_rules.h"
#include "engine/prefix_cache.h"
#include "ops/batch.h"

namespace codefuse {

// What a sequence may take over of the K and V that others have computed for the same tokens after the same tokens.
enum class Reuse : uint8_t {
  none,
  same_rows,  // what a row of the kind that the sequence itself would run has computed: prompt tokens those of prompts
  any_rows,   // generated tokens too, where a prompt continues another request's text
};

struct Admission {
  int64_t uid;
  int cached;  // tokens of the prompt that others had computed
};

// What the engine must remember about a launched step to read its results.
struct Step {
  std::vector<int64_t> sampled;   // [samples] uid whose next token each sample is
  std::vector<Admission> admitted;  // that got their first rows in this step
  int prompt_rows = 0;  // rows of prompt tokens
};

// A prompt of at most so many tokens runs as decode rows: reading the weights takes as long as for one row, and prefill rows take longer
// when they are few. Longer ones run as prefill rows, in chunks.
constexpr int kShortPrompt = 32;

// Sequences are first come, first served. A running sequence that needs a page when none is free preempts the youngest
// running one, which loses slot and pages and goes back to the head of the queue; on resumption its prompt runs as prefill
// rows and its generated tokens as decode rows, so every row is computed as it was the first time. The oldest sequence
// can take every page and fits the pool, so it always advances and none starves.
//
// The pages that sequences leave behind stay in the prefix cache until a page is needed and none is free; then the one used
// longest ago goes, before any sequence is preempted. A sequence reads full pages of the cache in place and copies the beginning
// of one more. At least its last token is computed. While a running sequence computes a prefix that a waiting one could take over
// and that is a page longer than what the cache has, that one waits.
//
// schedule() may run before the previous step's tokens are known: such a row carries kLastToken. A sequence whose rules wait
// gets no row then, until its token is known.
//
// What the first generated tokens probably are may be said beforehand, a guess: they run with the prompt, and every one of these
// rows is sampled. Tokens count up to the first that was not guessed, which takes the place of the guess; so right guesses cost no
// step. The rows of right guesses are prompt rows for good.
class Scheduler {
 public:
  // prefill_rows: prompt tokens of one step at most. short_prompt: prompts of at most so many tokens run as decode rows (kShortPrompt where
  // those are another kind, else 0).
  Scheduler(const Limits& limits, int prefill_rows, Reuse reuse, int short_prompt);

  const Limits& limits() const { return limits_; }
  // Pages of a sequence at its longest; its last token is never fed back.
  static int pages_for(int tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

  // 1 <= prompt.size(), prompt.size() + max_tokens <= max_len, pages_for(prompt + max_tokens - 1) <= pages.
  // salt: sequences of different salts take over nothing from each other. ahead_of: goes to the place before that one, if it still waits
  // for its first row, or before all.
  // guess: not used with rules that do not look ahead, short prompts, nor where prefill_rows or samples of a step are few.
  static constexpr int64_t kAll = -1;
  void add(int64_t uid, std::vector<int32_t> prompt, int max_tokens, const SampleParams& sample, RuleList rules = {}, std::string salt = {},
           int64_t ahead_of = 0, std::vector<int32_t> guess = {});

  // Fills batch and step with the next rows; false when nothing can run before results arrive or requests are added.
  bool schedule(Batch* batch, Step* step);

  // Whether the next step should be scheduled only when results have arrived: at least one in eight sequences that decode waits for
  // its token. A step without them costs as much as one with them.
  bool needs_results() const;

  // Result of one sample, in step order. False: the sequence is gone, or the sample is behind a wrong guess; the token is to be dropped.
  bool accept(int64_t uid, int32_t token);

  // The sequence gets at most so many more tokens; none of it is in flight.
  void limit(int64_t uid, int tokens);

  // Finished or cancelled, wherever it is: slot and pages are free for the next step.
  void remove(int64_t uid);

  int running() const { return int(running_.size()); }
  int waiting() const { return int(waiting_.size()); }
  int free_pages() const { return pages_.free() + pages_.idle(); }  // that no sequence holds
  int cached_pages() const { return pages_.idle(); }                // those among them whose content may still be taken over
  int64_t evictions() const { return cache_.evictions(); }
  int64_t preemptions() const { return preemptions_; }

 private:
  struct Sequence {
    int64_t uid;
    std::vector<int32_t> prompt, generated;
    std::vector<int32_t> guess;  // what generated is taken to begin with; empty when it is known
    int dropped = 0;             // samples in flight behind a wrong guess
    int max_tokens;
    SampleParams sample;
    RuleList rules;
    std::string salt;
    int slot = -1;
    std::vector<int32_t> pages;
    PrefixCache::Place place = nullptr;
    int published = 0;  // tokens in the cache
    int computed = 0;   // tokens whose rows were launched since admission, or taken over
    int in_flight = 0;  // tokens being sampled
    bool started = false;
    int chunked = 0;    // tokens that run as prefill rows: all of the prompt and of the guess, as far as it is right, or none

    int prompt_size() const { return int(prompt.size()); }
    int known() const { return int(prompt.size() + generated.size()); }
    int total() const { return known() + in_flight; }
    int at_most() const { return prompt_size() + max_tokens - 1; }
    bool prefilled() const { return computed >= chunked; }
    int prompt_rows() const { return std::max(prompt_size(), chunked); }  // tokens that run with the prompt
    int certain() const { return guess.empty() ? prompt_rows() : prompt_size(); }  // of them, those that are known
    int chosen() const { return int(generated.size()) + in_flight; }
    int32_t token(int i) const { return i < prompt_size() ? prompt[size_t(i)] : (guess.empty() ? generated : guess)[size_t(i - prompt_size())]; }
  };

  int32_t key(const Sequence& s, int i) const;
  void publish(Sequence& s, int tokens);
  PrefixCache::Match find(const Sequence& s);
  bool is_coming(const Sequence& s, int cached) const;
  bool grow(Sequence& s, int tokens);
  void grow_decoding();
  void admit(Batch* batch, Step* step);
  static bool waits(const Sequence& s);
  void put_row(Batch* batch, const Sequence& s, int32_t token, int position);
  void put_sample(Batch* batch, Step* step, Sequence& s, int row, const std::vector<int32_t>& generated);
  void put_guessed_samples(Batch* batch, Step* step, Sequence& s);
  void put_decode_rows(Batch* batch, Step* step);
  void put_chunks(Batch* batch, Step* step);
  void put_table(Batch* batch, const Sequence& s);
  void preempt_youngest();
  void retire_complete();
  void release(Sequence& s, bool resumes = false);

  Limits limits_;
  int prefill_rows_, decode_limit_, short_prompt_;
  Reuse reuse_;
  KvPages pages_;
  PrefixCache cache_;
  std::vector<int32_t> copied_;  // pages that this step copies from, held until it is complete
  std::vector<int32_t> free_slots_;
  std::unordered_map<int64_t, std::unique_ptr<Sequence>> all_;
  std::vector<Sequence*> running_;  // oldest first
  std::deque<Sequence*> waiting_;   // oldest first
  LogitChanges changes_;            // of the sample in hand
  int64_t preemptions_ = 0;
};

}  // namespace codefuse
