// Rows in and out of the residual stream: embedding, learned positions, gathering.
#include "cuda/kernels.h"
#include "cuda/tiles.cuh"

namespace codefuse::cuda {

namespace {

// element (row, col) of a matrix in this device's layout: float32 rows, or tiles
__device__ __forceinline__ float weight_at(const float* w, int64_t row, int col, int hidden) { return w[row * hidden + col]; }
template <class T>
__device__ __forceinline__ float weight_at(const T* w, int64_t row, int col, int hidden) {
  return to_float(w[tile_offset(row, col, steps_of(hidden))]);
}

template <class T>
__global__ void embed_rows(float* __restrict__ x, const T* __restrict__ table, StepMeta m, int hidden, int vocab) {
  launch_dependents();
  grid_wait();
  const int t = blockIdx.x, slot = m.slot[t], given = m.token[t];  // asked for together
  const int token = given == kLastToken && slot >= 0 ? m.last_token[slot] : given;
  const bool known = slot >= 0 && token >= 0 && token < vocab;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < hidden; i += gridDim.y * blockDim.x)
    x[int64_t(t) * hidden + i] = known ? weight_at(table, token, i, hidden) : 0.f;
}

template <class T>
__global__ void add_position_rows(float* __restrict__ x, const T* __restrict__ table, StepMeta m, int hidden) {
  launch_dependents();
  grid_wait();
  const int t = blockIdx.x;
  if (m.slot[t] < 0) return;
  for (int i = threadIdx.x; i < hidden; i += blockDim.x) x[int64_t(t) * hidden + i] += weight_at(table, m.position[t], i, hidden);
}

template <class U>
__global__ void gather(U* __restrict__ y, const U* __restrict__ x, const int32_t* __restrict__ row, int units) {
  launch_dependents();
  grid_wait();
  const int64_t from = int64_t(row[blockIdx.x]) * units, to = int64_t(blockIdx.x) * units;
  for (int i = threadIdx.x; i < units; i += blockDim.x) y[to + i] = load_fresh(x + from + i);
}

template <class U>
void run_gather(const Stream& s, void* y, const void* x, const int32_t* row, int T, size_t bytes) {
  launch(s, gather<U>, T, 256, 0, static_cast<U*>(y), static_cast<const U*>(x), row, int(bytes / sizeof(U)));
}

template <class T>
__global__ void take(T* __restrict__ y, const T* __restrict__ x, const int32_t* __restrict__ order, int64_t k) {
  launch_dependents();
  const int64_t i = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const int32_t from = i < k ? order[i] : 0;
  grid_wait();
  if (i < k) y[blockIdx.x * k + i] = load_fresh(x + (blockIdx.x * k + from));
}

template <class T>
void run_take(const Stream& s, void* y, const void* x, const int32_t* order, int rows, int64_t k) {
  launch(s, take<T>, dim3(unsigned(rows), unsigned((k + 255) / 256)), 256, 0, static_cast<T*>(y), static_cast<const T*>(x), order, k);
}

template <class T>
void run_embed(const Stream& s, float* x, const void* table, const StepMeta& m, int rows, int hidden, int vocab) {
  launch(s, embed_rows<T>, dim3(rows, std::min((hidden + 255) / 256, 8)), 256, 0, x, static_cast<const T*>(table), m, hidden, vocab);
}

template <class T>
void run_position(const Stream& s, float* x, const void* table, const StepMeta& m, int rows, int hidden) {
  launch(s, add_position_rows<T>, rows, 256, 0, x, static_cast<const T*>(table), m, hidden);
}

}  // namespace

void embed(const Stream& s, DType act, float* x, const void* table, const StepMeta& m, int T, int hidden, int vocab) {
  if (act == DType::f32) return run_embed<float>(s, x, table, m, T, hidden, vocab);
  act == DType::f16 ? run_embed<__half>(s, x, table, m, T, hidden, vocab) : run_embed<__nv_bfloat16>(s, x, table, m, T, hidden, vocab);
}

void add_position(const Stream& s, DType act, float* x, const void* table, const StepMeta& m, int T, int hidden) {
  if (act == DType::f32) return run_position<float>(s, x, table, m, T, hidden);
  act == DType::f16 ? run_position<__half>(s, x, table, m, T, hidden) : run_position<__nv_bfloat16>(s, x, table, m, T, hidden);
}

void take_columns(const Stream& s, DType act, void* y, const void* x, const int32_t* order, int T, int64_t k) {
  act == DType::f32 ? run_take<float>(s, y, x, order, T, k) : run_take<uint16_t>(s, y, x, order, T, k);
}
void gather_rows(const Stream& s, void* y, const void* x, const int32_t* row, int T, size_t bytes) {
  bytes % 16 == 0 ? run_gather<uint4>(s, y, x, row, T, bytes) : run_gather<uint16_t>(s, y, x, row, T, bytes);
}

}  // namespace codefuse::cuda
