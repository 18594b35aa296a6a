// Weights on their way to the device: threads that each read rows of the files into pinned memory, send them and re-tile them there, on a
// stream of their own, so that reading, the bus and the kernels overlap.
#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/dtype.h"
#include "cuda/device.cuh"
#include "formats/format.h"
#include "ops/ops.h"

namespace codefuse::cuda {

class Uploader {
 public:
  // like: what the device can do; overflow: device memory, set to 1 for a value that act cannot hold; read: copies bytes that parts point
  // to, none: memcpy.
  Uploader(int index, DType act, const Stream& like, int32_t* overflow, Ops::ReadBytes read, int threads);
  ~Uploader();  // drops what has not begun
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  // The rows of parts one below the other, for data in device memory, which no earlier work may still write.
  void add(const std::vector<HostMatrix>& parts, void* data);
  void add(std::vector<float> values, float* data);
  void wait();  // until all of it is on the device and no part is read any more; DeviceError, what read throws

 private:
  struct Piece {  // rows of whole row groups
    std::vector<HostMatrix> parts;
    int64_t first_row, total_rows;
    void* data;
    std::vector<float> values;  // or these as they are
  };
  class Lane;
  void queue(std::vector<Piece> pieces);
  void work();
  void load(const Piece& piece, Lane& lane);

  const int index_;
  const DType act_;
  const Stream like_;
  int32_t* const overflow_;
  Ops::ReadBytes read_;
  const int threads_most_;

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::deque<Piece> pieces_;
  std::vector<std::thread> threads_;
  int busy_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
};

}  // namespace codefuse::cuda
