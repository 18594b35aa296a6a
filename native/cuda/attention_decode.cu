// Attention of single rows over their pages. Positions are taken in splits of 128 tokens aligned at 0, a split by one block in 8
// warps of 16 tokens; softmax sums of the warps, then of the splits, are combined in order. So a row's result depends on its
// position alone, not on how many blocks share its splits. Any head_dim up to 256 that is a multiple of 8.
#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kWarps = 8, kWarpTokens = kSplitTokens / kWarps;

struct Args {
  const int32_t *slot, *position, *sequence, *table;
  int max_pages, row0, heads, kv_heads, head_dim, window;
  float scale;
  float* partial;    // [rows, heads, splits, head_dim + 2]: sum of p v, greatest score, sum of p
  int32_t* arrived;  // [rows, kv_heads]
  int splits;
};

// 8 elements, 16 bytes at a time
template <class T> struct Eight { uint4 raw[sizeof(T) / 2]; };
template <class T>
__device__ __forceinline__ Eight<T> load8(const T* p) {
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) v.raw[i] = reinterpret_cast<const uint4*>(p)[i];
  return v;
}
__device__ __forceinline__ void unpack(const Eight<float>& v, float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    f[4 * i] = __uint_as_float(v.raw[i].x), f[4 * i + 1] = __uint_as_float(v.raw[i].y);
    f[4 * i + 2] = __uint_as_float(v.raw[i].z), f[4 * i + 3] = __uint_as_float(v.raw[i].w);
  }
}
__device__ __forceinline__ float2 two(uint32_t u, __half) { return __half22float2(*reinterpret_cast<__half2*>(&u)); }
__device__ __forceinline__ float2 two(uint32_t u, __nv_bfloat16) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&u)); }
template <class T>
__device__ __forceinline__ void unpack(const Eight<T>& v, float (&f)[8]) {
  const uint32_t u[4] = {v.raw[0].x, v.raw[0].y, v.raw[0].z, v.raw[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 p = two(u[i], T());
    f[2 * i] = p.x, f[2 * i + 1] = p.y;
  }
}

// LANES lanes hold one token's head; a warp looks at 32 / LANES tokens at a time. grid: (blocks sharing splits, kv_heads, rows)
template <class T, int LANES>
__global__ void __launch_bounds__(kWarps * 32) attend_rows(T* __restrict__ out, const T* __restrict__ qkv, const T* __restrict__ keys,
                                                            const T* __restrict__ values, const Args a) {
  constexpr int kRound = 32 / LANES, kRounds = kWarpTokens / kRound;       // tokens at a time
  constexpr int kBatch = kRounds < 8 ? kRounds : (sizeof(T) == 2 ? 8 : 4);  // rounds whose loads are in flight together
  __shared__ float sums[kWarps][256], tops[kWarps], weights[kWarps];
  __shared__ int is_last;
  launch_dependents();
  grid_wait();
  const int row = a.row0 + blockIdx.z, kv_head = blockIdx.y, d = a.head_dim, group = a.heads / a.kv_heads;
  if (a.slot[row] < 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = lane % LANES * 8;
  const int last = a.position[row], first = a.window > 0 ? max(0, last - a.window + 1) : 0;
  const int first_split = first / kSplitTokens, splits = last / kSplitTokens - first_split + 1;
  if (int(blockIdx.x) >= splits) return;
  const int32_t* table = a.table + int64_t(a.sequence[row]) * a.max_pages;
  const bool active = at < d;
  qkv += int64_t(row) * (a.heads + 2 * a.kv_heads) * d + kv_head * group * d;
  out += (int64_t(row) * a.heads + kv_head * group) * d;
  float* partial = a.partial + (int64_t(blockIdx.z) * a.heads + kv_head * group) * a.splits * (d + 2);

  for (int split = blockIdx.x; split < splits; split += gridDim.x) {
    const int token0 = (first_split + split) * kSplitTokens + warp * kWarpTokens + lane / LANES;
    auto load = [&](const T* base, int round) {
      const int token = token0 + round * kRound;
      Eight<T> v = {};
      if (active && token >= first && token <= last) {
        const int64_t page = table[token / kPageTokens];
        v = load8(base + ((page * a.kv_heads + kv_head) * kPageTokens + token % kPageTokens) * d + at);
      }
      return v;
    };
    for (int h = 0; h < group; ++h) {
      float q[8] = {}, score[kRounds], top = -INFINITY;
      if (active) unpack(load8(qkv + h * d + at), q);
#pragma unroll
      for (int r0 = 0; r0 < kRounds; r0 += kBatch) {
        Eight<T> k[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) k[r] = load(keys, r0 + r);
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          float f[8], z = 0.f;
          unpack(k[r], f);
#pragma unroll
          for (int i = 0; i < 8; ++i) z = fmaf(q[i], f[i], z);
#pragma unroll
          for (int o = LANES / 2; o > 0; o /= 2) z += __shfl_xor_sync(~0u, z, o);
          const int token = token0 + (r0 + r) * kRound;
          score[r0 + r] = token >= first && token <= last ? z * a.scale : -INFINITY;
          top = fmaxf(top, score[r0 + r]);
        }
      }
#pragma unroll
      for (int o = 16; o >= LANES; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
      float acc[8] = {}, weight = 0.f;
#pragma unroll
      for (int r0 = 0; r0 < kRounds; r0 += kBatch) {
        Eight<T> v[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) v[r] = load(values, r0 + r);
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          const float p = score[r0 + r] == -INFINITY ? 0.f : __expf(score[r0 + r] - top);
          float f[8];
          unpack(v[r], f);
          weight += p;
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[i] = fmaf(p, f[i], acc[i]);
        }
      }
#pragma unroll
      for (int o = 16; o >= LANES; o /= 2) {
        weight += __shfl_xor_sync(~0u, weight, o);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] += __shfl_xor_sync(~0u, acc[i], o);
      }
      if (lane < LANES && active)
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[warp][at + i] = acc[i];
      if (lane == 0) tops[warp] = top, weights[warp] = weight;
      __syncthreads();
      if (int(threadIdx.x) < d) {
        float most = tops[0];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) most = fmaxf(most, tops[w]);
        float z = 0.f, total = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float scale = __expf(tops[w] - most);  // 0 for a warp without tokens
          z = fmaf(scale, sums[w][threadIdx.x], z);
          total = fmaf(scale, weights[w], total);
        }
        if (splits == 1) {
          out[h * d + threadIdx.x] = from_float<T>(z / total);
        } else {
          float* p = partial + (int64_t(h) * a.splits + split) * (d + 2);
          __stcg(p + threadIdx.x, z);
          if (threadIdx.x == 0) __stcg(p + d, most), __stcg(p + d + 1, total);
        }
      }
      __syncthreads();
    }
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* arrived = a.arrived + blockIdx.z * a.kv_heads + kv_head;
    is_last = atomicAdd(arrived, 1) == min(int(gridDim.x), splits) - 1;
    if (is_last) *arrived = 0;
  }
  __syncthreads();
  if (!is_last || int(threadIdx.x) >= d) return;
  __threadfence();
  for (int h = 0; h < group; ++h) {
    const float* p = partial + int64_t(h) * a.splits * (d + 2);
    float most = -INFINITY, z = 0.f, total = 0.f;
#pragma unroll 8
    for (int i = 0; i < splits; ++i) most = fmaxf(most, __ldcg(p + int64_t(i) * (d + 2) + d));
#pragma unroll 8
    for (int i = 0; i < splits; ++i) {
      const float scale = __expf(__ldcg(p + int64_t(i) * (d + 2) + d) - most);
      z = fmaf(scale, __ldcg(p + int64_t(i) * (d + 2) + threadIdx.x), z);
      total = fmaf(scale, __ldcg(p + int64_t(i) * (d + 2) + d + 1), total);
    }
    out[h * d + threadIdx.x] = from_float<T>(z / total);
  }
}

