// Linear layers of prefill rows on Hopper's warpgroup matrix instructions, from the same tiles as decode: the weights are the A operand,
// from registers (a lane's 16 bytes of a tile are its A fragment), x the B operand, K-major in shared memory with the 128-byte swizzle.
//
// A block makes the outputs of TILES row tiles for TOKENS rows of x: one producer warp keeps a ring of (weights, x) chunks full by bulk copies, a
// consumer warpgroup takes 4 row tiles, 64 outputs. The two blocks of a cluster take neighbouring outputs for the same rows of x, and each
// fetches half of x for both. With few rows of x half as many tiles a block put more multiprocessors to work. The grid is persistent. Clusters that need the same weights for different rows of x are a team: they go
// through the same tiles at the same time, so that weights come from memory once. Tiles that do not divide evenly among teams are
// relayed: one runs the first chunks of a tile, and leaves its sums for the next, which goes on from them.
//
// One launch has one product, or two of as many columns (of their tiles the first product's come first), or one whose K comes from two sources (x and
// matrix each).
//
// Every output is one sum in chunks of 16 columns in order: the relay hands on the float32 accumulators as they are, and the
// width of an instruction (TOKENS) does not change what one of its columns is. So a row's result depends neither on the number of rows
// nor on the tile shape.
#pragma once
#include <iterator>

#include "cuda/prefill_tile.cuh"
#include "cuda/prefill_work.h"
#include "cuda/tensor_map.h"
#include "cuda/weights.cuh"
#include "cuda/wgmma.cuh"

namespace codefuse::cuda::prefill {

constexpr int rows_of(int tiles) { return tiles * 16; }          // outputs of a block
constexpr int threads_of(int tiles) { return 128 + tiles * 32; }  // a warpgroup with the producer, consumers
constexpr int kMaxStages = 8;
constexpr int kSoon = 8;  // what a tile is added to comes to L2 with its last chunks, a piece with each

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
  const int fit = (232448 - 1024 - 1024 - tiles / 4 * kStageOutBytes) / stage_bytes<W>(tokens, tiles);
  return fit < kMaxStages ? fit : kMaxStages;
}
template <class W>
CODEFUSE_HD constexpr int shared_for(int tokens, int tiles) {
  return 1024 + stages_for<W>(tokens, tiles) * stage_bytes<W>(tokens, tiles) + tiles / 4 * kStageOutBytes;
}

// As cudaFuncGetAttributes shows it: static shared memory only where there is code for Hopper.
struct Barriers {
  uint64_t full[kMaxStages], empty[kMaxStages];
};

#ifdef CODEFUSE_WGMMA
__device__ __forceinline__ void arrive_at(uint64_t* b, uint32_t block) {  // the same barrier in a block of the cluster
  asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [a];\n}" ::"r"(shared_address(b)), "r"(block) : "memory");
}
// to both blocks of the cluster, the same place and barrier in each
__device__ __forceinline__ void tensor_copy_both(void* dst, const CUtensorMap* map, int column, int row, uint64_t* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(dst)), "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "h"(uint16_t(3)) : "memory");
}
// one box to L2
__device__ __forceinline__ void tensor_prefetch(const void* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
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
          const float2 f = __bfloat1622float2(as_bfloat162(v));
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
  Epilogue epilogue;
};
struct Args {
  int tokens;
  int chunks;        // of a product
  int join;          // from this chunk on of a product its source is the second
  int tiles, first;  // of the outputs of a cluster x the rows of x of a team: of all products; of the first
  int members;       // clusters of a team
  Source source[2];
  Product product[2];
  PrefillScratch scratch;
  CUtensorMap x[2];  // of sources
  CUtensorMap y;     // of product 0, where it is added to: boxes of a block's outputs for TOKENS / kSoon rows
  int adds;
};

