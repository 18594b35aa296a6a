// Ops on each row by itself: embedding, norms, gate, sums, gathering.
#include <algorithm>
#include <cstring>

#include "cpu/cpu_ops.h"

namespace codefuse::cpu {

namespace {
constexpr int64_t kWorthThreads = 16384;  // elements below which waking a thread costs more than it saves
}

void CpuOps::embed(float* x, const Matrix& table) {
  for (int t = 0; t < rows_; ++t) decode_row(table.host, token_[t], x + int64_t(t) * table.cols);
}

void CpuOps::add_position(float* x, const Matrix& table) {
  float* row = scratch(0, size_t(table.cols));
  for (int t = 0; t < rows_; ++t) {
    decode_row(table.host, batch_->position[t], row);
    for (int64_t i = 0; i < table.cols; ++i) x[t * table.cols + i] += row[i];
  }
}

void CpuOps::norm_rows(float* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden, int rows) {
  const int64_t group = int64_t(rows) * hidden < kWorthThreads ? std::max(rows, 1) : 16;
  pool_.each((rows + group - 1) / group, [&](int64_t i, int) {
    for (int64_t t = i * group; t < std::min<int64_t>(rows, (i + 1) * group); ++t)
      kernels_.norm(y + t * hidden, x + t * hidden, n.weight, n.bias, kind, eps, hidden);
  });
}

void CpuOps::norm(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) {
  norm_rows(static_cast<float*>(y), x, n, kind, eps, hidden, rows_);
}

void CpuOps::norm_logit_rows(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) {
  norm_rows(static_cast<float*>(y), x, n, kind, eps, hidden, batch_->samples());
}

void CpuOps::gate(void* y, const void* gate, const void* up, Activation act_fn, int n) {
  pool_.each(rows_, [&](int64_t t, int) {
    kernels_.gate(static_cast<float*>(y) + t * n, static_cast<const float*>(gate) + t * n, static_cast<const float*>(up) + t * n, n,
                  act_fn);
  });
}

bool CpuOps::keep_sampled() {
  auto kept = kept_rows(*batch_);
  if (!kept) return false;
  kept_ = std::move(kept->from);
  logit_row_ = std::move(kept->logit_row);
  rows_ = int(kept_.size());
  return true;
}

void CpuOps::take_kept(void* y, const void* x, size_t bytes) {
  for (size_t t = 0; t < kept_.size(); ++t) std::memcpy(static_cast<char*>(y) + t * bytes, static_cast<const char*>(x) + size_t(kept_[t]) * bytes, bytes);
}

void CpuOps::gather_logit_rows(float* y, const float* x, int hidden) {
  for (int s = 0; s < batch_->samples(); ++s)
    std::memcpy(y + int64_t(s) * hidden, x + int64_t(logit_row_[size_t(s)]) * hidden, size_t(hidden) * sizeof(float));
}

void CpuOps::sample(const float* logits, int vocab) {
  const int samples = batch_->samples();
  Sampled& out = sampled_[ticket_];
  out.token.resize(size_t(samples));
  out.logprob.resize(size_t(samples));
  if (std::any_of(batch_->sample.begin(), batch_->sample.end(), [](const SampleParams& p) { return p.top_tokens > 0; })) {
    out.top_token.resize(size_t(samples) * kTopTokens);
    out.top_logprob.resize(size_t(samples) * kTopTokens);
  }
  pool_.each(samples, [&](int64_t s, int thread) {
    const int position = batch_->position[batch_->logit_row[s]] + 1;
    RowChanges changes;
    if (!batch_->edits.empty()) {
      changes.edits = batch_->edits.data() + batch_->edit_begin[s];
      changes.count = batch_->edit_begin[s + 1] - batch_->edit_begin[s];
    }
    if (!batch_->mask_of.empty() && batch_->mask_of[s] >= 0) changes.mask = batch_->masks.data() + size_t(batch_->mask_of[s]) * size_t(mask_words(vocab));
    sample_row(kernels_, logits + s * vocab, vocab, batch_->sample[s], changes, position, sampling_[size_t(thread)], out.token[s], out.logprob[s],
               out.top_token.data() + s * kTopTokens, out.top_logprob.data() + s * kTopTokens);
  });
  for (int s = 0; s < samples; ++s) last_token_[batch_->slot[batch_->logit_row[s]]] = out.token[s];
}

}  // namespace codefuse::cpu
