// Linear layers of prefill rows on Hopper's warpgroup matrix instructions, from the same tiles as decode: the weights are the A operand,
// from registers (a lane's 16 bytes of a tile are its A fragment), x the B operand, K-major in shared memory with the 128-byte swizzle.
//
// A block makes kRows outputs of TOKENS rows of x: one producer warp keeps a ring of (weights, x) chunks full by bulk copies, two
// consumer warpgroups take 64 outputs each. With CLUSTER = 2 the blocks of a cluster take the two halves of a row group for the same
// rows of x, and each fetches half of x for both. The grid is persistent. Tiles that do not divide evenly are relayed: a block runs the
// first chunks of a tile, and leaves its sums for the next block, which goes on from them.
//
// Every output is one sum in chunks of 16 columns in order: the relay hands on the float32 accumulators as they are, and the
// width of an instruction (TOKENS) does not change what one of its columns is. So a row's result depends neither on the number of rows
// nor on the tile shape.

#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/tensor_map.h"
#include "cuda/weights.cuh"

namespace codefuse::cuda {

namespace {

constexpr int kRows = 128;                 // outputs of a block: half a row group
constexpr int kThreads = 384;              // a warpgroup with the producer, two of consumers
constexpr int kMaxStages = 8;
[[maybe_unused]] constexpr int kStageOutBytes = 9216;      // outputs of one warpgroup on their way: 64 rows of 64 (16 bit) or 32 of 64 (float)
[[maybe_unused]] constexpr int kOutStride = 144, kFloatStride = 272;  // bytes between their rows

CODEFUSE_HD constexpr int x_bytes(int tokens) { return tokens * kChunkCols * 2; }
// Weights of a stage: 64 columns of half a row group, with 4 bits' scales and zeros.
template <class W>
CODEFUSE_HD constexpr int w_bytes() {
  return W::kScale == Scale::none ? kChunkBytes / 2 : W::kScale == Scale::row ? 8 * kTile8 : 8 * kTile4 + (W::kBytes - kCodes4) / 2;
}
template <class W>
CODEFUSE_HD constexpr int stage_bytes(int tokens) { return (w_bytes<W>() + 1023) / 1024 * 1024 + x_bytes(tokens); }
template <class W>
CODEFUSE_HD constexpr int stages_for(int tokens) {
  const int fit = (232448 - 1024 - 1024 - 2 * kStageOutBytes) / stage_bytes<W>(tokens);
  return fit < kMaxStages ? fit : kMaxStages;
}
template <class W>
CODEFUSE_HD constexpr int shared_for(int tokens) { return 1024 + stages_for<W>(tokens) * stage_bytes<W>(tokens) + 2 * kStageOutBytes; }

// What unit u of G (a block, or a cluster) works on: chunks [begin, end) of a tile, in this order. Tiles short of a full wave, and a
// wave of full ones with them, are cut into G equal parts; a part holds at least a tile's worth of chunks, so a tile has at most two
// pieces. The first piece of a tile (ends early) comes first in its unit and the second (begins late) last in the next unit: by
// the time the second begins, the first is done.
struct Item {
  int tile, begin, end;
};
struct Work {
  int unit, units, chunks, waves, first_full, full, head, tail, head_tile, tail_tile, count;
  CODEFUSE_HD Work(int unit, int units, int tiles, int chunks, bool relay) : unit(unit), units(units), chunks(chunks), first_full(0), full(0), head(0), tail(0), head_tile(0), tail_tile(0) {
    if (tiles <= units || tiles % units == 0 || !relay) {
      waves = (tiles - unit + units - 1) / units;
    } else {
      waves = tiles / units - 1;
      const int64_t shared = int64_t(units + tiles % units) * chunks;
      const int from = int(unit * shared / units), to = int((unit + 1) * shared / units), base = waves * units;
      head = to % chunks;
      head_tile = base + to / chunks;
      tail = from % chunks;
      tail_tile = base + from / chunks;
      first_full = base + (from + chunks - 1) / chunks;
      full = head_tile - first_full;
    }
    count = (head != 0) + waves + full + (tail != 0);
  }
  [[maybe_unused]] CODEFUSE_HD Item item(int i) const {
    if (head && i-- == 0) return {head_tile, 0, head};
    if (i < waves) return {i * units + unit, 0, chunks};
    i -= waves;
    if (i < full) return {first_full + i, 0, chunks};
    return {tail_tile, tail, chunks};
  }
};

// As cudaFuncGetAttributes shows it: static shared memory only where there is code for Hopper.
struct Barriers {
  uint64_t full[kMaxStages], empty[kMaxStages];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CODEFUSE_WGMMA 1

// 64 rows x 16 columns (each warp of the warpgroup its 16 rows) times 16 columns of TOKENS rows at descriptor b
#define CODEFUSE_F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CODEFUSE_F32(i) CODEFUSE_F8(i), CODEFUSE_F8(i + 8), CODEFUSE_F8(i + 16), CODEFUSE_F8(i + 24)
#define CODEFUSE_D32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define CODEFUSE_D64 CODEFUSE_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define CODEFUSE_D96 CODEFUSE_D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define CODEFUSE_D128 CODEFUSE_D96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define CODEFUSE_WGMMA_OP(n, type, accumulators, a, b) \
  "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" accumulators "}, {" a "}, " b ", p, 1, 1, 0;\n}"
#define CODEFUSE_WGMMA_FN(n, accumulators, a, b, ...)                                                                       \
  template <class T>                                                                                                        \
  __device__ __forceinline__ void wgmma(float (&d)[n / 2], const uint4& w, uint64_t x) {                                    \
    if constexpr (std::is_same<T, __half>::value)                                                                           \
      asm volatile(CODEFUSE_WGMMA_OP(n, f16, accumulators, a, b) : __VA_ARGS__ : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x));  \
    else                                                                                                                    \
      asm volatile(CODEFUSE_WGMMA_OP(n, bf16, accumulators, a, b) : __VA_ARGS__ : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x)); \
  }
CODEFUSE_WGMMA_FN(64, CODEFUSE_D32, "%32,%33,%34,%35", "%36", CODEFUSE_F32(0))
CODEFUSE_WGMMA_FN(128, CODEFUSE_D64, "%64,%65,%66,%67", "%68", CODEFUSE_F32(0), CODEFUSE_F32(32))
CODEFUSE_WGMMA_FN(256, CODEFUSE_D128, "%128,%129,%130,%131", "%132", CODEFUSE_F32(0), CODEFUSE_F32(32), CODEFUSE_F32(64), CODEFUSE_F32(96))
#undef CODEFUSE_F8
#undef CODEFUSE_F32

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {  // keeps the compiler from moving accumulators across
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// K-major, rows of 128 bytes, 8 rows to a 1024-byte block of the 128-byte swizzle
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void arrive_at(uint64_t* b, uint32_t block) {  // the same barrier in a block of the cluster
  asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [a];\n}" ::"r"(shared_address(b)), "r"(block) : "memory");
}
template <int CLUSTER>
__device__ __forceinline__ void tensor_copy(void* dst, const CUtensorMap* map, int column, int row, uint64_t* b) {
  if constexpr (CLUSTER == 1)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(dst)), "l"(map), "r"(column), "r"(row), "r"(shared_address(b)) : "memory");
  else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(dst)), "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "h"(uint16_t((1 << CLUSTER) - 1)) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void store_matrices_transposed(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(p)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Outputs [n0, n0 + 64) of rows [token0, ..) from one warpgroup's accumulators: d[4 j + q] of a lane is output g + 8 (q / 2) of its
