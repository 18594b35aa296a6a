#include "cuda/upload.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "cuda/kernels.h"
#include "cuda/tiles.cuh"
#include "cuda/turns.h"

namespace codefuse::cuda {

namespace {

constexpr size_t kPieceBytes = 16 << 20;  // of a piece, unless one row group is larger
constexpr size_t kPinnedBytes = 4 << 20;  // read, then sent; so few that of all threads they stay in the cache
constexpr int kPinned = 2;                // of a thread: one is filled while the other is on its way
constexpr size_t kAlign = 16;

size_t bytes_a_row(const HostMatrix& m) { return row_bytes(m.format, m.cols) + scale_bytes(m.format, m.cols) + zero_bytes(m.format, m.cols); }

// Pinned memory of huge pages, where the system has them: allocated by cudaMallocHost it takes 10 times as long, half a millisecond a MB.
class Pinned {
 public:
  static constexpr size_t kBytes = kPinned * kPinnedBytes, kHugePage = 2 << 20;

  Pinned() {
    base_ = ::mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw DeviceError(cat("no memory for uploading weights (", kBytes, " bytes): ", std::strerror(errno)));
    data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base_) + kHugePage - 1) / kHugePage * kHugePage);
    ::madvise(data_, kBytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < kBytes; i += 4096) data_[i] = 0;  // by this thread: registering would make the pages under the driver's lock
    const cudaError_t e = cudaHostRegister(data_, kBytes, cudaHostRegisterDefault);
    if (e != cudaSuccess) ::munmap(base_, kBytes + kHugePage);
    check(e, "pinning memory for uploading weights");
  }
  ~Pinned() {
    cudaHostUnregister(data_);
    ::munmap(base_, kBytes + kHugePage);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  uint8_t* part(int i) const { return data_ + size_t(i) * kPinnedBytes; }

 private:
  void* base_;
  uint8_t* data_;
};

}  // namespace

// A thread's way to the device: bytes go in order through pinned memory into memory there, where kernels on the same stream read them.
class Uploader::Lane {
 public:
  Lane(const Stream& like, const Ops::ReadBytes& read) : read_(read), s_(like) {
    s_.stream = nullptr;
    try {
      check(cudaStreamCreateWithFlags(&s_.stream, cudaStreamNonBlocking), "stream");
      for (cudaEvent_t& e : sent_) check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming | cudaEventBlockingSync), "event");  // who waits leaves the core to others
    } catch (...) {
      release();
      throw;
    }
  }
  ~Lane() { release(); }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  const Stream& stream() const { return s_; }
  void wait() { check(cudaStreamSynchronize(s_.stream), "uploading weights"); }

  // Bytes for `to` on the device follow.
  void begin(void* to) {
    to_ = static_cast<uint8_t*>(to);
    at_ = 0;
  }
  // Up to `most` bytes follow for kernels to read. Those that read the ones before are on the stream.
  void begin(size_t most) {
    if (room_ < most) {
      wait();
      const auto lock = Turns::several();
      cudaFree(device_);
      device_ = nullptr, room_ = 0;
      check(cudaMalloc(&device_, most), "memory for uploading weights");
      room_ = most;
    }
    begin(device_);
  }
  // Where the next bytes will lie on the device.
  const uint8_t* aligned() {
    const size_t gap = (kAlign - at_ % kAlign) % kAlign;
    at_ += gap, filled_ += gap;
    if (filled_ == kPinnedBytes) send();
    return to_ + at_;
  }
  void put(const uint8_t* from, size_t bytes) {
    while (bytes > 0) {
      if (filled_ == 0) check(cudaEventSynchronize(sent_[part_]), "uploading weights");
      const size_t count = std::min(bytes, kPinnedBytes - filled_);
      read_(pinned_.part(part_) + filled_, from, count);
      at_ += count, filled_ += count, from += count, bytes -= count;
      if (filled_ == kPinnedBytes) send();
    }
  }
  void end() {
    if (filled_ > 0) send();
  }

 private:
  void send() {
    check(cudaMemcpyAsync(to_ + at_ - filled_, pinned_.part(part_), filled_, cudaMemcpyHostToDevice, s_.stream), "uploading weights");
    check(cudaEventRecord(sent_[part_], s_.stream), "uploading weights");
    part_ = (part_ + 1) % kPinned;
    filled_ = 0;
  }
  void release() {
    if (s_.stream) cudaStreamSynchronize(s_.stream);
    const auto lock = Turns::several();
    for (cudaEvent_t e : sent_)
      if (e) cudaEventDestroy(e);
    cudaFree(device_);
    if (s_.stream) cudaStreamDestroy(s_.stream);
  }

  const Ops::ReadBytes& read_;
  Stream s_;
  Pinned pinned_;
  void* device_ = nullptr;
  uint8_t* to_ = nullptr;
  cudaEvent_t sent_[kPinned] = {};
  size_t room_ = 0, at_ = 0, filled_ = 0;  // bytes: of device_; put since begin(); of these not yet sent
  int part_ = 0;                           // of pinned_ that is being filled
};

