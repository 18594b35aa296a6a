#include "ops/bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace codefuse {

double cpu_read_bandwidth(int threads) {
  if (threads <= 0) threads = std::max(1u, std::thread::hardware_concurrency());
  const size_t n = size_t(96) << 20;  // 8-byte words: 768 MB, larger than any cache
  std::vector<uint64_t> data(n, 0x9E3779B97F4A7C15ull);
  std::vector<uint64_t> sums(threads);
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        size_t begin = n * t / threads, end = n * (t + 1) / threads;
        uint64_t lane[8] = {};  // independent sums: the loop vectorizes and never waits on an addition
        for (size_t i = begin; i + 8 <= end; i += 8)
          for (int j = 0; j < 8; ++j) lane[j] += data[i + j];
        for (uint64_t v : lane) sums[t] += v;
      });
    for (auto& t : pool) t.join();
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, double(n) * 8 / seconds);
  }
  // the sums must be used, or the reads may be dropped
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  return total == 1 ? 0 : best;
}

}  // namespace codefuse
