// Linear layers of prefill rows on Hopper's warpgroup matrix instructions, from the same tiles as decode: the weights are the A operand,
// from registers (a lane's 16 bytes of a tile are its A fragment), x the B operand, K-major in shared memory with the 128-byte swizzle.
//
// A block makes the outputs of TILES row tiles for TOKENS rows of x: one producer thread keeps a ring of (weights, x) chunks full by bulk copies, a
// consumer warpgroup takes 4 row tiles, 64 outputs. The two blocks of a cluster take neighbouring outputs for the same rows of x, and each
// fetches half of x for both. With few rows of x half as many tiles a block put more multiprocessors to work. The grid is persistent. Clusters
// that need the same weights for different rows of x are a team: they go through the same tiles at the same time, so that weights come from
// memory once. Tiles that do not divide evenly among teams are relayed: one runs the first chunks of a tile, and leaves its sums for the next,
// which goes on from them. With few rows of x a chunk takes as long as the producer and the consumers have instructions for it, one after the
// other, so what a tile's chunks have in common is computed once.
//
// One launch has one product, or two of as many columns (of their tiles the first product's come first), or one whose K comes from two sources (x and
// matrix each).
//
// Every output is one sum in chunks of 16 columns in order: the relay hands on the float32 accumulators as they are, and the
// width of an instruction (TOKENS) does not change what one of its columns is. So a row's result depends neither on the number of rows
// nor on the tile shape.
#pragma once
#include "cuda/prefill_tile.cuh"
#include "cuda/prefill_work.h"
#include "cuda/tensor_map.h"
#include "cuda/weights.cuh"
#include "cuda/wgmma.cuh"

namespace codefuse::cuda::prefill {

constexpr int rows_of(int tiles) { return tiles * 16; }          // outputs of a block
constexpr int threads_of(int tiles) { return 128 + tiles * 32; }  // a warpgroup with the producer, consumers
constexpr int kMaxStages = 8;

CODEFUSE_HD constexpr int x_bytes(int tokens) { return tokens * kChunkCols * 2; }
// Weights of a stage: 64 columns of a block's row tiles, with 4 bits' scales and zeros.
template <class W>
CODEFUSE_HD constexpr int w_bytes(int tiles) {
  return tiles * (W::kScale == Scale::none ? kRowTileBytes : W::kScale == Scale::row ? kTile8 : kTile4 + (W::kBytes - kCodes4) / 16);
}
template <class W>
CODEFUSE_HD constexpr int stage_bytes(int tokens, int tiles) { return (w_bytes<W>(tiles) + 1023) / 1024 * 1024 + x_bytes(tokens); }
template <class W>
CODEFUSE_HD constexpr int stages_for(int tokens, int tiles) {
  const int fit = (232448 - 1024 - 1024 - tiles / 4 * 2 * kBuffer) / stage_bytes<W>(tokens, tiles);
  return fit < kMaxStages ? fit : kMaxStages;
}
template <class W>
CODEFUSE_HD constexpr int shared_for(int tokens, int tiles) { return 1024 + stages_for<W>(tokens, tiles) * stage_bytes<W>(tokens, tiles) + tiles / 4 * 2 * kBuffer; }

// As cudaFuncGetAttributes shows it: static shared memory only where there is code for Hopper.
struct Barriers {
  uint64_t full[kMaxStages], empty[kMaxStages];
};

#ifdef CODEFUSE_WGMMA
// A shared address that the compiler holds on to: it would compute it anew at every use.
__device__ __forceinline__ uint32_t held_address(const void* p) {
  uint32_t a;
  asm volatile("mov.u32 %0, %1;" : "=r"(a) : "r"(shared_address(p)));
  return a;
}
__device__ __forceinline__ uint32_t address_in(uint32_t a, uint32_t block) {  // of the same place in a block of the cluster
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(a), "r"(block));
  return there;
}
__device__ __forceinline__ void arrive_there(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// to both blocks of the cluster, the same place and barrier in each
__device__ __forceinline__ void tensor_copy_both(uint32_t dst, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
               "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t(3)) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The parts of a chunk that a stage has, 64 columns (`block`) of TILES row tiles from tile `first` on: part(place in the stage, in the chunk, bytes).
template <class W, int TILES, class F>
__device__ __forceinline__ void parts_of(int block, int first, const F& part) {
  if constexpr (W::kScale == Scale::none) {
    part(0, first * kRowTileBytes, TILES * kRowTileBytes);
  } else {
    constexpr int kTile = W::kScale == Scale::row ? kTile8 : kTile4;
    part(0, (block * 16 + first) * kTile, TILES * kTile);
    if constexpr (W::kScale == Scale::block) {
      constexpr int kScales = W::kScales / 16, kZeros = W::kZeros / 16;  // of a row tile
      part(TILES * kTile4, kCodes4 + first * kScales, TILES * kScales);
      part(TILES * (kTile4 + kScales), kCodes4 + W::kScales + first * kZeros, TILES * kZeros);
    }
  }
}

// The fragments of one of a stage's row tiles; those of 4 bits are scaled, which rounds them, as 16-bit weights are.
template <class W, int TILES>
__device__ __forceinline__ void load_fragments(uint4 (&a)[4], const uint8_t* stage, int tile, int block, int lane) {
  using T = typename W::Type;
  if constexpr (W::kScale == Scale::none) {
    fragments<W>(a, W::codes(stage, tile, block, lane), {});
  } else if constexpr (W::kScale == Scale::row) {
    fragments<W>(a, W::tile_codes(stage + tile * kTile8, lane), {});
  } else {
    const int at = tile * 8 + lane / 4, group = block / W::kBlocks;
    const uint8_t* const scales = stage + TILES * kTile4;
    const __half2 scale = *reinterpret_cast<const __half2*>(scales + at * (4 * W::kGroups) + group * 4);  // of row g, of row g + 8
    fragments<W>(a, W::tile_codes(stage + tile * kTile4, lane), W::excess(load1(scales + (TILES * (W::kScales / 16) + at * W::kGroups + group))));
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
          const float2 f = unpack2<__nv_bfloat16>(v);
          return pack2<__nv_bfloat16>(f.x * by, f.y * by);
        };
        a[s] = make_uint4(scaled(a[s].x, low), scaled(a[s].y, high), scaled(a[s].z, low), scaled(a[s].w, high));
      }
    }
  }
}
#endif

