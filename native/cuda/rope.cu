// Rotates Q and K of each row and stores K and V in the row's page.
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

// grid (rows, parts); a thread takes two elements of a head at a time: a rotated pair, or neighbours
template <class T>
__global__ void rope_rows(T* __restrict__ qkv, T* __restrict__ keys, T* __restrict__ values, const float2* __restrict__ angles, StepMeta m, AttentionShape a) {
  launch_dependents();
  grid_wait();
  const int row = blockIdx.x;
  if (m.slot[row] < 0) return;
  const int position = m.position[row], d = a.head_dim, pairs = a.rope_dim / 2, all = a.heads + 2 * a.kv_heads;
  const int64_t page = m.table[int64_t(m.sequence[row]) * m.max_pages + position / kPageTokens];
  qkv += int64_t(row) * all * d;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < all * (d / 2); i += gridDim.y * blockDim.x) {
    const int head = i / (d / 2), j = i % (d / 2);
    const bool rotated = head < a.heads + a.kv_heads && j < pairs;
    const bool split = head < a.heads + a.kv_heads;  // V has no pairs
    const int first = !split ? 2 * j : rotated ? j : a.rope_dim + 2 * (j - pairs), second = rotated ? j + pairs : first + 1;
    T* h = qkv + head * d;
    T x = h[first], y = h[second];
    if (rotated) {
      const float2 r = angles[int64_t(position) * pairs + j];
      const float u = to_float(x), v = to_float(y);
      x = from_float<T>(u * r.x - v * r.y);
      y = from_float<T>(v * r.x + u * r.y);
      h[first] = x;
      h[second] = y;
    }
    if (head >= a.heads) {
      const int kv = (head - a.heads) % a.kv_heads;
      T* to = (head < a.heads + a.kv_heads ? keys : values) + ((page * a.kv_heads + kv) * kPageTokens + position % kPageTokens) * d;
      to[first] = x;
      to[second] = y;
    }
  }
}

template <class T>
void run(const Stream& s, void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int rows, const AttentionShape& a) {
  const int work = (a.heads + 2 * a.kv_heads) * a.head_dim / 2, parts = std::max(1, std::min((work + 255) / 256, rows > 64 ? 4 : 32));
  launch(s, rope_rows<T>, dim3(rows, parts), 256, 0, static_cast<T*>(qkv), static_cast<T*>(kv.k), static_cast<T*>(kv.v), angles, m, a);
}

}  // namespace

void rope_store(const Stream& s, DType act, void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int T, const AttentionShape& a) {
  if (act == DType::f32) return run<float>(s, qkv, kv, angles, m, T, a);
  act == DType::f16 ? run<__half>(s, qkv, kv, angles, m, T, a) : run<__nv_bfloat16>(s, qkv, kv, angles, m, T, a);
}

}  // namespace codefuse::cuda
