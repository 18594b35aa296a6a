// y[t, n] = x[t] . w[n] + bias[n]. Threads share the outputs, never one output's sum.
#include <algorithm>

#include "cpu/cpu_ops.h"

namespace codefuse::cpu {

void CpuOps::matmul(const MatmulArgs& a) {
  const int64_t n = a.w.rows;
  // several pieces per thread, so that one which loses its core does not hold up the others; whole blocks of rows
  int64_t piece = (n + pool_.threads() * 2 - 1) / (pool_.threads() * 2);
  piece = (std::max<int64_t>(piece, 8) + kBlockRows - 1) / kBlockRows * kBlockRows;
  pool_.each((n + piece - 1) / piece, [&](int64_t i, int) { kernels_.matmul(a, i * piece, std::min(n, (i + 1) * piece)); });
}

void CpuOps::linear(void* y, const void* x, const Linear& w, const Activation* act_fn, Rows rows) {
  const int64_t first = rows == Rows::prefill ? batch_->decode_rows : 0, end = rows == Rows::decode ? batch_->decode_rows : rows_;
  if (first == end) return;
  MatmulArgs a;
  a.w = w.weight.host;
  a.bias = w.bias;
  a.x = static_cast<const float*>(x) + first * w.weight.cols;
  a.tokens = int(end - first);
  a.y = static_cast<float*>(y) + first * w.weight.rows;
  a.act = act_fn;
  matmul(a);
}

void CpuOps::take_columns(void* y, const void* x, const int32_t* order, int64_t k) {
  for (int64_t t = 0; t < rows_; ++t)
    for (int64_t i = 0; i < k; ++i) static_cast<float*>(y)[t * k + i] = static_cast<const float*>(x)[t * k + order[i]];
}

void CpuOps::linear_add(float* y, const void* x, const Linear& w, bool add_bias) {
  MatmulArgs a;
  a.w = w.weight.host;
  a.bias = add_bias ? w.bias : nullptr;
  a.x = static_cast<const float*>(x);
  a.tokens = rows_;
  a.y = y;
  a.accumulate = true;
  matmul(a);
}

void CpuOps::logits(float* y, const void* x, const Linear& head) {
  MatmulArgs a;
  a.w = head.weight.host;
  a.bias = head.bias;
  a.x = static_cast<const float*>(x);
  a.tokens = batch_->samples();
  a.y = y;
  if (a.tokens > 0) matmul(a);
}

}  // namespace codefuse::cpu
