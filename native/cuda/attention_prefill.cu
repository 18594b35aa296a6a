// Attention of prefill rows on the tensor cores. A block takes up to 64 rows of one sequence and one head, 16 rows a warp, and walks
// the positions in tiles of 64 aligned at 0. A tile that a row may not see changes nothing in that row, so its
// result does not depend on which rows share the block: a prompt in chunks equals the prompt whole, bit for bit.
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kKeys = 64;     // positions of a tile
constexpr int kThreads = 128;

struct Args {
  const int4* tiles;  // first row, rows, position, row of table
  const int32_t* table;
  int max_pages, heads, kv_heads, head_dim, window;
  float scale;  // log2(e) / sqrt(head_dim)
};

// D: head_dim rounded up to 64 or 128; columns past head_dim are zeros
template <class T, int D>
__global__ void __launch_bounds__(kThreads) attend_tile(T* __restrict__ out, const T* __restrict__ qkv, const T* __restrict__ keys,
                                                        const T* __restrict__ values, const Args a) {
  constexpr int kStride = D + 8;  // elements; 16 bytes of padding spread ldmatrix rows over the banks
  extern __shared__ __align__(128) uint8_t smem[];
  T* const qs = reinterpret_cast<T*>(smem);
  T* const ks = qs + kTileRows * kStride;
  T* const vs = ks + kKeys * kStride;
  launch_dependents();
  grid_wait();
  const int4 tile = a.tiles[blockIdx.x];
  const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), d = a.head_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t row_size = int64_t(a.heads + 2 * a.kv_heads) * d;
  const int last = tile.z + tile.y - 1, first = a.window > 0 ? max(0, tile.z - a.window + 1) : 0;
  const int32_t* table = a.table + int64_t(tile.w) * a.max_pages;

  for (int i = threadIdx.x; i < kTileRows * (D / 8); i += kThreads) {
    const int r = i / (D / 8), c = i % (D / 8) * 8;
    const bool inside = r < tile.y && c < d;
    copy16(qs + r * kStride + c, qkv + (inside ? (tile.x + r) * row_size + head * d + c : 0), inside ? 16 : 0);
  }
  auto fetch = [&](T* to, const T* from, int key0) {
#pragma unroll
    for (int i = threadIdx.x; i < kKeys * (D / 8); i += kThreads) {
      const int r = i / (D / 8), c = i % (D / 8) * 8, token = key0 + r;
      const bool inside = token >= first && token <= last && c < d;
      const int64_t page = inside ? table[token / kPageTokens] : 0;
      copy16(to + r * kStride + c, from + (inside ? ((page * a.kv_heads + kv_head) * kPageTokens + token % kPageTokens) * d + c : 0), inside ? 16 : 0);
    }
    copy_commit();
  };
  const int key_begin = first / kKeys * kKeys;
  fetch(ks, keys, key_begin);  // one group with Q

  uint32_t q[D / 16][4];
  float acc[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
  const int position[2] = {tile.z + warp * 16 + g, tile.z + warp * 16 + g + 8};
  for (int key0 = key_begin; key0 <= last; key0 += kKeys) {
    fetch(vs, values, key0);
    copy_wait<1>();
    __syncthreads();
    if (key0 == key_begin)
#pragma unroll
      for (int i = 0; i < D / 16; ++i) ldmatrix4(q[i], qs + (warp * 16 + lane % 16) * kStride + i * 16 + lane / 16 * 8);
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        ldmatrix4(b, ks + (j * 16 + lane / 16 * 8 + lane % 8) * kStride + i * 16 + lane / 8 % 2 * 8);
        mma16816<T>(s[2 * j], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
        mma16816<T>(s[2 * j + 1], q[i][0], q[i][1], q[i][2], q[i][3], b[2], b[3]);
      }
    __syncthreads();
    if (key0 + kKeys <= last)
      fetch(ks, keys, key0 + kKeys);
    else
      copy_commit();

    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = key0 + j * 8 + 2 * t + e % 2, p = position[e / 2];
        s[j][e] = token <= p && (a.window == 0 || token > p - a.window) ? s[j][e] * a.scale : -INFINITY;
        top[e / 2] = fmaxf(top[e / 2], s[j][e]);
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(most[h], fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2)));
      const float scale = most[h] == top[h] ? 1.f : exp2f(most[h] - top[h]);
      most[h] = top[h];
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& v = s[j][2 * h + e];
          v = v == -INFINITY ? 0.f : exp2f(v - top[h]);
          sum += v;
        }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      total[h] = total[h] * scale + sum;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) acc[j][2 * h] *= scale, acc[j][2 * h + 1] *= scale;
    }

    copy_wait<1>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const uint32_t p0 = pack2<T>(s[2 * j][0], s[2 * j][1]), p1 = pack2<T>(s[2 * j][2], s[2 * j][3]);
      const uint32_t p2 = pack2<T>(s[2 * j + 1][0], s[2 * j + 1][1]), p3 = pack2<T>(s[2 * j + 1][2], s[2 * j + 1][3]);
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        uint32_t b[4];
        ldmatrix4_trans(b, vs + (j * 16 + lane % 16) * kStride + i * 16 + lane / 16 * 8);
        mma16816<T>(acc[2 * i], p0, p1, p2, p3, b[0], b[1]);
        mma16816<T>(acc[2 * i + 1], p0, p1, p2, p3, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  copy_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = warp * 16 + g + 8 * h;
    if (r >= tile.y) continue;
    const float inverse = 1.f / total[h];
    T* to = out + (int64_t(tile.x + r) * a.heads + head) * d;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      if (j * 8 < d) *reinterpret_cast<uint32_t*>(to + j * 8 + 2 * t) = pack2<T>(acc[j][2 * h] * inverse, acc[j][2 * h + 1] * inverse);
  }
}

template <class T>
void run(const Stream& s, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int tiles, const AttentionShape& a) {
  Args args{m.tiles, m.table, m.max_pages, a.heads, a.kv_heads, a.head_dim, a.window, 1.44269504088896341f / sqrtf(float(a.head_dim))};
  const int width = a.head_dim <= 64 ? 64 : 128;
  launch(s, width == 64 ? attend_tile<T, 64> : attend_tile<T, 128>, dim3(tiles, a.heads), kThreads,
         size_t(kTileRows + 2 * kKeys) * (width + 8) * sizeof(T), static_cast<T*>(out), static_cast<const T*>(qkv),
         static_cast<const T*>(kv.k), static_cast<const T*>(kv.v), args);
}

}  // namespace

void attention_tiles(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int tiles, const AttentionShape& a) {
  act == DType::f16 ? run<__half>(s, out, qkv, kv, m, tiles, a) : run<__nv_bfloat16>(s, out, qkv, kv, m, tiles, a);
}

}  // namespace codefuse::cuda
