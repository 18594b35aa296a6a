// Between the ranks of one tensor-parallel model: threads of one process, one device each.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

namespace codefuse {

class Ops;

class Comm {
 public:
  virtual ~Comm() = default;
  virtual int rank() const = 0;
  virtual int world() const = 0;
  // y[0..n) += the sum over ranks of data[0..n), added in rank order: the same bits on every rank that had the same y. data is zero afterwards.
  // float32 on the rank's device, ordered with its ops.
  virtual void add_sum(float* y, float* data, int64_t n) = 0;
  // out [rows, total]: the ranks' columns side by side in rank order; rank r's in has columns share_begin(total, r, world) ..
  // share_begin(total, r + 1, world), which need not be as many on every rank.
  virtual void all_gather_columns(float* out, const float* in, int64_t rows, int64_t total) = 0;
};

inline constexpr int64_t share_begin(int64_t total, int rank, int world) { return total * rank / world; }

// What the ranks of one model share. Must outlive their Comms and whatever their Ops still run.
class CommGroup {
 public:
  virtual ~CommGroup() = default;
  virtual std::unique_ptr<Comm> join(int rank, Ops& ops) = 0;
  // Held while a step is launched on all ranks, so that steps of several models that share devices are in one order on all of them.
  virtual std::unique_lock<std::mutex> turn() { return {}; }
  virtual void begin() {}         // before the ranks start on something together, when none is inside it
  virtual void abort() = 0;       // a rank failed: what others wait for will not come, and their waits end
  virtual void check() const {}   // DeviceError if a wait ended before what it was for had come; after the step
};

// One rank: nothing to exchange.
class SingleComm final : public Comm {
 public:
  int rank() const override { return 0; }
  int world() const override { return 1; }
  void add_sum(float*, float*, int64_t) override {}  // neither is called: world() == 1
  void all_gather_columns(float*, const float*, int64_t, int64_t) override {}
};

// The device of a rank of a model on `device` (make_ops): the GPU so many after it; all ranks share a CPU. ValueError: device, or fewer GPUs.
std::string rank_device(const std::string& device, int rank, int world);
// For ranks on the GPUs first .. first + world - 1. ValueError where one of them cannot use another's memory, DeviceError.
std::unique_ptr<CommGroup> make_cuda_group(int first, int world);
// The same for rank_device(device, 0 .., world), which are GPUs.
std::unique_ptr<CommGroup> make_device_group(const std::string& device, int world);

}  // namespace codefuse