template <class W, int TOKENS, int TILES>
__global__ void __launch_bounds__(threads_of(TILES), 1) gemm(const __grid_constant__ Args a) {
#ifdef CODEFUSE_WGMMA
  using T = typename W::Type;
  constexpr int kRows = rows_of(TILES), kStages = stages_for<W>(TOKENS, TILES), kXBytes = x_bytes(TOKENS), kStageBytes = stage_bytes<W>(TOKENS, TILES);
  extern __shared__ uint8_t shared[];
  __shared__ Barriers barriers;
  uint8_t* const smem = shared + (1024 - shared_address(shared) % 1024) % 1024;  // [kStages] (x, weights), then outputs
  const int members = a.members, warpgroup = threadIdx.x / 128, rank = int(blockIdx.x % 2), member = int(blockIdx.x / 2) % members;
  const int across = (a.tokens + TOKENS * members - 1) / (TOKENS * members);  // tiles with the same weights
  const auto product_of = [&](int tile) { return int(tile >= a.first); };
  const auto row_of = [&](int tile) { return ((product_of(tile) ? tile - a.first : tile) / across * 2 + rank) * kRows; };  // the block's first output
  const auto token_of = [&](int tile) { return (tile % across * members + member) * TOKENS; };  // a.first is a multiple of across
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
      prefetch_map(&a.x[0]);
      if (a.source[1].w) prefetch_map(&a.x[1]);
      bool waited = false;
      int stage = 0, parity = 1;
      for (Walk at(work); !at.done(); at.step()) {
        uint8_t *const to = smem + stage * kStageBytes, *const weights = to + kXBytes;
        uint64_t* const full = &barriers.full[stage];
        barrier_wait(&barriers.empty[stage], parity);
        barrier_expect(full, kXBytes + w_bytes<W>(TILES));
        const bool joined = at.chunk >= a.join;
        const int source = joined | product_of(at.item.tile), c = joined ? at.chunk - a.join : at.chunk;
        const int own_chunks = (a.source[source].chunks + W::kCols / 64 - 1) / (W::kCols / 64);
        const int row = row_of(at.item.tile);
        const uint8_t* const chunk = a.source[source].w + (size_t(row / kGroupRows) * own_chunks + c / (W::kCols / 64)) * W::kBytes;
        parts_of<W, TILES>(c % (W::kCols / 64), row % kGroupRows / 16, [&](int place, int from, int bytes) { bulk_copy(weights + place, chunk + from, bytes, full); });
        if (!waited) grid_wait();
        waited = true;
        tensor_copy_both(to + rank * (kXBytes / 2), &a.x[source], c * kChunkCols, token_of(at.item.tile) + rank * (TOKENS / 2), full);
        const int left = a.chunks - at.chunk;
        if (a.adds && at.item.end == a.chunks && left <= kSoon) tensor_prefetch(&a.y, row, token_of(at.item.tile) + (kSoon - left) * (TOKENS / kSoon));
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
    }
    grid_wait();
  } else {
    if constexpr (TILES == 8) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = warpgroup - 1, thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    uint8_t* const staging = smem + kStages * kStageBytes + group * kStageOutBytes;
    const uint64_t b_base = wgmma_rows(shared_address(smem));
    const int slot = int(blockIdx.x);
    int stage = 0, parity = 0;
    grid_wait();
    float d[TOKENS / 2];
    for (int i = 0; i < work.count; ++i) {
      const Item item = work.item(i);
      const Product& product = a.product[product_of(item.tile)];
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
        barrier_wait(&barriers.full[stage], parity);
        const int chunk = item.begin + c;
        load_fragments<W, TILES>(to, smem + stage * kStageBytes + kXBytes, warp, (chunk >= a.join ? chunk - a.join : chunk) % (W::kCols / 64), lane);
      };
      const auto release = [&](int used) {
        barrier_arrive(&barriers.empty[used]);
        if (lane == 0) arrive_at(&barriers.empty[used], rank ^ 1);
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
      if (W::kScale == Scale::row && item.end == a.chunks) {
        const float* scale = product.row_scale + row_of(item.tile) + warp * 16 + lane / 4;
        const float sa = scale[0], sb = scale[8];
#pragma unroll
        for (int r = 0; r < TOKENS / 2; ++r) d[r] = __fmul_rn(d[r], r % 4 < 2 ? sa : sb);  // not into what is added later: shapes agree
      }
      if (item.end < a.chunks)
        leave(d, a.scratch.partial + size_t(slot) * kPrefillSlot + thread * 4, a.scratch.flag + slot * 8 + warp);
      else
        write_tile<T, TOKENS>(d, staging, group, token_of(item.tile), a.tokens, row_of(item.tile) + group * 64, product.N, product.epilogue);
    }
  }
  cluster_sync();  // a block's barriers are there until its peer has arrived at them
#endif
}

using Kernel = void (*)(Args);

