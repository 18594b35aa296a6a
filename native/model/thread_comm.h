// Comm between ranks that are threads sharing host memory: CPU tensor parallelism, and its tests.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/comm.h"

namespace codefuse {

class ThreadGroup final : public CommGroup {
 public:
  explicit ThreadGroup(int world) : world_(world), data_(static_cast<size_t>(world), nullptr) {}
  int world() const { return world_; }
  std::unique_ptr<Comm> join(int rank, Ops& ops) override;
  void begin() override { aborted_ = false, arrived_ = 0; }
  void abort() override { aborted_ = true; }  // the others' waits throw DeviceError

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
  void add_sum(float* y, float* data, int64_t n) override;
  void all_gather_columns(float* out, const float* in, int64_t rows, int64_t total) override;

 private:
  ThreadGroup& group_;
  const int rank_;
};

}  // namespace codefuse
