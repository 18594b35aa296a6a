#include "cuda/turns.h"

#include <map>

#include "cuda/device.cuh"

namespace codefuse::cuda {

std::shared_ptr<Turns> Turns::of(int device) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Turns>> all;
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Turns> turns = all[device].lock();
  if (!turns) all[device] = turns = std::make_shared<Turns>();
  return turns;
}

std::unique_lock<std::mutex> Turns::several() {
  static std::mutex mutex;
  return std::unique_lock<std::mutex>(mutex);
}

Turns::Turn::Turn(Turns& turns, cudaStream_t stream, cudaEvent_t ended) : turns_(turns), lock_(turns.mutex_), stream_(stream), ended_(ended) {
  if (turns.stream_ && turns.stream_ != stream) check(cudaStreamWaitEvent(stream, turns.ended_, 0), "waiting for another step");
}

void Turns::Turn::end() {
  check(cudaEventRecord(ended_, stream_), "ending a step");
  recorded_ = true;
}

Turns::Turn::~Turn() {
  if (!recorded_) cudaEventRecord(ended_, stream_);  // after an error, for the sake of the others
  turns_.stream_ = stream_;
  turns_.ended_ = ended_;
}

void Turns::leave(cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stream_ == stream) stream_ = nullptr;
}

}  // namespace codefuse::cuda
