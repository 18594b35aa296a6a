#include "engine/scheduler.h"

#include <algorithm>

#include "core/check.h"

namespace codefuse {

Scheduler::Scheduler(const Limits& limits, int prefill_rows, Reuse reuse, int short_prompt)
    : limits_(limits),
      prefill_rows_(std::min(prefill_rows, limits.rows - limits.slots)),
      decode_limit_(std::min(kDecodeRows, limits.rows)),
      short_prompt_(short_prompt),
      reuse_(reuse),
      pages_(limits.pages),
      cache_(&pages_) {
  if (limits.slots < 1 || limits.slots > kDecodeRows)
    throw ValueError(cat("slots is ", limits.slots, "; expected 1..", kDecodeRows));
  if (prefill_rows_ < 1)
    throw ValueError(cat("prefill rows are ", prefill_rows, " of ", limits.rows, " rows with ", limits.slots, " slots; expected at least 1"));
  for (int s = limits.slots - 1; s >= 0; --s) free_slots_.push_back(s);
}

void Scheduler::add(int64_t uid, std::vector<int32_t> prompt, int max_tokens, const SampleParams& sample, RuleList rules, std::string salt,
                    int64_t ahead_of, std::vector<int32_t> guess) {
  auto s = std::make_unique<Sequence>();
  s->uid = uid;
  s->prompt = std::move(prompt);
  s->max_tokens = max_tokens;
  s->sample = sample;
  s->rules = std::move(rules);
  const int samples = int(guess.size()) + 1;
  const bool is_short = s->prompt_size() <= short_prompt_;
  if (!is_short && samples <= prefill_rows_ && samples <= max_tokens && limits_.slots + int(guess.size()) <= kDecodeRows &&
      std::all_of(s->rules.begin(), s->rules.end(), [](const auto& rule) { return rule->looks_ahead(); }))
    s->guess = std::move(guess);
  s->chunked = is_short ? 0 : s->prompt_size() + int(s->guess.size());
  s->salt = std::move(salt);
  const auto place = ahead_of == kAll ? waiting_.begin() : std::find_if(waiting_.begin(), waiting_.end(), [&](const Sequence* w) {
    return w->uid == ahead_of && !w->started;
  });
  waiting_.insert(place, s.get());
  all_.emplace(uid, std::move(s));
}

bool Scheduler::schedule(Batch* batch, Step* step) {
  *step = Step();
  batch->decode_rows = 0;
  batch->token.clear();
  batch->slot.clear();
  batch->position.clear();
  batch->chunks.clear();
  batch->copies.clear();
  batch->logit_row.clear();
  batch->sample.clear();
  batch->edit_begin.assign(1, 0);
  batch->edits.clear();
  batch->mask_of.clear();
  batch->masks.clear();
  batch->table_slot.clear();
  batch->table.clear();

  grow_decoding();
  admit(batch, step);
  put_decode_rows(batch, step);
  put_chunks(batch, step);
  if (batch->edits.empty()) batch->edit_begin.clear();
  if (batch->masks.empty()) batch->mask_of.clear();
  for (int32_t page : copied_) pages_.release(page);
  copied_.clear();
  retire_complete();
  return batch->rows() > 0;
}

bool Scheduler::accept(int64_t uid, int32_t token) {
  auto it = all_.find(uid);
  if (it == all_.end()) return false;
  Sequence& s = *it->second;
  if (s.dropped > 0) {
    --s.dropped;
    return false;
  }
  s.generated.push_back(token);
  --s.in_flight;
  if (s.guess.empty()) return true;
  const size_t right = s.generated.size() - 1;
  if (right < s.guess.size() && s.guess[right] == token) return true;
  s.guess.clear();
  s.dropped = s.in_flight;
  s.in_flight = 0;
  s.chunked = s.prompt_size() + int(right);
  s.computed = std::min(s.computed, s.chunked);  // 0 if it was preempted meanwhile
  return true;
}

void Scheduler::limit(int64_t uid, int tokens) {
  Sequence& s = *all_.at(uid);
  s.max_tokens = std::min(s.max_tokens, s.chosen() + tokens);
}

void Scheduler::remove(int64_t uid) {
  auto it = all_.find(uid);
  if (it == all_.end()) return;
  Sequence* s = it->second.get();
  release(*s);
  running_.erase(std::remove(running_.begin(), running_.end(), s), running_.end());
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), s), waiting_.end());
  all_.erase(it);
}

bool Scheduler::grow(Sequence& s, int tokens) {
  while (int(s.pages.size()) < pages_for(tokens)) {
    if (pages_.free() == 0 && !cache_.evict()) return false;
    s.pages.push_back(pages_.take());
  }
  return true;
}

