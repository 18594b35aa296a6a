// Rotation and storage of keys and values, then causal attention over the pages.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/cpu_ops.h"

namespace codefuse::cpu {

namespace {

// Pairs (i, i + pairs) of the head's first dimensions.
void rotate(float* head, const float* cos, const float* sin, int pairs) {
  for (int i = 0; i < pairs; ++i) {
    const float a = head[i], b = head[i + pairs];
    head[i] = a * cos[i] - b * sin[i];
    head[i + pairs] = b * cos[i] + a * sin[i];
  }
}

}  // namespace

void CpuOps::rope_store(void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) {
  const int64_t d = c.head_dim, row_size = (heads + 2 * kv_heads) * d, page_size = kv_heads * kPageTokens * d;
  const int pairs = c.position == PositionKind::rope ? c.rope_dim / 2 : 0;
  const int rows = rows_;
  const int64_t group = rows < 8 ? rows : 8;
  pool_.each((rows + group - 1) / group, [&](int64_t i, int) {
    for (int64_t t = i * group; t < std::min<int64_t>(rows, (i + 1) * group); ++t) {
      float* row = static_cast<float*>(qkv) + t * row_size;
      const int p = batch_->position[t];
      for (int h = 0; h < heads + kv_heads; ++h)
        rotate(row + h * d, rope_.cos.data() + int64_t(p) * pairs, rope_.sin.data() + int64_t(p) * pairs, pairs);
      const int64_t page = row_pages_[t][p / kPageTokens];
      for (int h = 0; h < kv_heads; ++h) {
        const int64_t at = page * page_size + (int64_t(h) * kPageTokens + p % kPageTokens) * d;
        std::memcpy(static_cast<float*>(kv.k) + at, row + (heads + h) * d, size_t(d) * sizeof(float));
        std::memcpy(static_cast<float*>(kv.v) + at, row + (heads + kv_heads + h) * d, size_t(d) * sizeof(float));
      }
    }
  });
}

void CpuOps::attention(void* out, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) {
  const int64_t d = c.head_dim, row_size = (heads + 2 * kv_heads) * d;
  const float scale = 1.f / std::sqrt(float(d));
  pool_.each(int64_t(rows_) * heads, [&](int64_t i, int thread) {
    const int64_t t = i / heads, h = i % heads, kv_head = h / (heads / kv_heads);
    AttendArgs a;
    a.q = static_cast<const float*>(qkv) + t * row_size + h * d;
    a.out = static_cast<float*>(out) + i * d;
    a.k = static_cast<const float*>(kv.k) + kv_head * kPageTokens * d;
    a.v = static_cast<const float*>(kv.v) + kv_head * kPageTokens * d;
    a.page_stride = int64_t(kv_heads) * kPageTokens * d;
    a.pages = row_pages_[t];
    a.head_dim = int(d);
    a.last = batch_->position[t];
    a.first = c.window > 0 ? std::max(0, a.last - c.window + 1) : 0;
    a.scale = scale;
    a.fetch = rows_ <= kDecodeRows;
    kernels_.attend(a, scratch(thread, size_t(a.last - a.first + 1)));
  });
}

}  // namespace codefuse::cpu
