#include "engine/outbox.h"

#include <chrono>

namespace codefuse {

void Outbox::put(Output&& output) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  auto [place, is_first] = place_.emplace(output.uid, waiting_.size());
  if (is_first) {
    waiting_.push_back(std::move(output));
  } else {
    Output& into = waiting_[place->second];
    if (!into.tokens.empty()) output.text_start = into.text_start;
    into.tokens.insert(into.tokens.end(), output.tokens.begin(), output.tokens.end());
    into.logprobs.insert(into.logprobs.end(), output.logprobs.begin(), output.logprobs.end());
    into.top.append(output.top);
    into.text += output.text;
    output.tokens.swap(into.tokens);
    output.logprobs.swap(into.logprobs);
    std::swap(output.top, into.top);
    output.text.swap(into.text);
    into = std::move(output);
  }
  arrived_.notify_one();
}

std::vector<Output> Outbox::poll(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  auto ready = [this] { return closed_ || !waiting_.empty(); };
  if (timeout_s < 0)
    arrived_.wait(lock, ready);
  else
    arrived_.wait_for(lock, std::chrono::duration<double>(timeout_s), ready);
  std::vector<Output> out;
  out.swap(waiting_);
  place_.clear();
  for (Output& o : out) {
    o.index = index_[o.uid]++;
    if (o.finish != Finish::none) index_.erase(o.uid);
  }
  return out;
}

void Outbox::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  arrived_.notify_all();
}

bool Outbox::closed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

}  // namespace codefuse
