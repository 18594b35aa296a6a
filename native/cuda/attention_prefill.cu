// Attention of prefill rows on the tensor cores, where attention_prefill_wgmma.cu has no kernel for them. A block takes up to 128 rows of one
// sequence and one head, 32 rows a warp, and walks the positions in tiles of 64 aligned at 0. A tile that a row may not see changes nothing
// in that row, so its result does not depend on which rows share the block: a prompt in chunks equals the prompt whole, bit for bit.
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kKeys = 64;     // positions of a tile
constexpr int kThreads = 128;
constexpr int kWarpRows = 32;
static_assert(kTileRows == kThreads / 32 * kWarpRows && kKeys == 2 * kPageTokens, "a tile is two pages");

struct Args {
  const int4* tiles;  // first row, rows, position, row of table
  const int32_t* table;
  int max_pages, heads, kv_heads, head_dim, window;
  float scale;  // log2(e) / sqrt(head_dim)
};

// D: head_dim, if WHOLE, else it rounded up to 64 or 128: columns past head_dim are zeros. grid (heads, tiles): the last tiles, which have the most
// to do, come first
template <class T, int D, bool WHOLE>
__global__ void __launch_bounds__(kThreads, 2) attend_tile(T* __restrict__ out, const T* __restrict__ qkv, const T* __restrict__ keys,
                                                           const T* __restrict__ values, const Args a) {
  constexpr int kStride = D + 8;        // elements; 16 bytes of padding spread ldmatrix rows over the banks
  constexpr int kAcross = D / 8;        // copies of a row
  constexpr int kDown = kThreads / kAcross;
  extern __shared__ __align__(128) uint8_t smem[];
  T* const qs = reinterpret_cast<T*>(smem);
  T* const ks = qs + kTileRows * kStride;
  T* const vs = ks + kKeys * kStride;
  launch_dependents();
  const int4 tile = a.tiles[gridDim.y - 1 - blockIdx.y];
  const int head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads), d = WHOLE ? D : a.head_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t row_size = int64_t(a.heads + 2 * a.kv_heads) * d;
  const int last = tile.z + tile.y - 1, first = a.window > 0 ? max(0, tile.z - a.window + 1) : 0;
  const int32_t* table = a.table + int64_t(tile.w) * a.max_pages;
  const int across = threadIdx.x % kAcross * 8, down = threadIdx.x / kAcross;  // of this thread's copies
  const auto fetch = [&](T* to, const T* from, int key0) {
    to += down * kStride + across;
    from += (int64_t(kv_head) * kPageTokens + down) * d + across;
#pragma unroll(WHOLE ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      const int first_token = key0 + half * kPageTokens;
      const T* page = from + int64_t(first_token <= last ? table[first_token / kPageTokens] : 0) * a.kv_heads * kPageTokens * d;
#pragma unroll
      for (int r = 0; r < kPageTokens; r += kDown) {
        const int token = first_token + r + down;
        copy16(to + (half * kPageTokens + r) * kStride, page + r * d, token >= first && token <= last && (WHOLE || across < d) ? 16 : 0);
      }
    }
    copy_commit();
  };
  const int key_begin = first / kKeys * kKeys;
  grid_wait();
#pragma unroll
  for (int r = down; r < kTileRows; r += kDown) {
    const bool inside = r < tile.y && across < d;
    copy16(qs + r * kStride + across, qkv + (inside ? (tile.x + r) * row_size + head * d + across : 0), inside ? 16 : 0);
  }
  fetch(ks, keys, key_begin);  // one group with Q

  float acc[2][D / 8][4] = {}, most[2][2], total[2][2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) most[i / 2][i % 2] = -INFINITY;
  const int row0 = tile.z + warp * kWarpRows, row1 = min(row0 + kWarpRows - 1, last);  // positions of the warp's rows
  for (int key0 = key_begin; key0 <= last; key0 += kKeys) {
    fetch(vs, values, key0);
    copy_wait<1>();
    __syncthreads();
    const bool live = key0 <= row1 && (a.window == 0 || key0 + kKeys - 1 > row0 - a.window);
    float s[2][kKeys / 8][4] = {};
    if (live)
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        uint32_t q[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) ldmatrix4(q[m], qs + (warp * kWarpRows + m * 16 + lane % 16) * kStride + i * 16 + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
          uint32_t b[4];
          ldmatrix4(b, ks + (j * 16 + lane / 16 * 8 + lane % 8) * kStride + i * 16 + lane / 8 % 2 * 8);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma16816<T>(s[m][2 * j], q[m][0], q[m][1], q[m][2], q[m][3], b[0], b[1]);
            mma16816<T>(s[m][2 * j + 1], q[m][0], q[m][1], q[m][2], q[m][3], b[2], b[3]);
          }
        }
      }
    uint32_t p[2][kKeys / 8][2];
    if (live) {
      if (key0 + kKeys - 1 > row0 || (a.window > 0 && key0 <= row1 - a.window))
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int token = key0 + j * 8 + 2 * t + e % 2, position = row0 + m * 16 + g + e / 2 * 8;
              if (token > position || (a.window > 0 && token <= position - a.window)) s[m][j][e] = -INFINITY;
            }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float scale[2], base[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float top = -INFINITY;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) top = fmaxf(top, fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          top = fmaxf(most[m][h], top * a.scale);
          base[h] = top == -INFINITY ? 0.f : top;  // a row that has seen nothing yet
          scale[h] = exp2f(most[m][h] - base[h]);
          most[m][h] = top;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float sum = 0.f;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) {
            const float x = exp2f(fmaf(s[m][j][2 * h], a.scale, -base[h])), y = exp2f(fmaf(s[m][j][2 * h + 1], a.scale, -base[h]));
            sum += x + y;
            p[m][j][h] = pack2<T>(x, y);
          }
          total[m][h] = fmaf(total[m][h], scale[h], sum);  // this lane's columns
        }
        if (__any_sync(~0u, scale[0] != 1.f || scale[1] != 1.f))
