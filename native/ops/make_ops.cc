#include "ops/comm.h"
#include "ops/ops.h"
#ifdef CODEFUSE_WITH_CUDA
#include "cuda/cuda_ops.h"
#endif

namespace codefuse {

namespace {

std::string why_no_cuda() {
#ifdef CODEFUSE_WITH_CUDA
  return cuda_unavailable();
#else
  return "built without CUDA";
#endif
}

int device_count() {
#ifdef CODEFUSE_WITH_CUDA
  return cuda_unavailable().empty() ? cuda_device_count() : 0;
#else
  return 0;
#endif
}

std::unique_ptr<Ops> cuda_ops(int index, DType act, int threads, int shared_max) {
#ifdef CODEFUSE_WITH_CUDA
  return make_cuda_ops(index, act, threads, shared_max);
#else
  (void)index, (void)act, (void)threads, (void)shared_max;
  throw ValueError("device is 'cuda', but this build has no CUDA");
#endif
}

std::unique_ptr<CommGroup> cuda_group(int first, int world) {
#ifdef CODEFUSE_WITH_CUDA
  return make_cuda_group(first, world);
#else
  (void)first, (void)world;
  throw ValueError("device is 'cuda', but this build has no CUDA");
#endif
}

// "cuda" or "cuda:N" -> N; -1: something else
int cuda_index(const std::string& device) {
  if (device == "cuda") return 0;
  if (device.rfind("cuda:", 0) != 0 || device.size() < 6 || device.size() > 8) return -1;
  int index = 0;
  for (size_t i = 5; i < device.size(); ++i) {
    if (device[i] < '0' || device[i] > '9') return -1;
    index = index * 10 + (device[i] - '0');
  }
  return index;
}

}  // namespace

Devices devices() {
  Devices d;
  d.why_no_cuda = why_no_cuda();
  d.names = "cpu";
  for (int i = 0; i < device_count(); ++i) d.names += cat(",cuda:", i);
  return d;
}

void check_device(const std::string& device) {
  if (device == "auto" || device == "cpu") return;
  const int index = cuda_index(device);
  if (index < 0) throw ValueError(cat("device is '", device, "'; expected cpu, cuda, cuda:N or auto"));
  const Devices d = devices();
  if (index >= device_count())
    throw ValueError(cat("device is '", device, "', but only ", d.names, " can be used here",
                         d.why_no_cuda.empty() ? "" : cat(" (", d.why_no_cuda, ")")));
}

std::string rank_device(const std::string& device, int rank, int world) {
  check_device(device);
  if (device == "cpu" || (device == "auto" && device_count() == 0)) return "cpu";
  const int first = device == "auto" ? 0 : cuda_index(device), last = device_count() - 1;
  if (first + world - 1 > last)
    throw ValueError(cat("tensor_parallel is ", world, ", one GPU each; from cuda:", first, " there ", last > first ? cat("are ", last - first + 1) : "is 1",
                         " (cuda:0 to cuda:", last, ")"));
  return cat("cuda:", first + rank);
}

std::unique_ptr<CommGroup> make_device_group(const std::string& device, int world) { return cuda_group(cuda_index(rank_device(device, 0, world)), world); }

std::unique_ptr<Ops> make_ops(const std::string& device, const std::string& dtype, DType weights, int threads, int shared_max) {
  if (device == "cpu" || (device == "auto" && device_count() == 0)) {
    if (dtype != "auto" && parse_dtype(dtype) != DType::f32)
      throw ValueError(cat("dtype is '", dtype, "'; expected float32 or auto on the CPU"));
    return make_cpu_ops(threads);
  }
  check_device(device);
  const int index = device == "auto" ? 0 : cuda_index(device);
  return cuda_ops(index, dtype == "auto" ? weights : parse_dtype(dtype), threads, shared_max);
}

}  // namespace codefuse