// warp's 16, row 8 j + 2 t + q % 2. Through shared memory, so that 8 or 16 lanes write a row's outputs together.
template <class T, int TOKENS>
__device__ __forceinline__ void write_tile(float (&d)[TOKENS / 2], uint8_t* staging, int group, int token0, int tokens, int n0, int N, const Epilogue& e) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int na = n0 + warp * 16 + g, nb = na + 8;
  const float bias_a = e.bias && na < N ? e.bias[na] : 0.f, bias_b = e.bias && nb < N ? e.bias[nb] : 0.f;
  if (e.store == Store::act) {
    T* const y = static_cast<T*>(e.y);
    const bool whole = N % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
    auto write = [&](auto fn) {
      constexpr int FN = decltype(fn)::value;
#pragma unroll
      for (int p = 0; p < TOKENS / 64; ++p) {
        if (token0 + p * 64 >= tokens) break;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          uint32_t v[4];
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            const float* z = d + (p * 8 + j + h / 2) * 4 + h % 2 * 2;
            const float b = h % 2 ? bias_b : bias_a;
            v[h] = pack2<T>(activate(z[0] + b, FN), activate(z[1] + b, FN));
          }
          store_matrices_transposed(staging + (j * 8 + lane / 16 * 8 + lane % 8) * kOutStride + warp * 32 + lane / 8 % 2 * 16, v[0], v[1], v[2], v[3]);
        }
        warpgroup_sync(group);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = i * 16 + thread / 8, token = token0 + p * 64 + row, n = n0 + thread % 8 * 8;
          const uint4 v = *reinterpret_cast<const uint4*>(staging + row * kOutStride + thread % 8 * 16);
          if (token >= tokens || n >= N) continue;
          T* to = y + int64_t(token) * N + n;
          if (whole) {
            *reinterpret_cast<uint4*>(to) = v;
          } else {
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int q = 0; q < 8; ++q)
              if (n + q < N) reinterpret_cast<uint16_t*>(to)[q] = uint16_t(w[q / 2] >> (q % 2 * 16));
          }
        }
        warpgroup_sync(group);
      }
    };
    switch (e.activation) {  // here, so that the code that runs is in one piece
      case int(Activation::gelu): return write(std::integral_constant<int, int(Activation::gelu)>());
      case int(Activation::gelu_tanh): return write(std::integral_constant<int, int(Activation::gelu_tanh)>());
      case int(Activation::relu): return write(std::integral_constant<int, int(Activation::relu)>());
      case int(Activation::silu): return write(std::integral_constant<int, int(Activation::silu)>());
      default: return write(std::integral_constant<int, -1>());
    }
  } else {
    float* const y = static_cast<float*>(e.y);
    const bool whole = N % 4 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0, add = e.store == Store::add;
#pragma unroll
    for (int p = 0; p < TOKENS / 32; ++p) {
      if (token0 + p * 32 >= tokens) break;
      const int n = n0 + thread % 16 * 4;
      float4 old[4] = {};
      if (add && whole && n < N)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = token0 + p * 32 + i * 8 + thread / 16;
          if (token < tokens) old[i] = *reinterpret_cast<const float4*>(y + int64_t(token) * N + n);
        }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          *reinterpret_cast<float*>(staging + (j * 8 + 2 * t + q % 2) * kFloatStride + (warp * 16 + g + q / 2 * 8) * 4) = d[(p * 4 + j) * 4 + q] + (q / 2 ? bias_b : bias_a);
      warpgroup_sync(group);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i * 8 + thread / 16, token = token0 + p * 32 + row;
        const float4 v = *reinterpret_cast<const float4*>(staging + row * kFloatStride + thread % 16 * 16);
        if (token >= tokens || n >= N) continue;
        float* to = y + int64_t(token) * N + n;
        if (whole) {
          *reinterpret_cast<float4*>(to) = make_float4(old[i].x + v.x, old[i].y + v.y, old[i].z + v.z, old[i].w + v.w);
        } else {
          const float z[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int q = 0; q < 4; ++q)
            if (n + q < N) to[q] = add ? to[q] + z[q] : z[q];
        }
      }
      warpgroup_sync(group);
    }
  }
}

