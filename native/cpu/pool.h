// Threads that stay: a parallel loop costs about a microsecond while they are awake. They spin briefly after a loop, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace codefuse::cpu {

class Pool {
 public:
  explicit Pool(int threads);  // the calling thread counts as one; 0: all cores this process may use
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // Calls f(item, thread) for item in [0, items), thread in [0, threads()), and returns when all are done. f must not throw.
  // One caller at a time.
  template <class F>
  void each(int64_t items, const F& f) {
    if (items <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < items; ++i) f(i, 0);
      return;
    }
    run(uint32_t(items), [](const void* context, int64_t item, int thread) { (*static_cast<const F*>(context))(item, thread); }, &f);
  }

 private:
  using Body = void (*)(const void* context, int64_t item, int thread);

  void run(uint32_t items, Body body, const void* context);
  void work(int thread);
  void take_items(uint32_t loop, int thread);

  // loop number (upper half) and items not yet taken (lower half), changed together, so that a late thread cannot take an item of a
  // loop it has not seen
  std::atomic<uint64_t> state_{0};
  std::atomic<uint32_t> unfinished_{0};
  std::atomic<int> asleep_{0};
  uint32_t items_ = 0;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace codefuse::cpu
