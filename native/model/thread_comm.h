// Comm between ranks that are threads sharing host memory: CPU tensor parallelism, and its tests.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/comm.h"

namespace codefuse {

// What the ranks of one model share.
class ThreadGroup {
 public:
  explicit ThreadGroup(int world) : world_(world), data_(static_cast<size_t>(world), nullptr) {}
  int world() const { return world_; }
  void abort() { aborted_ = true; }    // a rank failed: the others' waits throw DeviceError
  void reset() { aborted_ = false, arrived_ = 0; }  // before a step, when no rank is inside one

 private:
  friend class ThreadComm;
  void wait();  // until every rank has come

  const int world_;
  std::vector<const float*> data_;  // [world] what each rank brings to the current exchange
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> aborted_{false};
};

class ThreadComm final : public Comm {
 public:
  ThreadComm(ThreadGroup& group, int rank) : group_(group), rank_(rank) {}
  int rank() const override { return rank_; }
  int world() const override { return group_.world(); }
  void all_reduce(float* data, int64_t n) override;
  void all_gather_columns(float* out, const float* in, int64_t rows, int64_t total) override;

 private:
  ThreadGroup& group_;
  const int rank_;
};

}  // namespace codefuse
