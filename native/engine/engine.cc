#include "engine/engine.h"

#include <algorithm>

namespace codefuse {

namespace {

double seconds(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

Reuse reuse_of(const std::string& prefix_cache, bool rows_alike) {
  if (prefix_cache == "off") return Reuse::none;
  return rows_alike || prefix_cache == "generated" ? Reuse::any_rows : Reuse::same_rows;
}

int64_t samples_of(const Step& s) { return int64_t(s.sampled.size()); }

}  // namespace

Engine::Live::Live(int64_t id, Request&& r, const TokenBytes* table)
    : uid(id),
      session(r.session.empty() ? std::string() : std::to_string(r.session.size()) + ' ' + r.session + r.cache_salt),
      request(std::move(r)),
      text(table, {request.stop, request.include_stop, request.min_tokens, request.stop_at, std::move(request.before), std::move(request.after)},
           request.prefix.size(), request.include_typed),
      submitted(Clock::now()) {}

Engine::Engine(std::unique_ptr<Runner> runner, TokenBytes token_bytes, const std::vector<int32_t>& never_text, const EngineOptions& options)
    : runner_(std::move(runner)),
      token_bytes_(std::move(token_bytes)),
      tokens_by_bytes_(tokens_by_bytes(token_bytes_, runner_->config().vocab)),
      trie_(&token_bytes_, tokens_by_bytes_, never_text),
      options_(options),
      depth_(options.depth > 0 ? options.depth : runner_->device() == "cpu" ? 1 : 2),
      scheduler_(runner_->limits(), options.prefill_rows, reuse_of(options.prefix_cache, runner_->rows_alike()),
                 runner_->rows_alike() ? 0 : kShortPrompt) {
  check(options);
  stats_.slots = scheduler_.limits().slots;
  stats_.queue = options.queue;
  stats_.pages = stats_.free_pages = scheduler_.limits().pages;
  thread_ = std::thread([this] { run(); });
}

Engine::~Engine() { close(0); }

void Engine::check(const EngineOptions& options) {
  if (options.queue < 0) throw ValueError(cat("queue is ", options.queue, "; expected 0 or more"));
  if (options.depth < 0 || options.depth > 2) throw ValueError(cat("depth is ", options.depth, "; expected 0..2"));
  if (options.prefix_cache != "on" && options.prefix_cache != "off" && options.prefix_cache != "generated")
    throw ValueError(cat("prefix_cache is '", options.prefix_cache, "'; expected on, off or generated"));
}

int64_t Engine::submit(Request request) {
  auto refuse = [this] {
    std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.refused;
  };
  try {
    validate(request);
    add_rules(request);
  } catch (...) {
    refuse();
    throw;
  }
  auto live = std::make_unique<Live>(0, std::move(request), &token_bytes_);
  std::lock_guard<std::mutex> lock(mutex_);
  if (live->request.beside < 0 || live->request.beside >= next_uid_) {
    ++stats_.refused;
    throw ValueError(cat("beside is ", live->request.beside, "; expected 0 or the uid of an earlier request"));
  }
  const size_t most = size_t(scheduler_.limits().slots + options_.queue), texts = size_t(live->request.beams.count);
  const size_t others = alive_.size() - sessions_.stale() - sessions_.before(live->session, live->request.beside);
  if (!error_.empty() || closing_ || others + texts > most) {
    ++stats_.refused;
    if (!error_.empty()) throw DeviceError(cat("the engine has failed: ", error_));
    if (closing_) throw std::runtime_error("the engine is closed");
    throw QueueFull(cat("the queue is full: ", others, " requests are alive; expected at most ", most, " (",
                        scheduler_.limits().slots, " slots and a queue of ", options_.queue, ")"));
  }
  const int64_t uid = live->uid = next_uid_;
  for (size_t i = 0; i < texts; ++i) alive_.emplace(next_uid_++, uid);
  const std::vector<int64_t> stale = sessions_.join(live->session, uid, int(texts), live->request.beside);
  if (!stale.empty() && stale[0] != uid) live->supersedes = stale[0];
  cancels_.insert(cancels_.end(), stale.begin(), stale.end());
  incoming_.push_back(std::move(live));
  ++stats_.submitted;
  wake_.notify_one();
  return uid;
}

bool Engine::cancel(int64_t uid) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = alive_.find(uid);
  if (it == alive_.end()) return false;
  cancels_.push_back(it->second);
  wake_.notify_one();
  return true;
}

EngineStats Engine::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  EngineStats s = stats_;
  s.waiting += int(incoming_.size());
  s.error = error_;
  return s;
}