// Sums of a tile that ends early, for the next unit: every thread's accumulators, and a flag per warp.
template <int N>
__device__ __forceinline__ void leave(const float (&d)[N], float* slot, int32_t* flag) {
#pragma unroll
  for (int i = 0; i < N; i += 4) __stcg(reinterpret_cast<float4*>(slot + i * 256), make_float4(d[i], d[i + 1], d[i + 2], d[i + 3]));
  __threadfence();
  __syncwarp();
  if (threadIdx.x % 32 == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}
template <int N>
__device__ __forceinline__ void take(float (&d)[N], const float* slot, int32_t* flag) {
  int32_t ready = 0;
  while (!ready) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
  __syncwarp();
  if (threadIdx.x % 32 == 0) *flag = 0;  // for the next launch
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(slot + i * 256));
    d[i] = v.x, d[i + 1] = v.y, d[i + 2] = v.z, d[i + 3] = v.w;
  }
}

// From a chunk into a stage: 64 columns (`block`) of half a row group.
template <class W>
__device__ __forceinline__ void fetch(uint8_t* to, const uint8_t* chunk, int block, int half, uint64_t* full) {
  if constexpr (W::kScale == Scale::none) {
    bulk_copy(to, chunk + half * (kChunkBytes / 2), kChunkBytes / 2, full);
  } else {
    constexpr int kTile = W::kScale == Scale::row ? kTile8 : kTile4;
    bulk_copy(to, chunk + (block * 16 + half * 8) * kTile, 8 * kTile, full);
    if constexpr (W::kScale == Scale::block) {
      bulk_copy(to + 8 * kTile4, chunk + kCodes4 + half * (W::kScales / 2), W::kScales / 2, full);
      bulk_copy(to + 8 * kTile4 + W::kScales / 2, chunk + kCodes4 + W::kScales + half * (W::kZeros / 2), W::kZeros / 2, full);
    }
  }
}

