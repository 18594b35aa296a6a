// The ops as kernels: which of them a step's rows go through.
#include <algorithm>

#include "cuda/device_ops.h"
#include "cuda/tiles.cuh"

namespace codefuse::cuda {

namespace {

LinearInput input(const void* x, const Linear& w) { return {x, w.weight.data, int(w.weight.cols), w.weight.host.format}; }

// of rows from `row` on
Epilogue from_row(Epilogue e, int row, int N, DType act) {
  e.y = static_cast<char*>(e.y) + int64_t(row) * N * int64_t(e.store == Store::act ? size_of(act) : 4);
  return e;
}

bool same_chunks(const Linear& a, const Linear& b) {
  const Format f = a.weight.host.format, g = b.weight.host.format;
  return f == g || (!is_quantized(f) && !is_quantized(g));
}

}  // namespace

// Room for the integers of decode rows of Ka and of Kb columns.
const SplitScratch& CudaOps::integers_for(int Ka, int Kb) {
  const size_t bytes = size_t((Ka + 127) / 128 + (Kb + 127) / 128) * kIntegersBytes;
  if (bytes > split_.integers_bytes) {  // but for plan()'s call at the first use, which is never recorded
    split_.integers_bytes = bytes;
    split_.integers = alloc_array<uint8_t>(bytes);
  }
  return split_;
}
const SplitScratch& CudaOps::scratch_for(const Linear& a, const Linear* b) {
  return is_quantized(a.weight.host.format) ? integers_for(int(a.weight.cols), b ? int(b->weight.cols) : 0) : split_;
}

// x with rows of whole chunks, 16-byte aligned (16-bit act).
const void* CudaOps::padded(const void* x, int K, int rows) {
  const int columns = int(steps_of(K)) * kChunkCols;
  if (columns == K && reinterpret_cast<uintptr_t>(x) % 16 == 0) return x;
  const size_t bytes = size_t(rows) * columns * 2;
  if (bytes > padded_bytes_) {  // for all rows at the first use, which is never recorded
    padded_bytes_ = size_t(std::max(rows, limits_.rows)) * columns * 2;
    padded_ = alloc(padded_bytes_);
  }
  pad_columns(s_, padded_, x, rows, K, columns);
  return padded_;
}

// Rows [first, decode) through the streaming kernel, the rest up to `rows` through the prefill kernel.
void CudaOps::linear_rows(const void* x, const Linear& w, const Epilogue& e, int first, int decode, int rows) {
  if (first >= rows) return;
  const int N = int(w.weight.rows), K = int(w.weight.cols);
  const auto epilogue_at = [&](int row) { return from_row(e, row, N, act_); };
  if (act_ == DType::f32) {
    const auto* in = static_cast<const float*>(x);
    const auto* weights = static_cast<const float*>(w.weight.data);
    if (decode > first) decode_linear_f32(s_, in + int64_t(first) * K, weights, decode - first, N, K, epilogue_at(first));
    if (rows > decode) prefill_linear_f32(s_, in + int64_t(decode) * K, weights, rows - decode, N, K, epilogue_at(decode));
    return;
  }
  const int columns = int(steps_of(K)) * kChunkCols;
  const auto* in = static_cast<const char*>(padded(x, K, rows));
  for (int r = first; r < decode; r += kDecodeRows)
    decode_linear(s_, act_, std::min(kDecodeRows, decode - r), {in + int64_t(r) * columns * 2, w.weight.data, columns, w.weight.host.format},
                  {N, epilogue_at(r)}, scratch_for(w, nullptr));
  if (rows == decode) return;
  const char* const from = in + int64_t(decode) * columns * 2;
  if (s_.wgmma)
    prefill_linear_wgmma(s_, act_, rows - decode, {from, w.weight.data, columns, w.weight.host.format}, {N, epilogue_at(decode)}, nullptr, nullptr, prefill_);
  else
    prefill_linear(s_, act_, from, is_quantized(w.weight.host.format) ? expanded(w.weight) : w.weight.data, rows - decode, N, columns, epilogue_at(decode));
}

// A quantized matrix in 16-bit tiles, until the next call.
const void* CudaOps::expanded(const Matrix& m) {
  const size_t bytes = tile_bytes(m.rows, m.cols);
  if (bytes > expanded_bytes_) {  // more than plan() foresaw: never recorded
    expanded_bytes_ = bytes;
    expanded_ = alloc(bytes);
  }
  expand(s_, act_, m.host.format, m.data, int(m.rows), int(m.cols), expanded_);
  return expanded_;
}

// Whether kernels of 16 bits can read x as it is.
bool CudaOps::whole(const void* x, const Linear& w) const {
  return act_ != DType::f32 && w.weight.cols % kChunkCols == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}
// Whether one launch can go through both.
bool CudaOps::together(const void* xa, const Linear& wa, const void* xb, const Linear& wb) const { return whole(xa, wa) && whole(xb, wb) && same_chunks(wa, wb); }

// The prefill rows of x.
LinearInput CudaOps::prefill_input(const void* x, const Linear& w) const {
  LinearInput in = input(x, w);
  in.x = static_cast<const char*>(x) + int64_t(decode_rows_) * in.K * 2;
  return in;
}

void CudaOps::linear_pair(void* ya, const void* xa, const Linear& wa, const Activation* fn_a, void* yb, const void* xb, const Linear& wb, const Activation* fn_b,
                          bool decode_b) {
  const Epilogue ea{Store::act, fn_a ? int(*fn_a) : -1, wa.bias, ya}, eb{Store::act, fn_b ? int(*fn_b) : -1, wb.bias, yb};
  const bool pair = together(xa, wa, xb, wb);
  int first = 0;
  if (decode_rows_ > 0 && pair) {
    // what comes next of ya is rope_attention(): it may begin when ya is stored
    ready_ = {};
    ready_of_ = nullptr;
    if (s_.dependent && ready_calls_ < config_.layers && own_sequences_ && rows_ == decode_rows_ &&
        rope_attention_fits(act_, shape(config_, config_.heads, config_.kv_heads))) {
      ready_ = {ready_counters_ + ready_calls_++ * kReadyStride, ready_count(int(wa.weight.rows))};
      ready_of_ = ya;
    }
    decode_linear_pair(s_, act_, decode_rows_, input(xa, wa), {int(wa.weight.rows), ea}, input(xb, wb), {int(wb.weight.rows), eb}, scratch_for(wa, &wb),
                       ready_);
    first = decode_rows_;
  }
  int last = rows_;  // of the rows one product at a time
  if (!decode_b && rows_ > decode_rows_ && s_.wgmma && pair && wa.weight.cols == wb.weight.cols) {
    const LinearInput ia = prefill_input(xa, wa), ib = prefill_input(xb, wb);
    const int Na = int(wa.weight.rows), Nb = int(wb.weight.rows);
    const LinearOutput oa{Na, from_row(ea, decode_rows_, Na, act_)}, ob{Nb, from_row(eb, decode_rows_, Nb, act_)};
    prefill_linear_wgmma(s_, act_, rows_ - decode_rows_, ia, oa, &ib, &ob, prefill_);
    last = decode_rows_;
  }
  linear_rows(xa, wa, ea, first, decode_rows_, last);
  linear_rows(xb, wb, eb, first, decode_rows_, decode_b ? decode_rows_ : last);
}

void CudaOps::linear_add_pair(float* y, const void* xa, const Linear& wa, const void* xb, const Linear& wb, bool add_bias) {
  const Epilogue ea{Store::add, -1, add_bias ? wa.bias : nullptr, y}, eb{Store::add, -1, add_bias ? wb.bias : nullptr, y};
  Epilogue sum = ea;
  sum.bias_b = eb.bias;
  const int N = int(wa.weight.rows);
  const bool pair = together(xa, wa, xb, wb);
  int first = 0, last = rows_;  // of the rows one product at a time
  if (decode_rows_ > 0 && pair) {
    decode_linear_sum(s_, act_, decode_rows_, input(xa, wa), input(xb, wb), {N, sum}, scratch_for(wa, &wb));
    first = decode_rows_;
  }
  if (rows_ > decode_rows_ && s_.wgmma && pair && wa.weight.host.format != Format::q8_row) {
    const LinearInput ia = prefill_input(xa, wa), ib = prefill_input(xb, wb);
    prefill_linear_wgmma(s_, act_, rows_ - decode_rows_, ia, {N, from_row(sum, decode_rows_, N, act_)}, &ib, nullptr, prefill_);
    last = decode_rows_;
  }
  linear_rows(xa, wa, ea, first, decode_rows_, last);
  linear_rows(xb, wb, eb, first, decode_rows_, last);
}

void CudaOps::norm_pair(void* ya, const Norm& na, void* yb, const Norm& nb, const float* x, NormKind kind, float eps, int hidden) {
  cuda::norm_pair(s_, act_, ya, na, yb, nb, x, kind, eps, rows_, hidden);
}

void CudaOps::embed(float* x, const Matrix& table) { cuda::embed(s_, act_, x, table.data, meta_, rows_, int(table.cols), int(table.rows)); }
void CudaOps::add_position(float* x, const Matrix& table) { cuda::add_position(s_, act_, x, table.data, meta_, rows_, int(table.cols)); }

void CudaOps::norm(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) {
  cuda::norm(s_, act_, y, x, n, kind, eps, rows_, hidden);
}

void CudaOps::linear(void* y, const void* x, const Linear& w, const Activation* act_fn, Rows rows) {
  linear_rows(x, w, Epilogue{Store::act, act_fn ? int(*act_fn) : -1, w.bias, y}, rows == Rows::prefill ? decode_rows_ : 0, decode_rows_,
              rows == Rows::decode ? decode_rows_ : rows_);
}

void CudaOps::linear_add(float* y, const void* x, const Linear& w, bool add_bias) {
  linear_rows(x, w, Epilogue{Store::add, -1, add_bias ? w.bias : nullptr, y}, 0, decode_rows_, rows_);
}

void CudaOps::gate(void* y, const void* gate, const void* up, Activation act_fn, int n) {
  cuda::gate(s_, act_, y, gate, up, act_fn, int64_t(rows_) * n);
}

AttentionShape CudaOps::shape(const ModelConfig& c, int heads, int kv_heads) const {
  return {heads, kv_heads, c.head_dim, c.position == PositionKind::rope ? c.rope_dim : 0, c.window};
}

void CudaOps::copy_pages(const std::vector<KvLayer>& layers, const ModelConfig& c, int kv_heads) {
  if (copies_) cuda::copy_pages(s_, act_, layers, meta_, copies_, kv_heads, c.head_dim);
}

void CudaOps::rope_store(void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) {
  cuda::rope_store(s_, act_, qkv, kv, angles_, meta_, rows_, shape(c, heads, kv_heads));
}

void CudaOps::attention(void* out, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) {
  if (decode_rows_) attention_rows(s_, act_, out, qkv, kv, meta_, 0, decode_rows_, shape(c, heads, kv_heads), attention_);
  prefill_attention(out, qkv, kv, c, heads, kv_heads);
}

void CudaOps::rope_attention(void* out, void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) {
  const AttentionShape a = shape(c, heads, kv_heads);
  const bool rotates = rows_ > decode_rows_ && attention_rotates(s_, act_, a);
  if (decode_rows_ ? !own_sequences_ || !rope_attention_fits(act_, a) : !rotates) return Ops::rope_attention(out, qkv, kv, c, heads, kv_heads);
  if (decode_rows_) {
    Ready ready;
    if (ready_of_ == qkv) std::swap(ready, ready_);
    rope_attention_rows(s_, act_, out, qkv, kv, angles_, meta_, decode_rows_, a, attention_, ready);
  }
  if (rows_ == decode_rows_) return;
  StepMeta rest = meta_;
  rest.slot += decode_rows_, rest.position += decode_rows_, rest.sequence += decode_rows_;
  cuda::rope_store(s_, act_, static_cast<char*>(qkv) + int64_t(decode_rows_) * (heads + 2 * kv_heads) * c.head_dim * 2, kv, angles_, rest, rows_ - decode_rows_, a, rotates);
  prefill_attention(out, qkv, kv, c, heads, kv_heads, rotates);
}

void CudaOps::prefill_attention(void* out, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads, bool rotate) {
  const AttentionShape a = shape(c, heads, kv_heads);
  if (rows_ == decode_rows_) return;
  if (act_ == DType::f32 || c.head_dim > 128)
    attention_rows(s_, act_, out, qkv, kv, meta_, decode_rows_, rows_ - decode_rows_, a, attention_);
  else
    attention_tiles(s_, act_, out, qkv, kv, meta_, {tiles_, rows_, limits_.pages, prefill_keys_, rotate ? angles_ : nullptr}, a);
}

void CudaOps::take_columns(void* y, const void* x, const int32_t* order, int64_t k) { cuda::take_columns(s_, act_, y, x, order, rows_, k); }

bool CudaOps::keep_sampled() {
  if (!kept_) return false;
  rows_ = int(kept_->from.size());
  sampled_only_ = true;
  return true;
}

void CudaOps::take_kept(void* y, const void* x, size_t bytes) {
  if (rows_) gather_rows(s_, y, x, meta_.kept, rows_, bytes);
}

void CudaOps::gather_logit_rows(float* y, const float* x, int hidden) {
  if (samples_) gather_rows(s_, y, x, sampled_only_ ? meta_.kept_logit_row : meta_.logit_row, samples_, size_t(hidden) * sizeof(float));
}

void CudaOps::norm_logit_rows(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) {
  if (samples_) cuda::norm(s_, act_, y, x, n, kind, eps, samples_, hidden);
}

void CudaOps::logits(float* y, const void* x, const Linear& head) {
  if (samples_) linear_rows(x, head, Epilogue{Store::f32, -1, head.bias, y}, 0, samples_, samples_);
}

void CudaOps::sample(const float* logits, int vocab) {
  if (samples_) cuda::sample(s_, logits, vocab, samples_, passes_, meta_, sampling_);
}

}  // namespace codefuse::cuda
