// y = fn(gate) * up, element by element.
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

template <class T>
__global__ void gate_all(T* y, const T* gate, const T* up, int fn, int64_t n) {
  launch_dependents();
  grid_wait();
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    y[i] = from_float<T>(activate(to_float(gate[i]), fn) * to_float(up[i]));
}

template <class T>
void run(const Stream& s, void* y, const void* gate, const void* up, Activation fn, int64_t n) {
  launch(s, gate_all<T>, int(std::min<int64_t>((n + 255) / 256, 4096)), 256, 0, static_cast<T*>(y), static_cast<const T*>(gate),
         static_cast<const T*>(up), int(fn), n);
}

}  // namespace

void gate(const Stream& s, DType act, void* y, const void* gate, const void* up, Activation fn, int64_t n) {
  if (act == DType::f32) return run<float>(s, y, gate, up, fn, n);
  act == DType::f16 ? run<__half>(s, y, gate, up, fn, n) : run<__nv_bfloat16>(s, y, gate, up, fn, n);
}

}  // namespace codefuse::cuda