// The fragments of one of a stage's 8 row tiles; those of 4 bits are scaled, which rounds them, as 16-bit weights are.
template <class W>
__device__ __forceinline__ void load_fragments(uint4 (&a)[4], const uint8_t* stage, int tile, int block, int lane) {
  using T = typename W::Type;
  if constexpr (W::kScale == Scale::none) {
    fragments<W>(a, W::codes(stage, tile, block, lane), {});
  } else if constexpr (W::kScale == Scale::row) {
    fragments<W>(a, W::tile_codes(stage + tile * kTile8, lane), {});
  } else {
    const int at = tile * 8 + lane / 4, group = block / W::kBlocks;
    const __half2 scale = *reinterpret_cast<const __half2*>(stage + 8 * kTile4 + at * (4 * W::kGroups) + group * 4);  // of row g, of row g + 8
    fragments<W>(a, W::tile_codes(stage + tile * kTile4, lane), W::excess(load2(stage + (8 * kTile4 + W::kScales / 2 + at * (2 * W::kGroups) + group * 2))));
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if constexpr (std::is_same<T, __half>::value) {
        const __half2 low = __low2half2(scale), high = __high2half2(scale);
        a[s].x = as_bits(__hmul2(as_half2(a[s].x), low));
        a[s].y = as_bits(__hmul2(as_half2(a[s].y), high));
        a[s].z = as_bits(__hmul2(as_half2(a[s].z), low));
        a[s].w = as_bits(__hmul2(as_half2(a[s].w), high));
      } else {
        const float low = __low2float(scale), high = __high2float(scale);
        auto scaled = [](uint32_t v, float by) {
          const float2 f = __bfloat1622float2(as_bfloat162(v));
          return pack2<__nv_bfloat16>(f.x * by, f.y * by);
        };
        a[s] = make_uint4(scaled(a[s].x, low), scaled(a[s].y, high), scaled(a[s].z, low), scaled(a[s].w, high));
      }
    }
  }
}
#endif