// clusters that can be resident at a time
template <class W, int TOKENS, int TILES>
int clusters_of(const Stream& s, const cudaLaunchConfig_t& config) {
  static const int clusters = [&] {
    int n = 0;
    cudaLaunchConfig_t ask = config;
    ask.gridDim = s.sms / 2 * 2;
    check(cudaOccupancyMaxActiveClusters(&n, Kernel(gemm<W, TOKENS, TILES>), &ask), "clusters");
    return std::max(n, 1);
  }();
  return std::min(clusters, s.sms / 2);
}

// x: of the sources, or nullptr. Of args what depends on the tile shape is set here.
template <class W, int TOKENS, int TILES>
void run(const Stream& s, DType act, Args args, const void* const (&x)[2], int members) {
  const Kernel kernel = gemm<W, TOKENS, TILES>;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_for<W>(TOKENS, TILES)), "shared memory");
  cudaLaunchAttribute attribute[2]{};
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = 2;
  attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
  attribute[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t c{};
  c.blockDim = threads_of(TILES);
  c.dynamicSmemBytes = shared_for<W>(TOKENS, TILES);
  c.stream = s.stream;
  c.attrs = attribute;
  c.numAttrs = 1;
  const int clusters = clusters_of<W, TOKENS, TILES>(s, c), rows = TOKENS * members, across = (args.tokens + rows - 1) / rows;
  args.members = members;
  const auto tiles_of = [&](int N) { return (N + 2 * rows_of(TILES) - 1) / (2 * rows_of(TILES)) * across; };
  args.first = tiles_of(args.product[0].N);
  args.tiles = args.first + tiles_of(args.product[1].N);
  for (int i = 0; i < 2; ++i)
    if (x[i]) args.x[i] = rows_map(act, x[i], args.tokens, args.source[i].chunks * kChunkCols, TOKENS / 2);
  const Epilogue& e = args.product[0].epilogue;
  const int N = args.product[0].N;
  args.adds = e.store == Store::add && args.product[1].N == 0 && N % 4 == 0 && reinterpret_cast<uintptr_t>(e.y) % 16 == 0;
  if (args.adds) args.y = map_of(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, e.y, args.tokens, N, rows_of(TILES), TOKENS / kSoon, CU_TENSOR_MAP_SWIZZLE_NONE);
  c.gridDim = std::min(args.tiles, std::max(1, clusters / members)) * members * 2;
  c.numAttrs = s.dependent ? 2 : 1;
  check(cudaLaunchKernelEx(&c, kernel, args), "launch");
}

constexpr int kMembers = 8;  // of a team at most

// A tile shape, and what a tile takes.
struct Shape {
  int tokens, tiles;
  double cost;
};
constexpr Shape kShapes[] = {{64, 4, 0.28}, {64, 8, 0.42}, {128, 8, 0.6}, {256, 8, 1}};

// The tile shape and team with the least of: tiles of the busiest team x what one takes. Reading 16-bit weights from memory once more costs
// about a twentieth.
template <class W>
void choose(const Stream& s, DType act, const Args& args, const void* const (&x)[2]) {
  const double again = 0.05 * w_bytes<W>(8) / (kChunkBytes / 2);
  double best = 0;
  int shape = 0, members = 1;
  for (int v = 0; v < int(std::size(kShapes)); ++v) {
    const Shape& of = kShapes[v];
    const int outputs = 2 * rows_of(of.tiles), tiles = (args.tokens + of.tokens - 1) / of.tokens;
    const int places = (args.product[0].N + outputs - 1) / outputs + (args.product[1].N + outputs - 1) / outputs;
    for (int m = 1; m <= std::min({tiles, kMembers, s.sms / 2}); ++m) {
      const int across = (tiles + m - 1) / m;
      const double share = double(places) * across / (s.sms / 2 / m);
      const double time = of.cost * (share <= 1 ? 1 : args.scratch.partial ? share : double(int64_t(share + 0.999))) * (1 + again * (across - 1));
      if (best == 0 || time < best) best = time, shape = v, members = m;
    }
  }
  switch (shape) {
    case 0: return run<W, 64, 4>(s, act, args, x, members);
    case 1: return run<W, 64, 8>(s, act, args, x, members);
    case 2: return run<W, 128, 8>(s, act, args, x, members);
    default: return run<W, 256, 8>(s, act, args, x, members);
  }
}

}  // namespace codefuse::cuda::prefill