template <class T>
void run(const Stream& s, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int row, int rows, const AttentionShape& a, const AttentionScratch& scratch) {
  Args args{m.slot, m.position, m.sequence, m.table, m.max_pages, row, a.heads, a.kv_heads, a.head_dim, a.window, 1.f / sqrtf(float(a.head_dim)),
            scratch.partial, scratch.arrived, scratch.splits};
  auto kernel = a.head_dim <= 64 ? attend_rows<T, 8> : a.head_dim <= 128 ? attend_rows<T, 16> : attend_rows<T, 32>;
  for (; args.row0 < row + rows; args.row0 += scratch.rows) {
    const int count = std::min(scratch.rows, row + rows - args.row0);
    // about four blocks per multiprocessor; a block without a split ends at once
    const int share = std::max(1, std::min(scratch.splits, 4 * s.sms / (a.kv_heads * count)));
    launch(s, kernel, dim3(share, a.kv_heads, count), kWarps * 32, 0, static_cast<T*>(out), static_cast<const T*>(qkv),
           static_cast<const T*>(kv.k), static_cast<const T*>(kv.v), args);
  }
}

}  // namespace

void attention_rows(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int row, int T,
                    const AttentionShape& a, const AttentionScratch& scratch) {
  if (act == DType::f32) return run<float>(s, out, qkv, kv, m, row, T, a, scratch);
  act == DType::f16 ? run<__half>(s, out, qkv, kv, m, row, T, a, scratch) : run<__nv_bfloat16>(s, out, qkv, kv, m, row, T, a, scratch);
}

}  // namespace codefuse::cuda
