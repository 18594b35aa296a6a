// Device memory, weights, and what this machine's driver can do.
#include <cstring>

#include "cuda/cuda_ops.h"
#include "cuda/device_ops.h"
#include "cuda/tiles.cuh"
#include "cuda/weights.cuh"

namespace codefuse::cuda {

namespace {

constexpr size_t kBounceBytes = 32 << 20;
constexpr int kGroupsMax = 1 << 14;  // row groups of one matrix: 4 million rows

// Runs where the build has code for the device; its attributes say which architecture that code was compiled for.
__global__ void probe() {}

}  // namespace

CudaOps::CudaOps(int index, DType act) : index_(index), act_(act) {
  use();
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, probe), "this build has no code for this GPU (CODEFUSE_CUDA_ARCHS)");
  s_.bulk_copy = s_.dependent = code.ptxVersion >= 90;  // the kernels' own #if, whatever the device could do
  s_.wgmma = s_.bulk_copy && has_wgmma();
  check(cudaDeviceGetAttribute(&s_.sms, cudaDevAttrMultiProcessorCount, index_), "multiprocessors");
  check(cudaDeviceGetAttribute(&s_.shared_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_), "shared memory");
  check(cudaStreamCreateWithFlags(&s_.stream, cudaStreamNonBlocking), "stream");
  overflow_ = alloc_array<int32_t>(1);
  for (int i = 0; i < 2; ++i) {
    check(cudaEventCreateWithFlags(&uploaded_[i], cudaEventDisableTiming), "event");
    check(cudaEventCreateWithFlags(&done_[i], cudaEventDisableTiming), "event");
  }
}

CudaOps::~CudaOps() {
  cudaSetDevice(index_);
  if (s_.stream) cudaStreamSynchronize(s_.stream);
  for (auto& r : recordings_)
    if (r.second.graph) cudaGraphExecDestroy(r.second.graph);
  drop_bounces();
  for (int i = 0; i < 2; ++i) {
    cudaFreeHost(staging_[i]);
    cudaFreeHost(edits_staging_[i]);
    cudaFreeHost(results_[i]);
    cudaEventDestroy(uploaded_[i]);
    cudaEventDestroy(done_[i]);
  }
  for (void* p : owned_) cudaFree(p);
  if (s_.stream) cudaStreamDestroy(s_.stream);
}

void CudaOps::use() const { check(cudaSetDevice(index_), "choosing the device"); }

void* CudaOps::alloc(size_t bytes) {
  use();
  void* p = nullptr;
  cudaError_t e = cudaMalloc(&p, std::max<size_t>(bytes, 16));
  if (e == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw DeviceError(cat(device(), ": out of memory asking for ", bytes, " bytes; ", free_memory(), " are free"));
  }
  check(e, "allocating");
  owned_.push_back(p);
  check(cudaMemsetAsync(p, 0, std::max<size_t>(bytes, 16), s_.stream), "clearing memory");
  return p;
}

size_t CudaOps::free_memory() const {
  use();
  size_t free_bytes = 0, total = 0;
  check(cudaMemGetInfo(&free_bytes, &total), "asking for free memory");
  return free_bytes;
}

CudaOps::Bounce& CudaOps::bounce(size_t bytes) {
  Bounce& b = bounces_[next_bounce_];
  next_bounce_ ^= 1;
  if (!b.free) check(cudaEventCreateWithFlags(&b.free, cudaEventDisableTiming), "event");
  check(cudaEventSynchronize(b.free), "uploading weights");
  if (b.bytes < bytes) {
    cudaFreeHost(b.host);
    cudaFree(b.device);
    b.host = b.device = nullptr;
    b.bytes = 0;
    check(cudaMallocHost(&b.host, bytes), "pinned memory for uploading weights");
    check(cudaMalloc(&b.device, bytes), "memory for uploading weights");
    b.bytes = bytes;
  }
  return b;
}

void CudaOps::drop_bounces() {
  for (Bounce& b : bounces_) {
    if (b.free) cudaEventSynchronize(b.free), cudaEventDestroy(b.free);
    cudaFreeHost(b.host);
    cudaFree(b.device);
    b = Bounce{};
  }
}

