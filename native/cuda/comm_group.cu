// The mailboxes of a model's GPUs and the Comm of each rank.
#include <vector>

#include "cuda/comm.h"
#include "cuda/device_ops.h"
#include "cuda/turns.h"
#include "ops/comm.h"

namespace codefuse::cuda {

namespace {

class CudaComm final : public Comm {
 public:
  CudaComm(const Mail& mail, CudaOps& ops) : mail_(mail), ops_(ops) {}
  int rank() const override { return mail_.rank; }
  int world() const override { return mail_.world; }
  void add_sum(float* y, float* data, int64_t n) override { cuda::add_sum(ops_.stream(), mail_, y, data, n); }
  void all_gather_columns(float* out, const float* in, int64_t rows, int64_t total) override { gather_columns(ops_.stream(), mail_, out, in, rows, total); }

 private:
  const Mail mail_;
  CudaOps& ops_;
};

// Memory on one GPU that others can use: from a pool of its own, so that they are let into nothing else.
class Mailbox {
 public:
  Mailbox(int device, const std::vector<int>& others, size_t bytes) : device_(device) {
    try {
      check(cudaSetDevice(device), "choosing the device");
      cudaMemPoolProps props{};
      props.allocType = cudaMemAllocationTypePinned;
      props.location.type = cudaMemLocationTypeDevice;
      props.location.id = device;
      check(cudaMemPoolCreate(&pool_, &props), "memory that GPUs share");
      std::vector<cudaMemAccessDesc> access;
      for (int other : others) {
        cudaMemAccessDesc a{};
        a.location.type = cudaMemLocationTypeDevice;
        a.location.id = other;
        a.flags = cudaMemAccessFlagsProtReadWrite;
        access.push_back(a);
      }
      check(cudaMemPoolSetAccess(pool_, access.data(), access.size()), "memory that GPUs share");
      check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
      check(cudaMallocFromPoolAsync(&data_, bytes, pool_, stream_), "memory that GPUs share");
      check(cudaMemsetAsync(data_, 0, bytes, stream_), "memory that GPUs share");
      check(cudaStreamSynchronize(stream_), "memory that GPUs share");
    } catch (...) {
      release();
      throw;
    }
  }
  ~Mailbox() { release(); }
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void release() {
    cudaSetDevice(device_);
    if (data_) cudaFreeAsync(data_, stream_);
    if (stream_) cudaStreamSynchronize(stream_);
    if (pool_) cudaMemPoolDestroy(pool_);
    if (stream_) cudaStreamDestroy(stream_);
  }

  const int device_;
  cudaMemPool_t pool_ = nullptr;
  cudaStream_t stream_ = nullptr;
  void* data_ = nullptr;
};

class CudaGroup final : public CommGroup {
 public:
  CudaGroup(int first, int world) {
    if (world > kRanksMost) throw ValueError(cat("tensor_parallel is ", world, "; expected 1 to ", kRanksMost, " on GPUs"));
    for (int a = first; a < first + world; ++a) {
      int sms = 0;
      cuda::check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, a), "multiprocessors");
      if (sms < kMultiprocessorsLeast)
        throw ValueError(cat("tensor_parallel is ", world, ", but cuda:", a, " has ", sms, " multiprocessors; expected ", kMultiprocessorsLeast, " or more"));
      for (int b = first; b < first + world; ++b) {
        int can = a == b;
        if (a != b) cuda::check(cudaDeviceCanAccessPeer(&can, a, b), "asking what GPUs share");
        if (!can)
          throw ValueError(cat("tensor_parallel is ", world, ", but cuda:", a, " cannot use the memory of cuda:", b, ": no peer access between the two on this machine"));
      }
    }
    mail_.rank = -1;
    mail_.world = world;
    for (int r = 0; r < world; ++r) {
      std::vector<int> others;
      for (int o = 0; o < world; ++o)
        if (o != r) others.push_back(first + o);
      boxes_.push_back(std::make_unique<Mailbox>(first + r, others, mailbox_bytes(world)));
      mail_.box[r] = boxes_.back()->data();
    }
    cuda::check(cudaHostAlloc(reinterpret_cast<void**>(&mail_.failed), sizeof(int32_t), cudaHostAllocPortable | cudaHostAllocMapped), "pinned memory");
    *mail_.failed = 0;
  }
  ~CudaGroup() override {
    const auto lock = Turns::several();
    boxes_.clear();
    cudaFreeHost(mail_.failed);
  }

  std::unique_ptr<Comm> join(int rank, Ops& ops) override {
    Mail mail = mail_;
    mail.rank = rank;
    return std::make_unique<CudaComm>(mail, dynamic_cast<CudaOps&>(ops));
  }
  std::unique_lock<std::mutex> turn() override { return Turns::several(); }
  void abort() override {
    int32_t none = 0;
    __atomic_compare_exchange_n(mail_.failed, &none, -1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  }
  void check() const override {
    const int32_t failed = __atomic_load_n(mail_.failed, __ATOMIC_SEQ_CST);
    if (failed > 0) throw DeviceError(cat("CUDA: rank ", failed - 1, " of the model waited ", kPatienceNs / 1'000'000'000, " s for the others in vain"));
    if (failed < 0) throw DeviceError("another rank of the model failed");
  }

 private:
  Mail mail_{};
  std::vector<std::unique_ptr<Mailbox>> boxes_;
};

}  // namespace

}  // namespace codefuse::cuda

namespace codefuse {

std::unique_ptr<CommGroup> make_cuda_group(int first, int world) { return std::make_unique<cuda::CudaGroup>(first, world); }

}  // namespace codefuse
