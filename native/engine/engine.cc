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
  std::vector<std::unique_ptr<Live>> unseen;  // stale ones that the engine's thread has not taken
  std::unique_lock<std::mutex> lock(mutex_);
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
  replace_unseen(stale, std::move(live), &unseen);
  for (const auto& old : unseen) forget(*old, Finish::cancelled);
  for (int64_t old : stale)
    if (alive_.count(old)) cancels_.push_back(old);
  ++stats_.submitted;
  wake_.notify_one();
  lock.unlock();
  for (const auto& old : unseen) deliver_all(*old, Finish::cancelled, "");
  return uid;
}

// Adds live to incoming_, in the place of the first of the stale ones there; these go to unseen.
void Engine::replace_unseen(const std::vector<int64_t>& stale, std::unique_ptr<Live> live, std::vector<std::unique_ptr<Live>>* unseen) {
  for (auto it = incoming_.begin(); !stale.empty() && it != incoming_.end();) {
    if (std::find(stale.begin(), stale.end(), (*it)->uid) == stale.end()) {
      ++it;
      continue;
    }
    if (live && live->supersedes == (*it)->uid) live->supersedes = (*it)->supersedes;
    unseen->push_back(std::move(*it));
    if (live)
      *it++ = std::move(live);
    else
      it = incoming_.erase(it);
  }
  if (live) incoming_.push_back(std::move(live));
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
  {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    const auto drained = [this] { return stop_ || alive_.empty(); };
    if (drain_s > 0) drained_.wait_for(lock, std::chrono::duration<double>(std::min(drain_s, 1e6)), drained);
    stop_ = true;
    wake_.notify_one();
    drained_.notify_all();
  }
  std::lock_guard<std::mutex> one_at_a_time(close_mutex_);
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

void Engine::end(int64_t uid, Finish finish, const std::string& error) {
  auto it = live_.find(uid);
  if (it == live_.end()) return;
  std::unique_ptr<Live> live = std::move(it->second);
  live_.erase(it);
  scheduler_.remove(uid);
  stop_beams(*live);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    forget(*live, finish);
    copy_stats();
    if (alive_.empty()) drained_.notify_all();
  }
  deliver_all(*live, finish, error);
}

// A request has ended; mutex_ is held.
void Engine::forget(const Live& live, Finish finish) {
  const int count = live.request.beams.count;
  for (int i = 0; i < count; ++i) {
    alive_.erase(live.uid + i);
    const bool found = live.beams && finish == Finish::length;
    ++stats_.finished[size_t(found ? live.beams->finished()[size_t(i)].finish : finish)];
  }
  sessions_.leave(live.session, live.uid, count);
}

// The last output of each text.
void Engine::deliver_all(Live& live, Finish finish, const std::string& error) {
  if (live.request.beams.width > 1) return deliver_beams(live, finish, error);
  live.text.release(true, &live.piece);
  deliver(live, finish, error);
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
