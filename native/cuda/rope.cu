// Rotates Q and K of each row and stores K and V in the row's page; or K and V alone.
#include "cuda/kernels.h"
#include "cuda/rotate.cuh"

namespace codefuse::cuda {

namespace {

template <class T, int W> struct __align__(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack { T v[W]; };

// grid (rows, parts); a thread takes two runs of W elements of a head at a time: a rotated pair, or neighbours. W divides rope_dim / 2, and 2 W
// divides head_dim - rope_dim. Where to read, and the angles, it knows before its predecessor is done. from: the first head, 0 or (then qkv is not
// written) that of K.
template <class T, int W>
__global__ void __launch_bounds__(256) rope_rows(T* __restrict__ qkv, T* __restrict__ keys, T* __restrict__ values, const float2* __restrict__ angles,
                                                  const StepMeta m, const AttentionShape a, int from) {
  launch_dependents();
  const int row = blockIdx.x, position = m.position[row], d = a.head_dim, pairs = a.rope_dim / 2, all = a.heads + 2 * a.kv_heads;
  const bool padding = m.slot[row] < 0;
  const int64_t page = padding ? 0 : m.table[int64_t(m.sequence[row]) * m.max_pages + position / kPageTokens];
  const int each = d / (2 * W), work = padding ? 0 : (all - from) * each, step = gridDim.y * blockDim.x;
  qkv += int64_t(row) * all * d;
  bool waited = false;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < work; i += step) {
    const int head = from + i / each, j = i % each * W;
    const bool rotated = head < a.heads + a.kv_heads && j < pairs;
    const bool split = head < a.heads + a.kv_heads;  // V has no pairs
    const int first = !split ? 2 * j : rotated ? j : a.rope_dim + 2 * (j - pairs), second = rotated ? j + pairs : first + W;
    Pack<float2, W> r;
    if (rotated) r = *reinterpret_cast<const Pack<float2, W>*>(angles + int64_t(position) * pairs + j);
    if (!waited) grid_wait(), waited = true;
    if (!rotated && head < a.heads) continue;
    T* h = qkv + head * d;
    Pack<T, W> x = *reinterpret_cast<Pack<T, W>*>(h + first), y = *reinterpret_cast<Pack<T, W>*>(h + second);
    if (rotated) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const float u = to_float(x.v[e]), v = to_float(y.v[e]);
        x.v[e] = from_float<T>(rotate_first(u, v, r.v[e]));
        y.v[e] = from_float<T>(rotate_second(u, v, r.v[e]));
      }
      if (from == 0) {
        *reinterpret_cast<Pack<T, W>*>(h + first) = x;
        *reinterpret_cast<Pack<T, W>*>(h + second) = y;
      }
    }
    if (head >= a.heads) {
      const int kv = (head - a.heads) % a.kv_heads;
      T* to = (head < a.heads + a.kv_heads ? keys : values) + ((page * a.kv_heads + kv) * kPageTokens + position % kPageTokens) * d;
      *reinterpret_cast<Pack<T, W>*>(to + first) = x;
      *reinterpret_cast<Pack<T, W>*>(to + second) = y;
    }
  }
  if (!waited) grid_wait();
}

template <class T>
void run(const Stream& s, void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int rows, const AttentionShape& a, bool keys_only) {
  constexpr int kMost = 16 / sizeof(T);
  const auto fits = [&](int width) {
    return a.rope_dim % (2 * width) == 0 && (a.head_dim - a.rope_dim) % (2 * width) == 0 && reinterpret_cast<uintptr_t>(qkv) % 16 == 0;
  };
  const int width = fits(kMost) ? kMost : fits(4) ? 4 : 1, from = keys_only ? a.heads : 0;
  const int work = (a.heads + 2 * a.kv_heads - from) * a.head_dim / (2 * width), parts = std::max(1, std::min((work + 255) / 256, rows > 64 ? 4 : 32));
  launch(s, width == 1 ? rope_rows<T, 1> : width == kMost ? rope_rows<T, kMost> : rope_rows<T, 4>, dim3(rows, parts), 256, 0, static_cast<T*>(qkv),
         static_cast<T*>(kv.k), static_cast<T*>(kv.v), angles, m, a, from);
}

}  // namespace

void rope_store(const Stream& s, DType act, void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int T, const AttentionShape& a, bool keys_only) {
  if (act == DType::f32) return run<float>(s, qkv, kv, angles, m, T, a, keys_only);
  act == DType::f16 ? run<__half>(s, qkv, kv, angles, m, T, a, keys_only) : run<__nv_bfloat16>(s, qkv, kv, angles, m, T, a, keys_only);
}

}  // namespace codefuse::cuda
