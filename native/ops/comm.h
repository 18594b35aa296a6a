// Between the ranks of one tensor-parallel model: threads of one process, one device each.
#pragma once
#include <cstdint>

namespace codefuse {

class Comm {
 public:
  virtual ~Comm() = default;
  virtual int rank() const = 0;
  virtual int world() const = 0;
  // data[0..n) = sum over ranks, added in rank order; float32 on the rank's device, ordered with its ops.
  virtual void all_reduce(float* data, int64_t n) = 0;
  // out [rows, total]: the ranks' columns side by side in rank order; rank r's in has columns share_begin(total, r, world) ..
  // share_begin(total, r + 1, world), which need not be as many on every rank.
  virtual void all_gather_columns(float* out, const float* in, int64_t rows, int64_t total) = 0;
};

inline int64_t share_begin(int64_t total, int rank, int world) { return total * rank / world; }

// One rank: nothing to exchange.
class SingleComm final : public Comm {
 public:
  int rank() const override { return 0; }
  int world() const override { return 1; }
  void all_reduce(float*, int64_t) override {}
  void all_gather_columns(float*, const float*, int64_t, int64_t) override {}  // never called: world() == 1
};

}  // namespace codefuse