#pragma unroll
          for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][j][e] *= scale[e / 2];
      }
    }

    __syncthreads();
    if (key0 + kKeys <= last)
      fetch(ks, keys, key0 + kKeys);
    else
      copy_commit();
    copy_wait<1>();
    __syncthreads();
    if (live)
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j)
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t b[4];
          ldmatrix4_trans(b, vs + (j * 16 + lane % 16) * kStride + i * 16 + lane / 16 * 8);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma16816<T>(acc[m][2 * i], p[m][2 * j][0], p[m][2 * j][1], p[m][2 * j + 1][0], p[m][2 * j + 1][1], b[0], b[1]);
            mma16816<T>(acc[m][2 * i + 1], p[m][2 * j][0], p[m][2 * j][1], p[m][2 * j + 1][0], p[m][2 * j + 1][1], b[2], b[3]);
          }
        }
    __syncthreads();
  }
  copy_wait<0>();
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[m][h] += __shfl_xor_sync(~0u, total[m][h], 1);
      total[m][h] += __shfl_xor_sync(~0u, total[m][h], 2);
      const int r = warp * kWarpRows + m * 16 + g + 8 * h;
      if (r >= tile.y) continue;
      const float inverse = 1.f / total[m][h];
      T* to = out + (int64_t(tile.x + r) * a.heads + head) * d;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        if (j * 8 < d) *reinterpret_cast<uint32_t*>(to + j * 8 + 2 * t) = pack2<T>(acc[m][j][2 * h] * inverse, acc[m][j][2 * h + 1] * inverse);
    }
}

template <class T>
void run(const Stream& s, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int tiles, const AttentionShape& a) {
  Args args{m.tiles, m.table, m.max_pages, a.heads, a.kv_heads, a.head_dim, a.window, 1.44269504088896341f / sqrtf(float(a.head_dim))};
  const int width = a.head_dim <= 64 ? 64 : 128;
  const auto kernel = width == 64 ? (a.head_dim == 64 ? attend_tile<T, 64, true> : attend_tile<T, 64, false>)
                                  : (a.head_dim == 128 ? attend_tile<T, 128, true> : attend_tile<T, 128, false>);
  launch(s, kernel, dim3(a.heads, tiles), kThreads,
         size_t(kTileRows + 2 * kKeys) * (width + 8) * sizeof(T), static_cast<T*>(out), static_cast<const T*>(qkv),
         static_cast<const T*>(kv.k), static_cast<const T*>(kv.v), args);
}

bool on_wgmma(const Stream& s, const AttentionShape& a) { return s.wgmma && (a.head_dim == 64 || a.head_dim == 128); }

}  // namespace

bool attention_rotates(const Stream& s, DType act, const AttentionShape& a) {
  return on_wgmma(s, a) && act != DType::f32 && a.rope_dim > 0 && a.rope_dim % 16 == 0;
}

void attention_tiles(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, const PrefillRows& r, const AttentionShape& a) {
  if (on_wgmma(s, a)) return attention_tiles_wgmma(s, act, out, qkv, kv, m, r, a);
  act == DType::f16 ? run<__half>(s, out, qkv, kv, m, r.tiles, a) : run<__nv_bfloat16>(s, out, qkv, kv, m, r.tiles, a);
}

}  // namespace codefuse::cuda
