// Copies of KV pages.
#include <cstring>

#include "cpu/cpu_ops.h"

namespace codefuse::cpu {

void CpuOps::copy_pages(const std::vector<KvLayer>& layers, const ModelConfig& c, int kv_heads) {
  const size_t head = size_t(kPageTokens) * size_t(c.head_dim), page = head * size_t(kv_heads);  // floats
  for (const PageCopy& copy : batch_->copies)
    for (const KvLayer& kv : layers)
      for (void* values : {kv.k, kv.v})
        for (size_t h = 0; h < size_t(kv_heads); ++h) {
          float* const base = static_cast<float*>(values) + h * head;
          std::memcpy(base + size_t(copy.to) * page, base + size_t(copy.from) * page, size_t(copy.tokens) * size_t(c.head_dim) * sizeof(float));
        }
}

}  // namespace codefuse::cpu
