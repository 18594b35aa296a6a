// The engine's thread: commands, steps, what becomes of their tokens.
#include <algorithm>

#include "engine/engine.h"

namespace codefuse {

namespace {

int64_t samples_of(const Step& s) { return int64_t(s.sampled.size()); }

}  // namespace

// At most depth_ steps are in flight; the host's work on one overlaps the device's on the next.
void Engine::serve() {
  while (take_commands()) {
    while (launches_ > collects_ && scheduler_.needs_results()) collect();
    const bool launched = launch();
    const int64_t in_flight = launches_ - collects_;
    if (!launched && in_flight == 0 && !live_.empty()) throw std::logic_error("scheduler: requests are waiting, but none can run");
    if (in_flight >= (launched ? depth_ : 1)) collect();
  }
  while (collects_ < launches_) collect();
}

void Engine::copy_stats() {
  stats_.running = scheduler_.running();
  stats_.waiting = scheduler_.waiting();
  stats_.free_pages = scheduler_.free_pages();
  stats_.cached_pages = scheduler_.cached_pages();
  stats_.preemptions = scheduler_.preemptions();
  stats_.evictions = scheduler_.evictions();
}

bool Engine::take_commands() {
  std::vector<std::unique_ptr<Live>> incoming;
  std::vector<int64_t> cancels;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    copy_stats();
    const bool idle = live_.empty() && launches_ == collects_;
    if (idle) wake_.wait(lock, [this] { return stop_ || !incoming_.empty() || !cancels_.empty(); });
    if (stop_) return false;
    incoming.swap(incoming_);
    cancels.swap(cancels_);
  }
  std::vector<Live*> added;  // all in live_ before any of them, so that a failure answers all
  for (auto& live : incoming) {
    added.push_back(live.get());
    live_.emplace(live->uid, std::move(live));
  }
  for (Live* live : added) add(*live);
  for (int64_t uid : cancels) end(uid, Finish::cancelled);
  if (deadlines_.size() > 2 * live_.size() + 1024) forget_deadlines();
  end_late();
  return true;
}

void Engine::add(Live& live) {
  Request& r = live.request;
  if (r.max_time_ms > 0) deadlines_.emplace(live.submitted + std::chrono::milliseconds(r.max_time_ms), Late{live.uid, Finish::time});
  if (r.deadline_ms > 0) deadlines_.emplace(live.submitted + std::chrono::milliseconds(r.deadline_ms), Late{live.uid, Finish::deadline});
  if (r.beams.width > 1) {
    live.beams = std::make_unique<BeamSearch>(r.beams, r.max_tokens, r.eos_ids, live.text);
    return run_beams(live);
  }
  const Limits& limits = scheduler_.limits();
  const int64_t size = int64_t(r.prompt.size());  // the prefix may be spelled with a token a byte, as far as there is room
  live.most = int(std::min({int64_t(r.max_tokens) + int64_t(r.prefix.size()), limits.max_len - size, int64_t(limits.pages) * kPageTokens + 1 - size}));
  scheduler_.add(live.uid, r.prompt, live.most, r.sample, std::move(r.rules), r.cache_salt, live.supersedes, r.prefix_ids);
}

// Of requests that have ended.
void Engine::forget_deadlines() {
  decltype(deadlines_) left;
  for (; !deadlines_.empty(); deadlines_.pop())
    if (live_.count(deadlines_.top().second.first)) left.push(deadlines_.top());
  deadlines_.swap(left);
}

void Engine::end_late() {
  if (deadlines_.empty()) return;
  const Clock::time_point now = Clock::now(), none{};
  for (; !deadlines_.empty() && deadlines_.top().first <= now; deadlines_.pop()) {
    const auto [uid, finish] = deadlines_.top().second;
    const auto it = live_.find(uid);
    if (finish == Finish::deadline && it != live_.end() && it->second->first != none) continue;
    end(uid, finish);
  }
}