// Pages for the decode rows of this step, oldest sequence first. Only sequences behind the one in hand are preempted.
void Scheduler::grow_decoding() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* s = running_[i];
    if (!s->prefilled()) continue;
    while (s->slot >= 0 && !grow(*s, s->total())) preempt_youngest();
  }
}

void Scheduler::admit(Batch* batch, Step* step) {
  int backlog = 0;  // prompt rows of running sequences
  int reserve = 0;  // pages left for running sequences that are still growing, one each
  for (Sequence* s : running_) {
    backlog += std::max(0, s->prompt_rows() - s->computed);
    reserve += pages_for(s->at_most()) > int(s->pages.size());
  }
  bool published = reuse_ == Reuse::none;
  while (!waiting_.empty() && !free_slots_.empty() && backlog < prefill_rows_) {
    Sequence* s = waiting_.front();
    if (s->in_flight > 0) break;  // preempted with a token on its way
    if (!published)
      for (Sequence* r : running_) publish(*r, reuse_ == Reuse::any_rows ? r->known() : r->certain());
    published = true;
    const int first = std::min(std::max(s->known(), s->prompt_rows()) + 1, s->at_most());  // room to go on, or it would be preempted again at once
    PrefixCache::Match match = find(*s);
    const auto fits = [&] {
      return free_pages() >= pages_for(first) - int(match.pages.size()) + (running_.empty() ? 0 : reserve);
    };
    if (match.partial >= 0 && !fits()) {  // without the page to copy from, which a small pool may not have beside the copy
      pages_.release(match.partial);
      match.tokens -= match.partial_tokens;
      match.partial = -1;
    }
    if (!fits() || is_coming(*s, match.tokens)) {
      for (int32_t page : match.pages) pages_.release(page);
      if (match.partial >= 0) pages_.release(match.partial);
      break;
    }
    waiting_.pop_front();
    s->slot = free_slots_.back();
    free_slots_.pop_back();
    s->pages = std::move(match.pages);
    s->place = match.place;
    s->computed = match.tokens;
    s->published = PrefixCache::depth(match.place) * kPageTokens;
    const size_t copy = s->pages.size();
    grow(*s, first);
    if (match.partial >= 0) {
      batch->copies.push_back({match.partial, s->pages[copy], match.partial_tokens});
      copied_.push_back(match.partial);
    }
    running_.push_back(s);
    backlog += std::max(0, s->prompt_rows() - s->computed);
    reserve += pages_for(s->at_most()) > pages_for(first);
    if (!s->started) step->admitted.push_back({s->uid, s->computed});
    s->started = true;
  }
}

bool Scheduler::needs_results() const {
  int decoding = 0, waiting = 0;
  for (const Sequence* s : running_) {
    if (!s->prefilled()) continue;
    ++decoding;
    waiting += waits(*s);
  }
  return waiting > 0 && waiting * 8 >= decoding;
}

bool Scheduler::waits(const Sequence& s) {
  return s.in_flight > 0 && std::any_of(s.rules.begin(), s.rules.end(), [&](const auto& rule) { return rule->waits(s.generated); });
}

// What the K and V of token i depend on besides the tokens before it: the token and, unless it makes no difference, the kind of row.
int32_t Scheduler::key(const Sequence& s, int i) const {
  return s.token(i) * 2 + (reuse_ == Reuse::same_rows && i >= s.chunked);
}

// Lets others take over what the rows of the first `tokens` tokens have computed, as far as they were launched.
void Scheduler::publish(Sequence& s, int tokens) {
  const int n = std::min(tokens, s.computed);
  if (n <= s.published) return;
  std::vector<int32_t> keys;
  for (int i = PrefixCache::depth(s.place) * kPageTokens; i < n; ++i) keys.push_back(key(s, i));
  s.place = cache_.insert(s.salt, s.place, keys, &s.pages);
  s.published = n;
}

PrefixCache::Match Scheduler::find(const Sequence& s) {
  if (reuse_ == Reuse::none) return {};
  std::vector<int32_t> keys;
  for (int i = 0; i + 1 < s.known(); ++i) keys.push_back(key(s, i));
  return cache_.find(s.salt, keys);
}

// A running sequence is computing a prefix of s that is worth waiting for.
bool Scheduler::is_coming(const Sequence& s, int cached) const {
  if (reuse_ == Reuse::none) return false;
  for (const Sequence* r : running_) {
    if (r->prefilled() || r->salt != s.salt) continue;
    const int most = std::min(s.prompt_size() - 1, r->prompt_size());
    if (most < cached + kPageTokens) continue;
    const auto end = std::mismatch(s.prompt.begin(), s.prompt.begin() + most, r->prompt.begin()).first;
    if (end - s.prompt.begin() >= cached + kPageTokens) return true;
  }
  return false;
}

