#include "cpu/pool.h"

#include <algorithm>
#include <chrono>

#if defined(__linux__)
#include <sched.h>
#endif

namespace codefuse::cpu {

namespace {

constexpr auto kSpin = std::chrono::microseconds(200);  // longer than the gaps within a step and between two steps

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

}  // namespace

Pool::Pool(int threads) {
  if (threads <= 0) threads = usable_cores();
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    state_ = ((state_ >> 32) + 1) << 32;
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
}

void Pool::run(uint32_t items, Body body, const void* context) {
  items_ = items;
  body_ = body;
  context_ = context;
  unfinished_.store(items);
  const uint32_t loop = uint32_t(state_.load() >> 32) + 1;
  state_.store(uint64_t(loop) << 32 | items);
  if (asleep_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }  // a thread between its last look at state_ and its sleep
    wake_.notify_all();
  }
  take_items(loop, 0);
  for (int spins = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
    pause();
    if (spins > 512) std::this_thread::yield(), spins = 0;  // a worker lost its core
  }
}

void Pool::take_items(uint32_t loop, int thread) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (uint32_t(state >> 32) == loop && uint32_t(state) != 0) {
    if (!state_.compare_exchange_weak(state, state - 1)) continue;
    body_(context_, int64_t(items_ - uint32_t(state)), thread);
    unfinished_.fetch_sub(1, std::memory_order_release);
    state = state_.load(std::memory_order_acquire);
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto changed = [&] { return uint32_t(state_.load() >> 32) != seen; };
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 0; !changed(); ++spins) {
      pause();
      if (spins < 256) continue;
      spins = 0;
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, changed);
      --asleep_;
    }
    seen = uint32_t(state_.load() >> 32);
    if (uint32_t(state_.load()) == 0) {  // rarely: the loop is already taken, or this is the end
      std::lock_guard<std::mutex> lock(mutex_);
      if (stop_) return;
    }
    take_items(seen, thread);
  }
}

}  // namespace codefuse::cpu