bool Engine::launch() {
  const int ticket = int(launches_ & 1);
  Step& step = steps_[ticket];
  if (!scheduler_.schedule(&batches_[ticket], &step)) return false;
  launched_[ticket] = Clock::now();
  int64_t cached = 0;
  for (const Admission& a : step.admitted) {
    Live& live = *live_.at(a.uid < 0 ? beam_rows_.at(a.uid).first : a.uid);
    if (live.started != Clock::time_point()) continue;  // a later row of a beam
    live.started = launched_[ticket];
    cached += live.cached_tokens = a.cached;
  }
  if (cached > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.cached_tokens += cached;
  }
  runner_->launch(batches_[ticket], ticket);
  ++launches_;
  return true;
}

void Engine::collect() {
  const int ticket = int(collects_ & 1);
  const Step& step = steps_[ticket];
  const Sampled sampled = runner_->collect(ticket);
  ++collects_;
  if (int64_t(sampled.token.size()) < samples_of(step) || int64_t(sampled.logprob.size()) < samples_of(step))
    throw std::logic_error(cat("runner: ", sampled.token.size(), " samples; expected ", samples_of(step)));
  const Clock::time_point now = Clock::now();
  const double took = std::chrono::duration<double>(now - std::max(launched_[ticket], collected_)).count();
  collected_ = now;
  size_t used = 0;
  for (size_t i = 0; i < step.sampled.size(); ++i)
    if (scheduler_.accept(step.sampled[i], sampled.token[i])) used_[used++] = i;
  {
    std::lock_guard<std::mutex> lock(mutex_);  // before the outputs: who has the last one sees its step counted
    ++stats_.steps;
    stats_.prefill_tokens += step.prompt_rows;
    stats_.decode_tokens += int64_t(used);
    stats_.wasted_rows += samples_of(step) - int64_t(used);
    stats_.step_s = stats_.steps == 1 ? took : stats_.step_s + 0.1 * (took - stats_.step_s);
  }
  for (size_t k = 0; k < used; ++k) {
    const size_t i = used_[k];
    if (step.sampled[i] < 0) {
      Live& live = *live_.at(beam_rows_.at(step.sampled[i]).first);
      if (live.first == Clock::time_point()) live.first = now;
      take_beam(step.sampled[i], sampled.top_token.data() + i * kTopTokens, sampled.top_logprob.data() + i * kTopTokens);
      continue;
    }
    const auto it = live_.find(step.sampled[i]);
    if (it == live_.end()) continue;  // ended by an earlier sample of this step
    Live& live = *it->second;
    if (live.text.pushed() == 0) live.first = now;
    TopTokens top;
    if (const int k = live.request.sample.top_tokens; k > 0) {
      const size_t begin = i * kTopTokens;
      top.tokens.assign(sampled.top_token.begin() + int64_t(begin), sampled.top_token.begin() + int64_t(begin) + k);
      top.logprobs.assign(sampled.top_logprob.begin() + int64_t(begin), sampled.top_logprob.begin() + int64_t(begin) + k);
    }
    advance(live, sampled.token[i], sampled.logprob[i], std::move(top));
  }
}

void Engine::advance(Live& live, int32_t token, float logprob, TopTokens top) {
  const Request& r = live.request;
  const bool typing = live.text.typing(), may_end = live.text.pushed() >= r.min_tokens && !typing;
  if (may_end && std::find(r.eos_ids.begin(), r.eos_ids.end(), token) != r.eos_ids.end()) return end(live.uid, Finish::eos);
  if (live.text.push(token, logprob, std::move(top))) return end(live.uid, Finish::stop);
  if (live.text.pushed() == r.max_tokens || ++live.chosen == live.most) return end(live.uid, Finish::length);
  if (typing && !live.text.typing()) scheduler_.limit(live.uid, r.max_tokens - live.text.pushed());
  if (!r.stream) return;
  live.text.release(false, &live.piece);
  if (!live.piece.tokens.empty()) deliver(live, Finish::none, "");
}

}  // namespace codefuse
