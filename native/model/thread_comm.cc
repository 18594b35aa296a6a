#include "model/thread_comm.h"

#include <cstring>
#include <thread>

#include "core/check.h"

namespace codefuse {

void ThreadGroup::wait() {
  const uint32_t round = round_;
  if (++arrived_ == world_) {
    arrived_ = 0;
    ++round_;
    return;
  }
  for (int spins = 0; round_ == round; ++spins) {
    if (aborted_) throw DeviceError("another rank of the model failed");
    if (spins > 1000) std::this_thread::yield();
  }
}

std::unique_ptr<Comm> ThreadGroup::join(int rank, Ops&) { return std::make_unique<ThreadComm>(*this, rank); }

void ThreadComm::add_sum(float* y, float* data, int64_t n) {
  group_.data_[size_t(rank_)] = data;
  group_.wait();
  // this rank's share of the elements, for everyone
  const int64_t begin = share_begin(n, rank_, world()), end = share_begin(n, rank_ + 1, world());
  for (int64_t i = begin; i < end; ++i) {
    float sum = 0;
    for (const float* part : group_.data_) sum += part[i];
    for (const float* part : group_.data_) const_cast<float*>(part)[i] = sum;
  }
  group_.wait();
  for (int64_t i = 0; i < n; ++i) y[i] += data[i], data[i] = 0;
}

void ThreadComm::all_gather_columns(float* out, const float* in, int64_t rows, int64_t total) {
  group_.data_[size_t(rank_)] = in;
  group_.wait();
  for (int r = 0; r < world(); ++r) {
    const int64_t begin = share_begin(total, r, world()), count = share_begin(total, r + 1, world()) - begin;
    for (int64_t t = 0; t < rows; ++t)
      std::memcpy(out + t * total + begin, group_.data_[size_t(r)] + t * count, size_t(count) * sizeof(float));
  }
  group_.wait();
}

}  // namespace codefuse