// Chunks are of 64 columns, whatever the format's.
struct Source {
  const uint8_t* w;
  int chunks;
};
struct Product {
  const float* row_scale;  // [N padded] of q8_row
  int N;
  bool mapped;  // Args::y
  Epilogue epilogue;
};
struct Args {
  int tokens;
  int chunks;        // of a product
  int join;          // from this chunk on of a product its source is the second
  int tiles, first;  // of the outputs of a cluster x the rows of x of a team: of all products; of the first
  int members;       // clusters of a team
  int half;          // rows of x that a block of a cluster fetches for both: of the tile, or of all if those are fewer
  Source source[2];
  Product product[2];
  PrefillScratch scratch;
  CUtensorMap x[2];  // of sources: boxes of `half` rows
  CUtensorMap y[2];  // of products (TileWriter)
};

template <class W, int TOKENS, int TILES>
__global__ void __launch_bounds__(threads_of(TILES), 1) gemm(const __grid_constant__ Args a) {
#ifdef CODEFUSE_WGMMA
  using T = typename W::Type;
  constexpr int kRows = rows_of(TILES), kStages = stages_for<W>(TOKENS, TILES), kXBytes = x_bytes(TOKENS), kStageBytes = stage_bytes<W>(TOKENS, TILES);
  extern __shared__ uint8_t shared[];
  __shared__ Barriers barriers;
  const uint32_t base = held_address(shared), smem = base + (1024 - base % 1024) % 1024;  // [kStages] (x, weights), then outputs
  const uint32_t full_at = held_address(barriers.full), empty_at = held_address(barriers.empty);
  const int members = a.members, warpgroup = threadIdx.x / 128, rank = int(blockIdx.x % 2), member = int(blockIdx.x / 2) % members;
  const int across = (a.tokens + TOKENS * members - 1) / (TOKENS * members);  // tiles with the same weights
  // of a tile: its product, the block's first output, its first row of x
  struct Place {
    int product, row, token;
  };
  const auto place_of = [&](int tile) {  // a.first is a multiple of across
    const int product = tile >= a.first;
    return Place{product, ((product ? tile - a.first : tile) / across * 2 + rank) * kRows, (tile % across * members + member) * TOKENS};
  };
  const Work work(blockIdx.x / (2 * members), gridDim.x / (2 * members), a.tiles, a.chunks, a.scratch.partial != nullptr);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], TILES * 32 + TILES);  // the lanes that read weights here; the warps that read x in the peer
    }
    barrier_init_fence();
  }
  __syncthreads();
  cluster_sync();
  launch_dependents();

  if (warpgroup == 0) {
    if constexpr (TILES == 8) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) {
        if (a.source[i].w) prefetch_map(&a.x[i]);
        if (a.product[i].mapped) prefetch_map(&a.y[i]);
      }
      bool waited = false;
      int stage = 0, parity = 1;
      // chunks [c, end) of source i, to be multiplied for outputs from place.row on
      const auto copy = [&](const Place& place, int i, int c, int end) {
        constexpr int kBlocks = W::kCols / 64;
        const int first = place.row % kGroupRows / 16, token = place.token + rank * a.half, bytes_of_x = a.half * (kChunkCols * 2);
        const CUtensorMap* const map = &a.x[i];
        const uint8_t* chunk = a.source[i].w + (size_t(place.row / kGroupRows) * ((a.source[i].chunks + kBlocks - 1) / kBlocks) + c / kBlocks) * W::kBytes;
#pragma unroll 1
        for (; c < end; ++c) {
          const uint32_t to = smem + stage * kStageBytes, full = full_at + stage * 8;
          barrier_wait(empty_at + stage * 8, parity);
          barrier_expect(full, 2 * bytes_of_x + w_bytes<W>(TILES));
          parts_of<W, TILES>(c % kBlocks, first, [&](int at, int from, int bytes) { bulk_copy(to + kXBytes + at, chunk + from, bytes, full); });
          if (!waited) grid_wait();
          waited = true;
          tensor_copy_both(to + rank * bytes_of_x, map, c * kChunkCols, token, full);
          if ((c + 1) % kBlocks == 0) chunk += W::kBytes;
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      };
      for (int i = 0; i < work.count; ++i) {
        const Item item = work.item(i);
        const Place place = place_of(item.tile);
        if (item.begin < a.join) copy(place, place.product, item.begin, min(item.end, a.join));
        if (item.end > a.join) copy(place, 1, max(item.begin, a.join) - a.join, item.end - a.join);
      }
    }
    grid_wait();
  } else {
    if constexpr (TILES == 8) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = warpgroup - 1, thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    TileWriter<T, TOKENS> writer{smem + kStages * kStageBytes + group * (2 * kBuffer), group};
    const uint64_t b_base = wgmma_rows(smem);
    const uint8_t* const weights = shared + (smem - base) + kXBytes;
    const uint32_t empty_there = address_in(empty_at, rank ^ 1);
    const int slot = int(blockIdx.x);
    int stage = 0, parity = 0;
    grid_wait();
    float d[TOKENS / 2];
    for (int i = 0; i < work.count; ++i) {
      const Item item = work.item(i);
      const Place place = place_of(item.tile);
      const Product& product = a.product[place.product];
      const int output = place.row + warp * 16 + lane / 4;  // and 8 further
      float scale_a = 1.f, scale_b = 1.f, bias_a = 0.f, bias_b = 0.f;
      if (item.end == a.chunks) {
        if (W::kScale == Scale::row) scale_a = product.row_scale[output], scale_b = product.row_scale[output + 8];
        const auto bias_of = [&](int n) { return n < product.N ? (product.epilogue.bias ? product.epilogue.bias[n] : 0.f) + (product.epilogue.bias_b ? product.epilogue.bias_b[n] : 0.f) : 0.f; };
        bias_a = bias_of(output), bias_b = bias_of(output + 8);
      }
      if (item.begin == 0) {
#pragma unroll
        for (int r = 0; r < TOKENS / 2; ++r) d[r] = 0.f;
      } else {
        take(d, a.scratch.partial + size_t(slot - 2 * members) * kPrefillSlot + thread * 4, a.scratch.flag + (slot - 2 * members) * 8 + warp);
      }
      const int n = item.end - item.begin;
      uint4 even[4], odd[4];  // weights of chunks by turns: while one is multiplied, the next is made
      int c = 0, before = 0;  // the stage of the chunk before this one
      const auto make = [&](uint4(&to)[4]) {
        barrier_wait(full_at + stage * 8, parity);
        const int chunk = item.begin + c;
        load_fragments<W, TILES>(to, weights + stage * kStageBytes, warp, (chunk >= a.join ? chunk - a.join : chunk) % (W::kCols / 64), lane);
      };
      const auto release = [&](int used) {
        barrier_arrive(empty_at + used * 8);
        if (lane == 0) arrive_there(empty_there + used * 8);
      };
      // multiplies a chunk, and makes the next when the one before, which had its registers, is done; false: it was the last
      const auto multiply = [&](const uint4(&now)[4], uint4(&next)[4]) {
        const uint64_t b = b_base + uint32_t(stage * (kStageBytes >> 4));
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) wgmma_add<T>(d, now[s], b + 2 * s);
        wgmma_commit();
        wgmma_wait<1>();
        if (c > 0) release(before);
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
        if (++c == n) return false;
        make(next);
        return true;
      };
      make(even);
      wgmma_hold(d);
      while (multiply(even, odd) && multiply(odd, even)) {
      }
      wgmma_wait<0>();
      release(before);
      wgmma_hold(d);
      if (item.end < a.chunks) {
        leave(d, a.scratch.partial + size_t(slot) * kPrefillSlot + thread * 4, a.scratch.flag + slot * 8 + warp);
        continue;
      }
      if (W::kScale == Scale::row)
#pragma unroll
        for (int r = 0; r < TOKENS / 2; ++r) d[r] = __fmul_rn(d[r], r % 4 < 2 ? scale_a : scale_b);  // not into what is added later: shapes agree
      writer.write(d, product.mapped ? &a.y[place.product] : nullptr, place.token, a.tokens, place.row + group * 64, product.N, product.epilogue, bias_a, bias_b);
    }
    if (thread % 128 == 0) stores_done();
  }
  cluster_sync();  // a block's barriers are there until its peer has arrived at them
#endif
}

using Kernel = void (*)(Args);

}  // namespace codefuse::cuda::prefill
