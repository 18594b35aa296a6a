// How prefill products on Hopper (linear_prefill_wgmma.cuh) are launched: the tile shape, and how many clusters are a team.
#pragma once
#include <iterator>

#include "cuda/linear_prefill_wgmma.cuh"

namespace codefuse::cuda::prefill {

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
  args.half = std::min(TOKENS / 2, (args.tokens + 15) / 16 * 8);  // what rows of x beyond are in shared memory makes sums that are not stored
  const auto tiles_of = [&](int N) { return (N + 2 * rows_of(TILES) - 1) / (2 * rows_of(TILES)) * across; };
  args.first = tiles_of(args.product[0].N);
  args.tiles = args.first + tiles_of(args.product[1].N);
  for (int i = 0; i < 2; ++i)
    if (x[i]) args.x[i] = rows_map(act, x[i], args.tokens, args.source[i].chunks * kChunkCols, args.half);
  for (int i = 0; i < 2; ++i) {
    Product& p = args.product[i];
    const int size = p.epilogue.store == Store::act ? 2 : 4;
    p.mapped = p.N > 0 && p.N * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.epilogue.y) % 16 == 0 && p.epilogue.store != Store::f32;
    if (!p.mapped) continue;
    args.y[i] = p.epilogue.store == Store::act ? rows_map(act, p.epilogue.y, args.tokens, p.N, kOutRows)
                                              : map_of(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, p.epilogue.y, args.tokens, p.N, 32, kAddedRows, CU_TENSOR_MAP_SWIZZLE_128B);
  }
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