// row_scale [N padded] of q8_row; chunks: of 64 columns, whatever the format's
template <class W, int TOKENS, int CLUSTER>
__global__ void __launch_bounds__(kThreads, 1) gemm(const uint8_t* __restrict__ w, const float* __restrict__ row_scale, const __grid_constant__ CUtensorMap x,
                                                    int tokens, int N, int chunks, int tiles, PrefillScratch scratch, Epilogue e) {
#ifdef CODEFUSE_WGMMA
  using T = typename W::Type;
  constexpr int kStages = stages_for<W>(TOKENS), kXBytes = x_bytes(TOKENS), kStageBytes = stage_bytes<W>(TOKENS);
  extern __shared__ uint8_t shared[];
  __shared__ Barriers barriers;
  uint8_t* const smem = shared + (1024 - shared_address(shared) % 1024) % 1024;  // [kStages] (x, weights), then outputs
  const int warpgroup = threadIdx.x / 128, rank = CLUSTER == 1 ? 0 : int(blockIdx.x % CLUSTER);
  const int token_tiles = (tokens + TOKENS - 1) / TOKENS;
  const Work work(blockIdx.x / CLUSTER, gridDim.x / CLUSTER, tiles, chunks, scratch.partial != nullptr);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], 8 * CLUSTER);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (CLUSTER > 1) cluster_sync();
  launch_dependents();

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
      bool waited = false;
      int stage = 0, parity = 1;
      for (int i = 0; i < work.count; ++i) {
        const Item item = work.item(i);
        const int half = item.tile / token_tiles * CLUSTER + rank, token0 = item.tile % token_tiles * TOKENS;
        const int own_chunks = (chunks + W::kCols / 64 - 1) / (W::kCols / 64);
        for (int c = item.begin; c < item.end; ++c) {
          uint8_t* const to = smem + stage * kStageBytes;
          uint64_t* const full = &barriers.full[stage];
          barrier_wait(&barriers.empty[stage], parity);
          barrier_expect(full, kXBytes + w_bytes<W>());
          fetch<W>(to + kXBytes, w + (size_t(half / 2) * own_chunks + c / (W::kCols / 64)) * W::kBytes, c % (W::kCols / 64), half % 2, full);
          if (!waited) grid_wait();
          waited = true;
          tensor_copy<CLUSTER>(to + rank * (kXBytes / CLUSTER), &x, c * kChunkCols, token0 + rank * (TOKENS / CLUSTER), full);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
    grid_wait();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = warpgroup - 1, thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    uint8_t* const staging = smem + kStages * kStageBytes + group * kStageOutBytes;
    const uint64_t b_base = descriptor(shared_address(smem));
    const int slot = int(blockIdx.x);
    int stage = 0, parity = 0;
    grid_wait();
    float d[TOKENS / 2];
    for (int i = 0; i < work.count; ++i) {
      const Item item = work.item(i);
      if (item.begin == 0) {
#pragma unroll
        for (int r = 0; r < TOKENS / 2; ++r) d[r] = 0.f;
      } else {
        take(d, scratch.partial + size_t(slot - CLUSTER) * kPrefillSlot + thread * 4, scratch.flag + (slot - CLUSTER) * 8 + warp);
      }
      const int n = item.end - item.begin;
      uint4 a[4], next[4];  // weights of a chunk
      auto load = [&](uint4(&to)[4], int at, int chunk) { load_fragments<W>(to, smem + at * kStageBytes + kXBytes, warp, chunk % (W::kCols / 64), lane); };
      barrier_wait(&barriers.full[stage], parity);
      load(a, stage, item.begin);
      hold(d);
      for (int c = 0; c < n; ++c) {
        const int used = stage;
        const uint64_t b = b_base + uint32_t(used * (kStageBytes >> 4));
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) wgmma<T>(d, a[s], b + 2 * s);
        wgmma_commit();
        if (++stage == kStages) stage = 0, parity ^= 1;
        if (c + 1 < n) {  // the next weights meanwhile; what is between the two groups, the other warpgroup's multiplying covers
          barrier_wait(&barriers.full[stage], parity);
          load(next, stage, item.begin + c + 1);
        }
        wgmma_wait<0>();
        if constexpr (CLUSTER == 1) {
          if (lane == 0) barrier_arrive(&barriers.empty[used]);
        } else {
          if (lane < CLUSTER) arrive_at(&barriers.empty[used], lane);
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) a[s] = next[s];
      }
      hold(d);
      if (W::kScale == Scale::row && item.end == chunks) {
        const float* scale = row_scale + (item.tile / token_tiles * CLUSTER + rank) * kRows + warp * 16 + lane / 4;
        const float sa = scale[0], sb = scale[8];
#pragma unroll
        for (int r = 0; r < TOKENS / 2; ++r) d[r] *= r % 4 < 2 ? sa : sb;
      }
      if (item.end < chunks)
        leave(d, scratch.partial + size_t(slot) * kPrefillSlot + thread * 4, scratch.flag + slot * 8 + warp);
      else
        write_tile<T, TOKENS>(d, staging, group, item.tile % token_tiles * TOKENS, tokens, (item.tile / token_tiles * CLUSTER + rank) * kRows + group * 64, N, e);
    }
  }
  if constexpr (CLUSTER > 1) cluster_sync();  // a block's barriers are there until its peer has arrived at them
#endif
}

using Kernel = void (*)(const uint8_t*, const float*, CUtensorMap, int, int, int, int, PrefillScratch, Epilogue);