Uploader::Uploader(int index, DType act, const Stream& like, int32_t* overflow, Ops::ReadBytes read, int threads)
    : index_(index), act_(act), like_(like), overflow_(overflow), threads_most_(std::max(1, threads)) {
  read_ = read ? std::move(read) : [](uint8_t* to, const uint8_t* from, size_t bytes) { std::memcpy(to, from, bytes); };
}

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
    Piece piece{{}, r, total, data, {}};
    for (int64_t left = std::min(most, total - r); left > 0;) {
      const int64_t count = std::min(left, parts[part].rows - taken);
      if (count > 0) piece.parts.push_back(parts[part].row_slice(taken, count));
      left -= count;
      taken += count;
      if (taken == parts[part].rows) ++part, taken = 0;
    }
    pieces.push_back(std::move(piece));
  }
  queue(std::move(pieces));
}

void Uploader::add(std::vector<float> values, float* data) {
  if (values.empty()) return;
  std::vector<Piece> pieces;
  pieces.push_back({{}, 0, 0, data, std::move(values)});
  queue(std::move(pieces));
}

void Uploader::queue(std::vector<Piece> pieces) {
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
  std::unique_ptr<Lane> lane;
  bool working = false;  // holds a piece, or what it sent is still on its way
  std::unique_lock<std::mutex> lock(mutex_);
  const auto unlocked = [&](const auto& f) {
    lock.unlock();
    std::exception_ptr error;
    try {
      f();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !error_) error_ = error;
  };
  for (;;) {
    if (pieces_.empty() && working) {
      unlocked([&] {
        if (lane) lane->wait();
      });
      working = false;
      if (--busy_ == 0 && pieces_.empty()) idle_.notify_all();
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
    unlocked([&] {
      if (!lane) {
        check(cudaSetDevice(index_), "choosing the device");
        lane = std::make_unique<Lane>(like_, read_);
      }
      load(piece, *lane);
    });
  }
}

void Uploader::load(const Piece& piece, Lane& lane) {
  if (!piece.values.empty()) {
    lane.begin(piece.data);
    lane.put(reinterpret_cast<const uint8_t*>(piece.values.data()), piece.values.size() * sizeof(float));
    return lane.end();
  }
  HostMatrix rows = piece.parts[0];  // as the device will see them
  rows.rows = 0;
  for (const HostMatrix& p : piece.parts) rows.rows += p.rows;
  lane.begin(std::max(size_t(rows.rows) * bytes_a_row(rows) + 3 * kAlign, kPieceBytes));
  const auto send = [&](const auto& rows_of /*(part) -> HostRows*/, size_t row) -> HostRows {
    if (row == 0) return {};
    const uint8_t* const there = lane.aligned();
    for (const HostMatrix& p : piece.parts) {
      const HostRows from = rows_of(p);
      if (from.stride == row)
        lane.put(from.data, size_t(p.rows) * row);
      else
        for (int64_t r = 0; r < p.rows; ++r) lane.put(from.row(r), row);
    }
    return {there, row};
  };
  const HostRows data = send([](const HostMatrix& p) { return HostRows{p.data, p.stride}; }, row_bytes(rows.format, rows.cols));
  rows.data = data.data;
  rows.stride = data.stride;
  rows.scale = send([](const HostMatrix& p) { return p.scale; }, scale_bytes(rows.format, rows.cols));
  rows.zero = send([](const HostMatrix& p) { return p.zero; }, zero_bytes(rows.format, rows.cols));
  lane.end();
  const Stream& s = lane.stream();
  if (is_quantized(rows.format))
    repack_quantized(s, act_, rows, piece.total_rows, piece.data, piece.first_row, overflow_);
  else
    repack(s, act_, rows.format, rows.data, int(rows.rows), int(rows.cols), piece.data, piece.first_row, overflow_);
}

}  // namespace codefuse::cuda
