// Copies of KV pages.
#include <algorithm>

#include "cuda/kernels.h"

namespace codefuse::cuda {

namespace {

constexpr int kLayers = 128;  // of one launch
struct Layers {
  KvLayer kv[kLayers];
};

// grid (copies, kv_heads, 2 * layers): K and V of a layer; 16 bytes a thread and turn
__global__ void copy_page(const __grid_constant__ Layers layers, const PageCopy* __restrict__ copies, int token_units) {
  launch_dependents();
  grid_wait();
  const PageCopy c = copies[blockIdx.x];
  const KvLayer& kv = layers.kv[blockIdx.z / 2];
  uint4* const base = static_cast<uint4*>(blockIdx.z % 2 ? kv.v : kv.k) + int64_t(blockIdx.y) * kPageTokens * token_units;
  const int64_t page = int64_t(gridDim.y) * kPageTokens * token_units;
  for (int i = threadIdx.x; i < c.tokens * token_units; i += blockDim.x) base[c.to * page + i] = base[c.from * page + i];
}

}  // namespace

void copy_pages(const Stream& s, DType act, const std::vector<KvLayer>& layers, const StepMeta& m, int copies, int kv_heads, int head_dim) {
  const int token_units = int(head_dim * size_of(act) / sizeof(uint4));  // head_dim is a multiple of 8
  for (size_t first = 0; first < layers.size(); first += kLayers) {
    const size_t n = std::min(layers.size() - first, size_t(kLayers));
    Layers some{};
    std::copy_n(layers.begin() + int64_t(first), n, some.kv);
    launch(s, copy_page, dim3(copies, kv_heads, unsigned(2 * n)), 128, 0, some, m.copies, token_units);
  }
}

}  // namespace codefuse::cuda
