#include "cuda/upload.h"

#include <cstring>

#include "core/safetensors.h"
#include "cuda/kernels.h"
#include "cuda/tiles.cuh"

namespace codefuse::cuda {

namespace {

constexpr size_t kPieceBytes = 16 << 20;  // of a piece, unless one row group is larger
constexpr size_t kSmall = 1 << 20;        // a slot for less is made to measure
constexpr int kSlots = 2;                 // of a thread: one is filled while the other is on its way
constexpr size_t kAlign = 16;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

size_t bytes_a_row(const HostMatrix& m) { return row_bytes(m.format, m.cols) + scale_bytes(m.format, m.cols) + zero_bytes(m.format, m.cols); }

}  // namespace

struct Uploader::Slot {
  void *host = nullptr, *device = nullptr;
  size_t bytes = 0;
  cudaEvent_t done = nullptr;  // copied and re-tiled

  ~Slot() {
    if (done) cudaEventSynchronize(done), cudaEventDestroy(done);
    cudaFreeHost(host);
    cudaFree(device);
  }

  void make_room(size_t needed) {
    if (!done) check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming | cudaEventBlockingSync), "event");  // who waits leaves the core to others
    check(cudaEventSynchronize(done), "uploading weights");
    if (bytes >= needed) return;
    cudaFreeHost(host);
    cudaFree(device);
    host = device = nullptr;
    bytes = 0;
    check(cudaMallocHost(&host, needed), "pinned memory for uploading weights");
    check(cudaMalloc(&device, needed), "memory for uploading weights");
    bytes = needed;
  }
};

Uploader::Uploader(int index, DType act, const Stream& like, int32_t* overflow, int threads)
    : index_(index), act_(act), like_(like), overflow_(overflow), threads_most_(std::max(1, threads)) {}

Uploader::~Uploader() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    pieces_.clear();
  }
  wake_.notify_all();
  for (auto& t : threads_) t.join();
}

void Uploader::add(const std::vector<HostMatrix>& parts, void* data) {
  const size_t group = bytes_a_row(parts[0]) * kGroupRows;
  const int64_t most = int64_t(std::max<size_t>(1, kPieceBytes / group)) * kGroupRows;
  int64_t total = 0;
  for (const HostMatrix& p : parts) total += p.rows;
  std::vector<Piece> pieces;
  size_t part = 0;
  int64_t taken = 0;  // rows of that part
  for (int64_t r = 0; r < total; r += most) {
    Piece piece{{}, r, total, data};
    for (int64_t left = std::min(most, total - r); left > 0;) {
      const int64_t count = std::min(left, parts[part].rows - taken);
      if (count > 0) piece.parts.push_back(parts[part].row_slice(taken, count));
      left -= count;
      taken += count;
      if (taken == parts[part].rows) ++part, taken = 0;
    }
    pieces.push_back(std::move(piece));
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Piece& p : pieces) {
      pieces_.push_back(std::move(p));
      if (int(threads_.size()) < threads_most_ && pieces_.size() + size_t(busy_) > threads_.size()) threads_.emplace_back([this] { work(); });
    }
  }
  wake_.notify_all();
}

void Uploader::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [&] { return pieces_.empty() && busy_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

void Uploader::work() {
  Stream s = like_;
  s.stream = nullptr;
  Slot slots[kSlots];
  int next = 0;
  bool working = false;  // holds a piece, or what it sent is still on its way
  std::exception_ptr error;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (pieces_.empty() && working) {
      lock.unlock();
      if (!error && cudaStreamSynchronize(s.stream) != cudaSuccess) error = std::make_exception_ptr(DeviceError("CUDA: uploading weights failed"));
      lock.lock();
      working = false;
      --busy_;
      if (error && !error_) error_ = error;
      if (busy_ == 0 && pieces_.empty()) idle_.notify_all();
      continue;
    }
    if (stop_ && pieces_.empty()) break;
    if (pieces_.empty()) {
      wake_.wait(lock);
      continue;
    }
    const Piece piece = std::move(pieces_.front());
    pieces_.pop_front();
    if (!working) ++busy_, working = true;
    if (error_) continue;  // what is left is dropped
    lock.unlock();
    try {
      if (!s.stream) {
        check(cudaSetDevice(index_), "choosing the device");
        check(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking), "stream");
      }
      load(piece, slots[next++ % kSlots], s);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !error_) error_ = error;
  }
  lock.unlock();
  if (s.stream) cudaStreamDestroy(s.stream);
}

// Packs the rows' elements or codes, scales and zeros into the slot; on_device: the same as the device will see it. Returns bytes.
size_t Uploader::fill(const Piece& piece, const Slot& slot, HostMatrix& on_device) {
  size_t at = 0;
  const auto put = [&](const auto& rows_of /*(part) -> HostRows*/, size_t row) -> const uint8_t* {
    if (row == 0) return nullptr;
    const size_t begin = at;
    for (const HostMatrix& p : piece.parts) {
      const HostRows from = rows_of(p);
      uint8_t* const to = static_cast<uint8_t*>(slot.host) + at;
      if (from.stride == row) {
        populate(from.data, size_t(p.rows) * row);
        std::memcpy(to, from.data, size_t(p.rows) * row);
      } else {
        for (int64_t r = 0; r < p.rows; ++r) std::memcpy(to + size_t(r) * row, from.row(r), row);
      }
      at += size_t(p.rows) * row;
    }
    at = aligned(at);
    return static_cast<const uint8_t*>(slot.device) + begin;
  };
  const HostMatrix& m = piece.parts[0];
  const size_t row = row_bytes(m.format, m.cols), scale = scale_bytes(m.format, m.cols), zero = zero_bytes(m.format, m.cols);
  on_device = m;
  on_device.rows = 0;
  for (const HostMatrix& p : piece.parts) on_device.rows += p.rows;
  on_device.data = put([](const HostMatrix& p) { return HostRows{p.data, p.stride}; }, row);
  on_device.stride = row;
  on_device.scale = {put([](const HostMatrix& p) { return p.scale; }, scale), scale};
  on_device.zero = {put([](const HostMatrix& p) { return p.zero; }, zero), zero};
  return at;
}

void Uploader::load(const Piece& piece, Slot& slot, const Stream& s) {
  size_t needed = 3 * kAlign;
  for (const HostMatrix& p : piece.parts) needed += size_t(p.rows) * bytes_a_row(p);
  slot.make_room(needed > kSmall ? std::max(needed, kPieceBytes + 3 * kAlign) : needed);
  HostMatrix rows;
  const size_t bytes = fill(piece, slot, rows);
  check(cudaMemcpyAsync(slot.device, slot.host, bytes, cudaMemcpyHostToDevice, s.stream), "uploading weights");
  if (is_quantized(rows.format))
    repack_quantized(s, act_, rows, piece.total_rows, piece.data, piece.first_row, overflow_);
  else
    repack(s, act_, rows.format, slot.device, int(rows.rows), int(rows.cols), piece.data, piece.first_row, overflow_);
  check(cudaEventRecord(slot.done, s.stream), "uploading weights");
}

}  // namespace codefuse::cuda