template <class W, int TOKENS, int CLUSTER>
void run(const Stream& s, DType act, const void* x, const void* w, const float* row_scale, int tokens, int N, int K, const PrefillScratch& scratch, const Epilogue& e) {
  const Kernel kernel = gemm<W, TOKENS, CLUSTER>;
  const int rows = kRows * CLUSTER, tiles = (N + rows - 1) / rows * ((tokens + TOKENS - 1) / TOKENS);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_for<W>(TOKENS)), "shared memory");
  cudaLaunchAttribute attribute[2]{};
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = CLUSTER;
  attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
  attribute[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t c{};
  c.blockDim = kThreads;
  c.dynamicSmemBytes = shared_for<W>(TOKENS);
  c.stream = s.stream;
  c.attrs = attribute;
  c.numAttrs = 1;
  int units = s.sms;
  if (CLUSTER > 1) {
    static const int clusters = [&] {
      int n = 0;
      cudaLaunchConfig_t ask = c;
      ask.gridDim = s.sms / CLUSTER * CLUSTER;
      check(cudaOccupancyMaxActiveClusters(&n, kernel, &ask), "clusters");
      return std::max(n, 1);
    }();
    units = std::min(clusters, s.sms / CLUSTER);
  }
  c.gridDim = std::min(tiles, units) * CLUSTER;
  c.numAttrs = s.dependent ? 2 : 1;
  check(cudaLaunchKernelEx(&c, kernel, static_cast<const uint8_t*>(w), row_scale, rows_map(act, x, tokens, K, TOKENS / CLUSTER), tokens, N, int(steps_of(K)), tiles, scratch, e), "launch");
}

template <class W>
void choose(const Stream& s, DType act, const void* x, const void* w, const float* row_scale, int tokens, int N, int K, const PrefillScratch& scratch, const Epilogue& e, int variant) {
  // the tile shape with the least of: units of work of the busiest multiprocessor x what one takes
  if (variant < 0) {
    double best = 0;
    for (int v = 0; v < 3; ++v) {
      const int shape = 64 << v;
      const double cost[3] = {0.42, 0.6, 1}, share = double((N + 255) / 256) * ((tokens + shape - 1) / shape) / (s.sms / 2);
      const double time = cost[v] * (share <= 1 ? 1 : scratch.partial ? share : double(int64_t(share + 0.999)));
      if (variant < 0 || time < best) best = time, variant = v;
    }
    variant += 3;
  }
  if constexpr (W::kScale == Scale::none) {
    switch (variant) {
      case 0: return run<W, 64, 1>(s, act, x, w, row_scale, tokens, N, K, scratch, e);
      case 1: return run<W, 128, 1>(s, act, x, w, row_scale, tokens, N, K, scratch, e);
      case 2: return run<W, 256, 1>(s, act, x, w, row_scale, tokens, N, K, scratch, e);
      default: break;
    }
  }
  switch (variant) {
    case 3: return run<W, 64, 2>(s, act, x, w, row_scale, tokens, N, K, scratch, e);
    case 4: return run<W, 128, 2>(s, act, x, w, row_scale, tokens, N, K, scratch, e);
    default: return run<W, 256, 2>(s, act, x, w, row_scale, tokens, N, K, scratch, e);
  }
}

}  // namespace

bool has_wgmma() {
  cudaFuncAttributes code;
  return cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(Kernel(gemm<Weights16<__half>, 128, 1>))) == cudaSuccess && code.sharedSizeBytes >= sizeof(Barriers);
}

void prefill_linear_wgmma(const Stream& s, DType act, const void* x, const void* w, int T, int N, int K, const PrefillScratch& scratch, const Epilogue& e, int variant) {
  act == DType::f16 ? choose<Weights16<__half>>(s, act, x, w, nullptr, T, N, K, scratch, e, variant)
                    : choose<Weights16<__nv_bfloat16>>(s, act, x, w, nullptr, T, N, K, scratch, e, variant);
}

void prefill_linear_quantized(const Stream& s, DType act, Format format, const void* x, const void* w, int T, int N, int K, const PrefillScratch& scratch,
                              const Epilogue& e) {
  const float* scale = row_scales(format, w, N, K);
  const auto run = [&](auto weights) { choose<decltype(weights)>(s, act, x, w, scale, T, N, K, scratch, e, -1); };
  act == DType::f16 ? with_quantized<__half>(format, run) : with_quantized<__nv_bfloat16>(format, run);
}

}  // namespace codefuse::cuda
