// Device memory, weights, and what this machine's driver can do.
#include <algorithm>
#include <thread>

#include "cuda/cuda_ops.h"
#include "cuda/device_ops.h"
#include "cuda/tiles.cuh"
#include "cuda/weights.cuh"

namespace codefuse::cuda {

namespace {

constexpr int kGroupsMax = 1 << 14;  // row groups of one matrix: 4 million rows

// Runs where the build has code for the device; its attributes say which architecture that code was compiled for.
__global__ void probe() {}

}  // namespace

CudaOps::CudaOps(int index, DType act, int threads, int shared_max)
    : index_(index), act_(act), turns_(Turns::of(index)), copy_threads_(std::clamp((threads > 0 ? threads : int(std::thread::hardware_concurrency())) * 7 / 8, 1, 14)) {
  use();
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, probe), "this build has no code for this GPU (CODEFUSE_CUDA_ARCHS)");
  s_.bulk_copy = s_.dependent = code.ptxVersion >= 90;  // the kernels' own #if, whatever the device could do
  s_.wgmma = s_.bulk_copy && has_wgmma();
  check(cudaDeviceGetAttribute(&s_.sms, cudaDevAttrMultiProcessorCount, index_), "multiprocessors");
  check(cudaDeviceGetAttribute(&s_.shared_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index_), "shared memory");
  check(cudaDeviceGetAttribute(&s_.shared_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_), "shared memory");
  if (shared_max > 0) s_.shared_max = std::min(s_.shared_max, shared_max), s_.shared_sm = std::min(s_.shared_sm, shared_max + 1024);
  check(cudaStreamCreateWithFlags(&s_.stream, cudaStreamNonBlocking), "stream");
  overflow_ = alloc_array<int32_t>(1);
  for (cudaEvent_t& done : done_) check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "event");
}

CudaOps::~CudaOps() {
  cudaSetDevice(index_);
  uploader_.reset();
  if (s_.stream) cudaStreamSynchronize(s_.stream);
  turns_->leave(s_.stream);
  const auto lock = Turns::several();
  for (auto& r : recordings_)
    if (r.second.graph) cudaGraphExecDestroy(r.second.graph);
  for (int i = 0; i < 2; ++i) {
    cudaFreeHost(staging_[i]);
    cudaFreeHost(edits_staging_[i]);
    cudaFreeHost(results_[i]);
    cudaEventDestroy(done_[i]);
  }
  for (void* p : owned_) cudaFree(p);
  if (s_.stream) cudaStreamDestroy(s_.stream);
}

void CudaOps::use() const { check(cudaSetDevice(index_), "choosing the device"); }

void* CudaOps::allocate(size_t bytes) {
  use();
  void* p = nullptr;
  cudaError_t e = cudaMalloc(&p, std::max<size_t>(bytes, 16));
  if (e == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw DeviceError(cat(device(), ": out of memory asking for ", bytes, " bytes; ", free_memory(), " are free"));
  }
  check(e, "allocating");
  owned_.push_back(p);
  return p;
}

void* CudaOps::alloc(size_t bytes) {
  void* const p = allocate(bytes);
  check(cudaMemsetAsync(p, 0, std::max<size_t>(bytes, 16), s_.stream), "clearing memory");
  return p;
}

size_t CudaOps::free_memory() const {
  use();
  size_t free_bytes = 0, total = 0;
  check(cudaMemGetInfo(&free_bytes, &total), "asking for free memory");
  return free_bytes;
}

Uploader& CudaOps::uploader() {
  if (!uploader_) {
    check(cudaStreamSynchronize(s_.stream), "uploading weights");  // overflow_ is cleared there
    uploader_ = std::make_unique<Uploader>(index_, act_, s_, overflow_, read_, copy_threads_);
  }
  return *uploader_;
}

Matrix CudaOps::load_matrix(const std::vector<HostMatrix>& parts) {
  use();
  Matrix out;
  out.host = parts[0];
  out.host.rows = 0;
  for (const HostMatrix& p : parts) out.host.rows += p.rows;
  out.host.data = out.host.scale.data = out.host.zero.data = nullptr;
  const Format format = out.host.format;
  out.rows = out.host.rows;
  out.cols = out.host.cols;
  if (groups_of(out.rows) > kGroupsMax || out.cols > INT32_MAX) throw LoadError(cat(device(), ": a matrix of ", out.rows, " x ", out.cols, " is too large"));
  void* const data = allocate(act_ == DType::f32 ? size_t(out.rows) * size_t(out.cols) * 4 : matrix_bytes(format, out.rows, out.cols));
  out.data = data;
  uploader().add(parts, data);
  quantized_ |= is_quantized(format);
  return out;
}

void CudaOps::finish_loading() {
  use();
  if (uploader_) uploader_->wait();
  uploader_.reset();
  read_ = nullptr;
  check_overflow();
}

void CudaOps::check_overflow() {
  int32_t overflow = 0;
  download(&overflow, overflow_, sizeof overflow);
  if (overflow) throw OverflowError(cat(device(), ": a weight is too large for ", name_of(act_), "; use bfloat16 or float32"));
}

const float* CudaOps::load_vector(const HostMatrix& v) {
  if (v.empty()) return nullptr;
  std::vector<float> host(size_t(v.cols), 0.f);
  decode_row(v, 0, host.data());
  float* const out = static_cast<float*>(allocate(host.size() * sizeof(float)));
  uploader().add(std::move(host), out);
  return out;
}

void CudaOps::read_matrix(float* y, const Matrix& m) {
  use();
  read_weights(s_, act_, m.host.format, m.data, int(m.rows), int(m.cols), y);
}

void CudaOps::upload(void* dst, const void* src, size_t bytes) {
  use();
  check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, s_.stream), "copying to the device");
  check(cudaStreamSynchronize(s_.stream), "copying to the device");
}

void CudaOps::download(void* dst, const void* src, size_t bytes) {
  use();
  check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, s_.stream), "copying from the device");
  check(cudaStreamSynchronize(s_.stream), "copying from the device");
}

}  // namespace codefuse::cuda

namespace codefuse {

int cuda_device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return n;
}

std::string cuda_unavailable() {
  int n = 0;
  cudaError_t e = cudaGetDeviceCount(&n);
  if (e == cudaErrorInsufficientDriver || e == cudaErrorNoDevice || (e == cudaSuccess && n == 0)) {
    cudaGetLastError();
    return cat(e == cudaErrorInsufficientDriver ? "no driver: " : "no device: ", e == cudaSuccess ? "none is visible" : cudaGetErrorString(e));
  }
  if (e != cudaSuccess) {
    cudaGetLastError();
    return cat("driver: ", cudaGetErrorString(e));
  }
  return "";
}

std::unique_ptr<Ops> make_cuda_ops(int index, DType act, int threads, int shared_max) {
  const std::string why = cuda_unavailable();
  if (!why.empty()) throw ValueError(cat("device is 'cuda:", index, "'; CUDA cannot be used here: ", why));
  if (index < 0 || index >= cuda_device_count())
    throw ValueError(cat("device is 'cuda:", index, "'; this machine has cuda:0 to cuda:", cuda_device_count() - 1));
  return std::make_unique<cuda::CudaOps>(index, act, threads, shared_max);
}

}  // namespace codefuse