void Engine::close(double drain_s) {
  std::lock_guard<std::mutex> one_at_a_time(close_mutex_);
  {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    if (drain_s > 0) drained_.wait_for(lock, std::chrono::duration<double>(std::min(drain_s, 1e6)), [this] { return alive_.empty(); });
    stop_ = true;
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void Engine::run() {
  std::string error;
  try {
    serve();
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "unknown failure";
  } catch (...) {
    error = "unknown failure";
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    error_ = error;
    closing_ = true;
    for (auto& live : incoming_) live_.emplace(live->uid, std::move(live));
    incoming_.clear();
  }
  end_all(error.empty() ? Finish::cancelled : Finish::error, error);
}

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
  for (auto& live : incoming) {
    Request& r = live->request;
    if (r.max_time_ms > 0) deadlines_.emplace(live->submitted + std::chrono::milliseconds(r.max_time_ms), Late{live->uid, Finish::time});
    if (r.deadline_ms > 0) deadlines_.emplace(live->submitted + std::chrono::milliseconds(r.deadline_ms), Late{live->uid, Finish::deadline});
    if (r.beams.width > 1) {
      live->beams = std::make_unique<BeamSearch>(r.beams, r.max_tokens, r.eos_ids, live->text);
      if (!r.bad_words.empty()) live->bad_words = word_list(r);
      run_beams(*live);
    } else {
      const Limits& limits = scheduler_.limits();
      const int64_t size = int64_t(r.prompt.size());  // the prefix may be spelled with a token a byte, as far as there is room
      live->most = int(std::min({int64_t(r.max_tokens) + int64_t(r.prefix.size()), limits.max_len - size, int64_t(limits.pages) * kPageTokens + 1 - size}));
      scheduler_.add(live->uid, r.prompt, live->most, r.sample, std::move(r.rules), r.cache_salt, live->supersedes, r.prefix_ids);
    }
    live_.emplace(live->uid, std::move(live));
  }
  for (int64_t uid : cancels) end(uid, Finish::cancelled);
  if (deadlines_.size() > 2 * live_.size() + 1024) forget_deadlines();
  end_late();
  return true;
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
  const double took = seconds(std::max(launched_[ticket], collected_), now);
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

void Engine::end(int64_t uid, Finish finish, const std::string& error) {
  auto it = live_.find(uid);
  if (it == live_.end()) return;
  std::unique_ptr<Live> live = std::move(it->second);
  live_.erase(it);
  scheduler_.remove(uid);
  stop_beams(*live);
  live->text.release(true, &live->piece);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int i = 0; i < live->request.beams.count; ++i) {
      alive_.erase(uid + i);
      const bool found = live->beams && finish == Finish::length;
      ++stats_.finished[size_t(found ? live->beams->finished()[size_t(i)].finish : finish)];
    }
    sessions_.leave(live->session, uid, live->request.beams.count);
    copy_stats();
    if (alive_.empty()) drained_.notify_all();
  }
  if (live->beams)
    deliver_beams(*live, finish, error);
  else
    deliver(*live, finish, error);
}

void Engine::end_all(Finish finish, const std::string& error) {
  while (!live_.empty()) end(live_.begin()->first, finish, error);
}

void Engine::deliver(Live& live, Finish finish, const std::string& error) {
  const Clock::time_point now = Clock::now(), none{};
  Output out;
  out.uid = live.uid;
  out.tokens.swap(live.piece.tokens);
  out.text.swap(live.piece.text);
  out.text_start = int(live.piece.skipped);
  live.piece.skipped = 0;
  live.output_tokens += int(out.tokens.size()) - int(live.piece.typed);
  live.piece.typed = 0;
  for (float p : live.piece.logprobs) live.cum_logprob += p;
  if (live.request.logprobs) out.logprobs = live.piece.logprobs;
  live.piece.logprobs.clear();
  std::swap(out.top, live.piece.top);
  out.top_per_token = live.request.sample.top_tokens;
  out.finish = finish;
  if (finish == Finish::stop) out.stop = live.text.matched();
  out.error = error;
  out.input_tokens = int(live.request.prompt.size() + live.request.prefix_ids.size());
  out.truncated_tokens = live.request.truncated_tokens;
  out.output_tokens = live.output_tokens;
  out.cached_tokens = live.cached_tokens;
  out.cum_logprob = live.cum_logprob;
  const Clock::time_point started = live.started == none ? now : live.started, first = live.first == none ? now : live.first;
  out.queue_s = seconds(live.submitted, started);
  out.prefill_s = seconds(started, first);
  out.decode_s = seconds(first, now);
  live.request.outbox->put(std::move(out));
}

}  // namespace codefuse