void Scheduler::put_row(Batch* batch, const Sequence& s, int32_t token, int position) {
  batch->token.push_back(token);
  batch->slot.push_back(s.slot);
  batch->position.push_back(position);
}

// generated: the known tokens, or as far as they are guessed.
void Scheduler::put_sample(Batch* batch, Step* step, Sequence& s, int row, const std::vector<int32_t>& generated) {
  batch->logit_row.push_back(row);
  batch->sample.push_back(s.sample);
  changes_.clear();
  for (const auto& rule : s.rules) rule->prepare(generated, s.chosen(), &changes_);
  changes_.append_to(batch);
  step->sampled.push_back(s.uid);
  ++s.in_flight;
}

// Of the last row of the prompt and those of the guess, which are the last rows.
void Scheduler::put_guessed_samples(Batch* batch, Step* step, Sequence& s) {
  std::vector<int32_t> generated;
  for (size_t i = 0; i < s.guess.size(); ++i) {
    put_sample(batch, step, s, batch->rows() - 1 - int(s.guess.size() - i), generated);
    generated.push_back(s.guess[i]);
  }
  put_sample(batch, step, s, batch->rows() - 1, generated);
}

void Scheduler::put_decode_rows(Batch* batch, Step* step) {
  int decoding = 0;
  for (const Sequence* s : running_) decoding += s->prefilled();
  int spare = decode_limit_ - decoding;  // for short prompts and sequences that run several generated tokens again
  for (Sequence* s : running_) {
    if (!s->prefilled() || !s->guess.empty() || waits(*s)) continue;
    int rows = std::min(s->total() - s->computed, 1 + spare);
    spare -= rows - 1;
    put_table(batch, *s);
    for (int r = 0; r < rows; ++r, ++s->computed) {
      step->prompt_rows += s->computed < s->prompt_size();
      put_row(batch, *s, s->computed < s->known() ? s->token(s->computed) : kLastToken, s->computed);
    }
    if (s->computed == s->total()) put_sample(batch, step, *s, batch->rows() - 1, s->generated);
  }
  batch->decode_rows = batch->rows();
}

void Scheduler::put_chunks(Batch* batch, Step* step) {
  int budget = std::min(prefill_rows_, limits_.rows - batch->decode_rows);
  int spare = kDecodeRows - limits_.slots;  // samples beyond one of each sequence
  for (Sequence* s : running_) {
    if (budget == 0) break;
    if (s->prefilled()) continue;
    const int left = s->chunked - s->computed, samples = s->generated.empty() ? 1 + int(s->guess.size()) : 0;
    int count = std::min(left, budget);
    if (left - count < samples && (count < left || samples - 1 > spare)) count = left - samples;  // sampled rows run in one step
    if (count <= 0) continue;
    budget -= count;
    put_table(batch, *s);
    batch->chunks.push_back({batch->rows(), count, s->slot, s->computed});
    for (int r = 0; r < count; ++r, ++s->computed) put_row(batch, *s, s->token(s->computed), s->computed);
    if (!s->prefilled() || samples == 0) continue;
    put_guessed_samples(batch, step, *s);
    spare -= samples - 1;
  }
  step->prompt_rows += batch->rows() - batch->decode_rows;
}

void Scheduler::put_table(Batch* batch, const Sequence& s) {
  size_t begin = batch->table.size();
  batch->table_slot.push_back(s.slot);
  batch->table.resize(begin + size_t(limits_.max_pages()), 0);
  std::copy(s.pages.begin(), s.pages.end(), batch->table.begin() + int64_t(begin));
}

void Scheduler::preempt_youngest() {
  Sequence* s = running_.back();
  running_.pop_back();
  release(*s, true);
  waiting_.push_front(s);
  ++preemptions_;
}

// A sequence whose last token is being sampled needs neither slot nor pages: later steps run after this one.
void Scheduler::retire_complete() {
  auto complete = [this](Sequence* s) {
    if (!s->guess.empty() || s->chosen() < s->max_tokens) return false;
    release(*s);
    return true;
  };
  running_.erase(std::remove_if(running_.begin(), running_.end(), complete), running_.end());
}

// resumes: it will run the same rows again.
void Scheduler::release(Sequence& s, bool resumes) {
  if (!s.pages.empty() && reuse_ != Reuse::none) {
    publish(s, resumes || reuse_ == Reuse::any_rows ? s.known() : s.prompt_size());
    cache_.touch(s.place);
  }
  for (int32_t page : s.pages) pages_.release(page);
  s.pages.clear();
  s.place = nullptr;
  s.computed = s.published = 0;
  if (s.slot >= 0) free_slots_.push_back(s.slot);
  s.slot = -1;
}

}  // namespace codefuse
