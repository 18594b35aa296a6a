// Attention of prefill rows on Hopper's warpgroup matrix instructions. A block takes up to 128 rows of one sequence and one head: a producer
// warp brings tiles of 128 positions, aligned at 0, into rings in shared memory; two consumer warpgroups have 64 rows each. A warpgroup
// has the tensor cores multiply Q by the next tile's K and its weights by the last tile's V, and makes the next weights meanwhile; the
// two take turns at it. A tile that a row may not see changes nothing in that row, so its result does not depend on which rows share the
// block: a prompt in chunks equals the prompt whole, bit for bit.
#include "cuda/kernels.h"
#include "cuda/rotate.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

namespace codefuse::cuda {

namespace {

constexpr int kKeys = 128;     // positions of a tile
constexpr int kThreads = 384;  // a warpgroup with the producer, two of consumers
constexpr int kRows = 64;      // of a consumer warpgroup
constexpr int kStages = 2;     // tiles of K, and as many of V
[[maybe_unused]] constexpr int kPages = kKeys / kPageTokens;
static_assert(kTileRows == 2 * kRows && kTileRows == kKeys, "two warpgroups; Q is as large as a tile of K");
static_assert(kKeys % kPageTokens == 0, "a tile is whole pages");

// Bytes of a tile of K or V [D / 64][kKeys][64 columns], or of Q [2][D / 64][kRows][64 columns].
constexpr int tile_size(int head_dim) { return kKeys * head_dim * 2; }
constexpr int shared_for(int head_dim) { return 1024 + (1 + 2 * kStages) * tile_size(head_dim); }

struct Args {
  const int4* tiles;  // first row, rows, position, row of table
  const int32_t* table;
  int count;     // tiles
  int together;  // heads whose blocks come before those of the next ones, so that their K and V stay in L2
  int max_pages, heads, kv_heads, window;
  float scale;  // log2(e) / sqrt(head_dim)
  const float2* angles;  // [.][pairs] by position, to rotate Q with; nullptr: it is
  int pairs;             // a multiple of 8
};

#ifdef CODEFUSE_WGMMA

struct Barriers {
  uint64_t q, edge, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

__device__ __forceinline__ float exp2_of(float x) {  // what would be denormal is 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ void named_wait(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int barrier, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
__device__ __forceinline__ void store_matrices(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// What the producer warp knows of its block: positions [first, last] are those that some row may see.
struct Source {
  const int32_t* table;
  int first, last, kv_heads, kv_head;

  // of the lane's page (lane % kPages) of the tile at key0
  __device__ __forceinline__ int page(int key0) const {
    const int token = key0 + threadIdx.x % kPages * kPageTokens;
    return token <= last ? table[token / kPageTokens] : 0;
  }
  // those positions of the tile
  __device__ __forceinline__ int begin(int key0) const { return max(first - key0, 0); }
  __device__ __forceinline__ int end(int key0) const { return min(last + 1 - key0, kKeys); }

  // The pages of the tile that have any, as `page` has them.
  template <int D>
  __device__ __forceinline__ void copy(uint8_t* to, const CUtensorMap* map, int key0, int page, uint64_t* full) const {
    int row[kPages];
#pragma unroll
    for (int p = 0; p < kPages; ++p) row[p] = (__shfl_sync(~0u, page, p) * kv_heads + kv_head) * kPageTokens;
    if (threadIdx.x == 0) {
      const int from = begin(key0) / kPageTokens, past = (end(key0) + kPageTokens - 1) / kPageTokens;
      barrier_expect(full, (past - from) * (kPageTokens * D * 2));
#pragma unroll
      for (int p = 0; p < kPages; ++p)
        if (p >= from && p < past)
#pragma unroll
          for (int h = 0; h < D / 64; ++h) tensor_copy(to + (h * kKeys + p * kPageTokens) * 128, map, h * 64, row[p], full);
    }
    __syncwarp();
  }
  // The same, and zeros for the tile's other positions. edge: a barrier in between, at its parity.
  template <int D>
  __device__ __forceinline__ void copy_cleared(uint8_t* to, const CUtensorMap* map, int key0, int page, uint64_t* full, uint64_t* edge, int parity) const {
    const auto clear = [&](int from, int past) {
      for (int u = threadIdx.x; u < (past - from) * 8; u += 32)
#pragma unroll
        for (int h = 0; h < D / 64; ++h) *reinterpret_cast<uint4*>(to + (h * kKeys + from) * 128 + u * 16) = make_uint4(0, 0, 0, 0);
    };
    const int from = begin(key0), past = end(key0), from_page = from / kPageTokens * kPageTokens, past_page = (past + kPageTokens - 1) / kPageTokens * kPageTokens;
    copy<D>(to, map, key0, page, edge);
    clear(0, from_page);
    clear(past_page, kKeys);
    barrier_wait(edge, parity);
    clear(from_page, from);
    clear(past, past_page);
    proxy_fence();
    __syncwarp();
    if (threadIdx.x == 0) barrier_arrive(full);
  }
};

#endif

// D: head_dim. grid (heads * tiles)
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) attend(T* __restrict__ out, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                                      const __grid_constant__ CUtensorMap v_map, const Args a) {
#ifdef CODEFUSE_WGMMA
  extern __shared__ uint8_t shared[];
  __shared__ Barriers barriers;
  uint8_t* const qs = shared + (1024 - shared_address(shared) % 1024) % 1024;
  uint8_t* const ks = qs + tile_size(D);            // [kStages]
  uint8_t* const vs = ks + kStages * tile_size(D);  // [kStages]
  launch_dependents();
  // heads in runs of `together`; in a run the last tiles, which have the most to do, come first
  const int run = int(blockIdx.x) / (a.together * a.count), place = int(blockIdx.x) - run * a.together * a.count;
  const int run_heads = min(a.together, a.heads - run * a.together);
  const int head = run * a.together + place % run_heads;
  const int4 tile = a.tiles[a.count - 1 - place / run_heads];
  const int last = tile.z + tile.y - 1, first = a.window > 0 ? max(0, tile.z - a.window + 1) : 0;
  const int key_begin = first / kKeys * kKeys, n = last / kKeys + 1 - first / kKeys;  // tiles of positions
  if (threadIdx.x == 0) {
    barrier_init(&barriers.q, 1);
    barrier_init(&barriers.edge, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&barriers.k_full[i], 1);
      barrier_init(&barriers.v_full[i], 1);
      barrier_init(&barriers.k_empty[i], 8);
      barrier_init(&barriers.v_empty[i], 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map);
    const Source source{a.table + int64_t(tile.w) * a.max_pages, first, last, a.kv_heads, head / (a.heads / a.kv_heads)};
    int page = source.page(key_begin), edges = 0;
    grid_wait();
    if (threadIdx.x >= 32) return;
    if (threadIdx.x == 0) {
      barrier_expect(&barriers.q, tile_size(D));
#pragma unroll
      for (int i = 0; i < 2 * (D / 64); ++i)
        tensor_copy(qs + i * (kRows * 128), &q_map, head * D + i % (D / 64) * 64, tile.x + i / (D / 64) * kRows, &barriers.q);
    }
    source.copy<D>(ks, &k_map, key_begin, page, &barriers.k_full[0]);
    for (int i = 0; i < n; ++i) {
      const int key0 = key_begin + i * kKeys, stage = i % kStages, next_stage = (i + 1) % kStages;
      const int next_page = i + 1 < n ? source.page(key0 + kKeys) : 0;
      if (i + 1 < n) {
        barrier_wait(&barriers.k_empty[next_stage], (i + 1) / kStages % 2 ^ 1);
        source.copy<D>(ks + next_stage * tile_size(D), &k_map, key0 + kKeys, next_page, &barriers.k_full[next_stage]);
      }
      barrier_wait(&barriers.v_empty[stage], i / kStages % 2 ^ 1);
      uint8_t* const to = vs + stage * tile_size(D);
      if (source.begin(key0) == 0 && source.end(key0) == kKeys)
        source.copy<D>(to, &v_map, key0, page, &barriers.v_full[stage]);
      else  // a weight of 0 does not make harmless what else is there
        source.copy_cleared<D>(to, &v_map, key0, page, &barriers.v_full[stage], &barriers.edge, edges++ % 2);
      page = next_page;
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = warpgroup - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint64_t q = wgmma_rows(shared_address(qs) + group * (kRows * D * 2)), k = wgmma_rows(shared_address(ks));
    const uint64_t v = wgmma_columns(shared_address(vs), kKeys * 128);
    const int group_row = tile.z + group * kRows, row = group_row + warp * 16 + g;  // positions
    float o[D / 2], s[kKeys / 2], most[2] = {-INFINITY, -INFINITY}, total[2] = {}, scale[2];
    uint32_t p[kKeys / 16][4];

    const auto multiply_keys = [&](uint32_t i) {  // s = Q K^T of tile i
      const uint64_t b = k + uint32_t(i % kStages * (tile_size(D) >> 4));
      wgmma_fence();
      wgmma<T, false>(s, q, b);
#pragma unroll
      for (int c = 1; c < D / 16; ++c)  // 16 columns
        wgmma<T, true>(s, q + uint32_t(c / 4 * (kRows * 128 >> 4) + c % 4 * 2), b + uint32_t(c / 4 * (kKeys * 128 >> 4) + c % 4 * 2));
      wgmma_commit();
    };
    const auto multiply_values = [&](uint32_t i) {  // o += P V of tile i
      const uint64_t b = v + uint32_t(i % kStages * (tile_size(D) >> 4));
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < kKeys / 16; ++c) wgmma<T, true>(o, p[c], b + uint32_t(c * (16 * 128 >> 4)));
      wgmma_commit();
    };
    const auto release = [&](uint64_t* empty) {
      if (lane == 0) barrier_arrive(empty);
    };
    const auto weigh = [&](int i) {  // s of tile i becomes weights
      const int key0 = key_begin + i * kKeys;
      if (key0 + kKeys - 1 > group_row || (a.window > 0 && key0 <= group_row + kRows - 1 - a.window))
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int past = row + 8 * h - key0 - 2 * t, before = a.window > 0 ? past - a.window : -kKeys;  // positions seen: (before, past]
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (j * 8 + e > past || j * 8 + e <= before) s[4 * j + 2 * h + e] = -INFINITY;
        }
      float base[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
        for (int j = 1; j < kKeys / 8; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        top = fmaxf(most[h], top * a.scale);
        base[h] = top == -INFINITY ? 0.f : top;  // a row that has seen nothing yet
        scale[h] = exp2_of(most[h] - base[h]);
        most[h] = top;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          float &x = s[4 * j + 2 * h], &y = s[4 * j + 2 * h + 1];
          x = exp2_of(fmaf(x, a.scale, -base[h]));
          y = exp2_of(fmaf(y, a.scale, -base[h]));
          sum += x + y;
        }
        total[h] = fmaf(total[h], scale[h], sum);  // this lane's columns
      }
    };
    const auto round = [&] {
#pragma unroll
      for (int c = 0; c < kKeys / 16; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[c][e] = pack2<T>(s[8 * c + 2 * e], s[8 * c + 2 * e + 1]);
    };

    TileRotation<T, D, kRows> rotation;
    if (a.angles) rotation.read(a.angles, a.pairs, tile.z + group * kRows, last);
    grid_wait();
    if (group == 1 && n > 1) named_arrive(1, 256);  // the first turn is group 0's
    barrier_wait(&barriers.q, 0);
    if (a.angles) {
      rotation.rotate(qs + group * (kRows * D * 2), a.pairs);
      proxy_fence();
      named_wait(3 + group, 128);
    }
    barrier_wait(&barriers.k_full[0], 0);
    multiply_keys(0);
#pragma unroll
    for (int e = 0; e < D / 2; ++e) o[e] = 0.f;
    wgmma_wait<0>();
    wgmma_hold(s);
    release(&barriers.k_empty[0]);
    weigh(0);
    round();
    if (n > 1) barrier_wait(&barriers.k_full[1], 0);
    for (int i = 1; i < n; ++i) {
      named_wait(1 + group, 256);
      wgmma_hold(o);
      multiply_keys(i);
      barrier_wait(&barriers.v_full[(i - 1) % kStages], (i - 1) / kStages % 2);
      multiply_values(i - 1);
      if (group == 0 || i + 1 < n) named_arrive(2 - group, 256);
      wgmma_wait<1>();
      wgmma_hold(s);
      release(&barriers.k_empty[i % kStages]);
      weigh(i);
      wgmma_hold(s);  // with the branch that follows: weights are made before, not after, the wait for the other product
      if (i + 1 < n) barrier_wait(&barriers.k_full[(i + 1) % kStages], (i + 1) / kStages % 2);
      wgmma_wait<0>();
      wgmma_hold(o);
      release(&barriers.v_empty[(i - 1) % kStages]);
      round();
      if (__any_sync(~0u, scale[0] != 1.f || scale[1] != 1.f))
#pragma unroll
        for (int e = 0; e < D / 2; ++e) o[e] *= scale[e / 2 % 2];
    }
    barrier_wait(&barriers.v_full[(n - 1) % kStages], (n - 1) / kStages % 2);
    wgmma_hold(o);
    multiply_values(n - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += __shfl_xor_sync(~0u, total[h], 1);
      total[h] += __shfl_xor_sync(~0u, total[h], 2);
    }
    const float inverse[2] = {1.f / total[0], 1.f / total[1]};
    wgmma_wait<0>();
    wgmma_hold(o);
    named_wait(3 + group, 128);  // all of the warpgroup's products with Q are done: outputs go through its place, in the same swizzle
    const uint32_t mine = shared_address(qs) + group * (kRows * D * 2) + warp * (16 * 128);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {  // 16 columns
      const int r = lane % 16, unit = c % 4 * 2 + lane / 16;
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = pack2<T>(o[8 * c + 2 * e] * inverse[e % 2], o[8 * c + 2 * e + 1] * inverse[e % 2]);
      store_matrices(mine + c / 4 * (kRows * 128) + r * 128 + (unit ^ r % 8) * 16, w[0], w[1], w[2], w[3]);
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {  // a row's 16 bytes
      const int u = c * 32 + lane, r = u / (D / 8), unit = u % (D / 8);
      if (group * kRows + warp * 16 + r >= tile.y) continue;
      const uint8_t* from = qs + group * (kRows * D * 2) + warp * (16 * 128) + unit / 8 * (kRows * 128) + r * 128 + (unit % 8 ^ r % 8) * 16;
      *reinterpret_cast<uint4*>(out + (int64_t(tile.x + group * kRows + warp * 16 + r) * a.heads + head) * D + unit * 8) = *reinterpret_cast<const uint4*>(from);
    }
  }
#endif
}

constexpr int64_t kResident = 32 << 20;  // bytes of K and V that stay in L2 while the blocks of their heads run: at 8192 rows x 40 heads 6 % faster

template <class T, int D>
void run(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, const PrefillRows& r, const AttentionShape& a) {
  const int each = a.heads / a.kv_heads, pool_rows = r.pages * a.kv_heads * kPageTokens;
  const int64_t kv_heads = std::clamp<int64_t>(kResident / (r.keys * 4 * D), 1, a.kv_heads);
  const Args args{m.tiles, m.table, r.tiles, int(kv_heads) * each, m.max_pages, a.heads, a.kv_heads, a.window, 1.44269504088896341f / sqrtf(float(D)), r.angles, a.rope_dim / 2};
  launch(s, attend<T, D>, dim3(a.heads * r.tiles), kThreads, shared_for(D), static_cast<T*>(out), rows_map(act, qkv, r.rows, (a.heads + 2 * a.kv_heads) * D, kRows),
         rows_map(act, kv.k, pool_rows, D, kPageTokens), rows_map(act, kv.v, pool_rows, D, kPageTokens), args);
}

template <class T>
void choose(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, const PrefillRows& r, const AttentionShape& a) {
  a.head_dim == 64 ? run<T, 64>(s, act, out, qkv, kv, m, r, a) : run<T, 128>(s, act, out, qkv, kv, m, r, a);
}

}  // namespace

void attention_tiles_wgmma(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, const PrefillRows& r, const AttentionShape& a) {
  act == DType::f16 ? choose<__half>(s, act, out, qkv, kv, m, r, a) : choose<__nv_bfloat16>(s, act, out, qkv, kv, m, r, a);
}

}  // namespace codefuse::cuda