Matrix CudaOps::load_matrix(const HostMatrix& m) {
  use();
  if (m.format == Format::q4_g64) throw LoadError(cat(device(), ": format q4_g64 has no CUDA kernels yet; use q4_g128 or q8_row, or device cpu"));
  Matrix out;
  out.host = m;
  out.host.data = out.host.scale.data = out.host.zero.data = nullptr;
  out.rows = m.rows;
  out.cols = m.cols;
  if (groups_of(m.rows) > kGroupsMax || m.cols > INT32_MAX) throw LoadError(cat(device(), ": a matrix of ", m.rows, " x ", m.cols, " is too large"));
  void* data = alloc(act_ == DType::f32 ? size_t(m.rows) * size_t(m.cols) * 4 : matrix_bytes(m.format, m.rows, m.cols));
  out.data = data;
  const size_t codes = row_bytes(m.format, m.cols), scales = scale_bytes(m.format, m.cols), zeros = zero_bytes(m.format, m.cols);
  const size_t group = (codes + scales + zeros) * kGroupRows;
  const int64_t batch = int64_t(std::max<size_t>(1, kBounceBytes / group)) * kGroupRows;  // whole row groups
  for (int64_t r = 0; r < m.rows; r += batch) {
    const int64_t count = std::min(batch, m.rows - r);
    Bounce& b = bounce(std::max(kBounceBytes, group) + 32);
    size_t at = 0;
    const auto put = [&](const uint8_t* from, size_t stride, size_t row) {
      char* const to = static_cast<char*>(b.host) + at;
      for (int64_t i = 0; i < count;) {  // rows that lie together in one copy
        const int64_t run = stride == row ? count : 1;
        std::memcpy(to + size_t(i) * row, from + size_t(r + i) * stride, size_t(run) * row);
        i += run;
      }
      const uint8_t* on_device = static_cast<const uint8_t*>(b.device) + at;
      at += (size_t(count) * row + 15) / 16 * 16;
      return on_device;
    };
    HostMatrix part = m;
    part.rows = count;
    part.data = put(m.data, m.stride, codes);
    if (scales) part.scale.data = put(m.scale.data, m.scale.stride, scales);
    if (zeros) part.zero.data = put(m.zero.data, m.zero.stride, zeros);
    check(cudaMemcpyAsync(b.device, b.host, at, cudaMemcpyHostToDevice, s_.stream), "uploading weights");
    if (is_quantized(m.format))
      repack_quantized(s_, act_, part, m.rows, data, r, overflow_);
    else
      repack(s_, act_, m.format, b.device, int(count), int(m.cols), data, r, overflow_);
    check(cudaEventRecord(b.free, s_.stream), "uploading weights");
  }
  quantized_ |= is_quantized(m.format);
  if (planned_) check_overflow();
  return out;
}

void CudaOps::check_overflow() {
  int32_t overflow = 0;
  download(&overflow, overflow_, sizeof overflow);
  if (overflow) throw LoadError(cat(device(), ": a weight is too large for ", name_of(act_), "; use bfloat16 or float32"));
}

const float* CudaOps::load_vector(const HostMatrix& v) {
  if (v.empty()) return nullptr;
  std::vector<float> host(size_t(v.cols), 0.f);
  decode_row(v, 0, host.data());
  float* out = alloc_array<float>(host.size());
  upload(out, host.data(), host.size() * sizeof(float));
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

std::unique_ptr<Ops> make_cuda_ops(int index, DType act) {
  const std::string why = cuda_unavailable();
  if (!why.empty()) throw ValueError(cat("device is 'cuda:", index, "'; CUDA cannot be used here: ", why));
  if (index < 0 || index >= cuda_device_count())
    throw ValueError(cat("device is 'cuda:", index, "'; this machine has cuda:0 to cuda:", cuda_device_count() - 1));
  return std::make_unique<cuda::CudaOps>(index, act);
}

}  // namespace codefuse
