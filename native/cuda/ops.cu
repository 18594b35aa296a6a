// Steps: the batch goes up in one copy, the ops become kernels, results come down behind an event. A step of decode rows alone
// that samples every row is recorded as a CUDA graph for a number of rows (padded) and replayed.
#include <algorithm>
#include <cstring>

#include "cuda/device_ops.h"
#include "cuda/tiles.cuh"
#include "ops/rope_table.h"

namespace codefuse::cuda {

namespace {

constexpr int kReadyStride = 32;  // int32 from one counter to the next: a cache line each
constexpr size_t kAttentionScratch = size_t(256) << 20;  // bytes at most; more rows take several launches

constexpr size_t kTopBytes = size_t(kDecodeRows) * kTopTokens * 4;
constexpr size_t kResultBytes = kDecodeRows * 8 + 2 * kTopBytes;

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

DecodeInput input(const void* x, const Linear& w) { return {x, w.weight.data, int(w.weight.cols), w.weight.host.format}; }

bool same_chunks(const Linear& a, const Linear& b) {
  const Format f = a.weight.host.format, g = b.weight.host.format;
  return f == g || (!is_quantized(f) && !is_quantized(g));
}

int bucket_of(int rows) {
  for (int b : {1, 2, 4})
    if (rows <= b) return b;
  return (rows + 7) / 8 * 8;
}

}  // namespace

void CudaOps::plan(const ModelConfig& c, const Limits& limits, bool replay) {
  if (c.head_dim % 8 != 0 || c.head_dim < 8 || c.head_dim > 256)
    throw ValueError(cat("head_dim is ", c.head_dim, "; on CUDA it is a multiple of 8 from 8 to 256"));
  use();
  finish_loading();
  config_ = c;
  limits_ = limits;
  replay_ = replay;
  planned_ = true;

  // staging: token, slot, position, sequence, settled [rows] | logit_row, sample [samples], copies | table | tiles
  const size_t rows = aligned(size_t(limits.rows) * 4);
  size_t at = 5 * rows;
  const size_t logit_row_at = at, sample_at = at += aligned(kDecodeRows * 4), copies_at = at += aligned(kDecodeRows * sizeof(SampleParams));
  table_at_ = at += aligned(kDecodeRows * sizeof(PageCopy));
  tiles_at_ = at += aligned(size_t(limits.slots) * limits.max_pages() * 4);
  meta_bytes_ = at += size_t(limits.rows) * sizeof(int4);
  meta_device_ = alloc_array<char>(meta_bytes_);
  char* const d = meta_device_;
  meta_.token = reinterpret_cast<int32_t*>(d);
  meta_.slot = reinterpret_cast<int32_t*>(d + rows);
  meta_.position = reinterpret_cast<int32_t*>(d + 2 * rows);
  meta_.sequence = reinterpret_cast<int32_t*>(d + 3 * rows);
  meta_.settled = reinterpret_cast<int32_t*>(d + 4 * rows);
  meta_.logit_row = reinterpret_cast<int32_t*>(d + logit_row_at);
  meta_.sample = reinterpret_cast<SampleParams*>(d + sample_at);
  meta_.copies = reinterpret_cast<PageCopy*>(d + copies_at);
  meta_.table = reinterpret_cast<int32_t*>(d + table_at_);
  meta_.tiles = reinterpret_cast<int4*>(d + tiles_at_);
  meta_.max_pages = limits.max_pages();
  meta_.last_token = alloc_array<int32_t>(size_t(limits.slots));
  // staging of edits and masks: edit_begin [samples + 1], mask_of [samples] | masks | edits
  const size_t words = kDecodeRows * size_t(mask_words(c.vocab)), edits = kDecodeRows * size_t(limits.edits(c.vocab));
  const size_t masks_at = aligned((kDecodeRows + 1) * 4) + aligned(kDecodeRows * 4), edits_at = masks_at + aligned(words * 4);
  edits_bytes_ = edits_at + edits * sizeof(LogitEdit);
  edits_device_ = alloc_array<char>(edits_bytes_);
  meta_.edit_begin = reinterpret_cast<int32_t*>(edits_device_);
  meta_.mask_of = reinterpret_cast<int32_t*>(edits_device_ + aligned((kDecodeRows + 1) * 4));
  meta_.masks = reinterpret_cast<uint32_t*>(edits_device_ + masks_at);
  meta_.edits = reinterpret_cast<LogitEdit*>(edits_device_ + edits_at);
  for (int i = 0; i < 2; ++i) {
    check(cudaMallocHost(reinterpret_cast<void**>(&staging_[i]), meta_bytes_), "pinned memory for the batch");
    check(cudaMallocHost(reinterpret_cast<void**>(&edits_staging_[i]), edits_bytes_), "pinned memory for the batch");
    check(cudaMallocHost(reinterpret_cast<void**>(&results_[i]), kResultBytes), "pinned memory for results");
  }

  const RopeTable table = make_rope_table(c, limits.max_len);
  std::vector<float2> angles(table.cos.size());
  for (size_t i = 0; i < angles.size(); ++i) angles[i] = make_float2(table.cos[i], table.sin[i]);
  angles_ = alloc_array<float2>(angles.size());
  upload(angles_, angles.data(), angles.size() * sizeof(float2));

  if (act_ != DType::f32) {
    const size_t parts = 2 * size_t(s_.sms) * kDecodeRows * kGroupRows;
    split_.partial = alloc_array<float>(parts);
    check(cudaMemsetAsync(split_.partial, 0xff, parts * sizeof(float), s_.stream), "planning");
    ready_counters_ = alloc_array<int32_t>(size_t(c.layers) * kReadyStride);
  }
  if (quantized_ && act_ != DType::f32 && !s_.wgmma && replay) {
    expanded_bytes_ = std::max({tile_bytes(c.qkv_rows(), c.hidden), tile_bytes(c.intermediate, c.hidden), tile_bytes(c.hidden, c.intermediate),
                                tile_bytes(c.hidden, int64_t(c.heads) * c.head_dim)});
    expanded_ = alloc(expanded_bytes_);
  }
  if (s_.wgmma && act_ != DType::f32) {
    prefill_.partial = alloc_array<float>(size_t(s_.sms) * kPrefillSlot);
    prefill_.flag = alloc_array<int32_t>(size_t(s_.sms) * 8);
  }
  attention_.splits = (limits.max_len + kSplitTokens - 1) / kSplitTokens;
  const size_t row_floats = size_t(c.heads) * attention_.splits * (c.head_dim + 2);
  attention_.rows = int(std::max<size_t>(1, std::min<size_t>(std::min(kDecodeRows, limits.rows), kAttentionScratch / (row_floats * 4))));
  attention_.partial = alloc_array<float>(row_floats * attention_.rows);
  attention_.arrived = alloc_array<int32_t>(size_t(attention_.rows) * c.kv_heads);
  sampling_.best = alloc_array<unsigned long long>(kDecodeRows * kSampleParts);
  sampling_.sum = alloc_array<float>(kDecodeRows * kSampleParts);
  sampling_.arrived = alloc_array<int32_t>(kDecodeRows);
  sampling_.top = alloc_array<float2>(kDecodeRows);
  sampling_.edited = alloc_array<float>(kDecodeRows * size_t(c.vocab));
  sampling_.most = alloc_array<float>(kDecodeRows);
  // results: token, logprob [kDecodeRows] | top_token, top_logprob [kDecodeRows, kTopTokens]
  sampling_.token = reinterpret_cast<int32_t*>(alloc_array<char>(kResultBytes));
  sampling_.logprob = reinterpret_cast<float*>(sampling_.token + kDecodeRows);
  sampling_.top_token = sampling_.token + 2 * kDecodeRows;
  sampling_.top_logprob = reinterpret_cast<float*>(sampling_.top_token + kDecodeRows * kTopTokens);
  sampling_.top_part = alloc_array<unsigned long long>(kDecodeRows * kSampleParts * kTopTokens);
  sampling_.select = alloc_array<SampleSelect>(kDecodeRows);
  sampling_.count = alloc_array<uint32_t>(2 * kDecodeRows * kSampleBins);
  sampling_.mass = alloc_array<unsigned long long>(2 * kDecodeRows * kSampleBins);
  check(cudaStreamSynchronize(s_.stream), "planning");
}

// Writes the batch to the staging buffer, rows padded, and sends it.
void CudaOps::fill_meta(const Batch& b, int padded, int ticket) {
  check(cudaEventSynchronize(uploaded_[ticket]), "uploading the batch");
  char* const base = staging_[ticket];
  auto host = [&](const void* device) { return base + (static_cast<const char*>(device) - meta_device_); };
  auto* token = reinterpret_cast<int32_t*>(host(meta_.token));
  auto* slot = reinterpret_cast<int32_t*>(host(meta_.slot));
  auto* position = reinterpret_cast<int32_t*>(host(meta_.position));
  auto* sequence = reinterpret_cast<int32_t*>(host(meta_.sequence));
  auto* settled = reinterpret_cast<int32_t*>(host(meta_.settled));
  auto* logit_row = reinterpret_cast<int32_t*>(host(meta_.logit_row));
  auto* sample = reinterpret_cast<SampleParams*>(host(meta_.sample));
  std::vector<int> table_of(size_t(limits_.slots), 0);
  for (size_t i = 0; i < b.table_slot.size(); ++i) table_of[size_t(b.table_slot[i])] = int(i);
  std::vector<int> stored(size_t(limits_.slots), INT32_MAX);  // the first token of each sequence that this step stores
  for (int t = 0; t < b.rows(); ++t) stored[size_t(b.slot[t])] = std::min(stored[size_t(b.slot[t])], b.position[t]);
  for (int t = 0; t < b.rows(); ++t) settled[t] = stored[size_t(b.slot[t])];
  if (!b.copies.empty())  // what is copied lies in the page of the first token stored
    for (int t = 0; t < b.rows(); ++t) settled[t] -= settled[t] % kPageTokens;
  std::copy(b.copies.begin(), b.copies.end(), reinterpret_cast<PageCopy*>(host(meta_.copies)));
  for (int t = 0; t < b.rows(); ++t) token[t] = b.token[t], slot[t] = b.slot[t], position[t] = b.position[t], sequence[t] = table_of[b.slot[t]];
  for (int t = b.rows(); t < padded; ++t) token[t] = 0, slot[t] = -1, position[t] = 0, sequence[t] = 0, settled[t] = 0;
  for (int i = 0; i < b.samples(); ++i) logit_row[i] = b.logit_row[i], sample[i] = b.sample[i];
  if (padded > b.rows())
    for (int i = b.samples(); i < padded; ++i) logit_row[i] = i, sample[i] = SampleParams{};
  std::memcpy(host(meta_.table), b.table.data(), b.table.size() * 4);
  size_t bytes = table_at_ + b.table.size() * 4;
  tiles_ = 0;
  auto* tiles = reinterpret_cast<int4*>(host(meta_.tiles));
  for (const Chunk& c : b.chunks)
    for (int i = 0; i < c.count; i += kTileRows)
      tiles[tiles_++] = make_int4(c.row + i, std::min(kTileRows, c.count - i), c.position + i, table_of[size_t(c.slot)]);
  if (tiles_) bytes = tiles_at_ + size_t(tiles_) * sizeof(int4);
  check(cudaMemcpyAsync(meta_device_, base, bytes, cudaMemcpyHostToDevice, s_.stream), "uploading the batch");
  if (passes_.edited) fill_edits(b, std::max(b.samples(), padded > b.rows() ? padded : 0), ticket);
  check(cudaEventRecord(uploaded_[ticket], s_.stream), "uploading the batch");
}

// Likewise the edits and masks; samples that only pad a recorded step have none.
void CudaOps::fill_edits(const Batch& b, int padded, int ticket) {
  char* const base = edits_staging_[ticket];
  auto send = [&](const void* device, size_t bytes) {
    const size_t at = size_t(static_cast<const char*>(device) - edits_device_);
    check(cudaMemcpyAsync(edits_device_ + at, base + at, bytes, cudaMemcpyHostToDevice, s_.stream), "uploading edits");
  };
  auto host = [&](const void* device) { return base + (static_cast<const char*>(device) - edits_device_); };
  auto* edit_begin = reinterpret_cast<int32_t*>(host(meta_.edit_begin));
  auto* mask_of = reinterpret_cast<int32_t*>(host(meta_.mask_of));
  for (int s = 0; s <= padded; ++s) edit_begin[s] = b.edits.empty() ? 0 : b.edit_begin[size_t(std::min(s, b.samples()))];
  for (int s = 0; s < padded; ++s) mask_of[s] = b.mask_of.empty() || s >= b.samples() ? -1 : b.mask_of[size_t(s)];
  std::memcpy(host(meta_.masks), b.masks.data(), b.masks.size() * 4);
  std::memcpy(host(meta_.edits), b.edits.data(), b.edits.size() * sizeof(LogitEdit));
  send(edits_device_, size_t(reinterpret_cast<const char*>(meta_.masks) - edits_device_) + b.masks.size() * 4);
  if (!b.edits.empty()) send(meta_.edits, b.edits.size() * sizeof(LogitEdit));
}

void CudaOps::step(const Batch& batch, int ticket, const std::function<void()>& body) {
  check_batch(batch, limits_, config_.vocab);
  use();
  rows_ = batch.rows();
  decode_rows_ = batch.decode_rows;
  samples_ = batch.samples();
  copies_ = int(batch.copies.size());
  passes_ = {};
  passes_.edited = !batch.edits.empty() || !batch.masks.empty();
  for (const SampleParams& p : batch.sample) {
    passes_.kind = std::max(passes_.kind, sampling_of(p));
    passes_.top = passes_.top || p.top_tokens > 0;
  }
  own_sequences_ = true;
  std::vector<char> seen(size_t(limits_.slots), 0);
  for (int t = 0; t < rows_; ++t) {
    char& s = seen[size_t(batch.slot[t])];
    if (s && (t < decode_rows_ || s == 1)) own_sequences_ = false;
    s = t < decode_rows_ ? 1 : 2;
  }
  bool record = replay_ && copies_ == 0 && own_sequences_ && decode_rows_ == rows_ && samples_ == rows_;
  for (int i = 0; i < samples_ && record; ++i) record = batch.logit_row[i] == i;
  const int padded = std::min({bucket_of(rows_), limits_.rows, limits_.slots});
  record = record && padded >= rows_;
  fill_meta(batch, record ? padded : rows_, ticket);
  ready_ = {};
  ready_calls_ = 0;
  if (record) {
    rows_ = decode_rows_ = samples_ = padded;
    run_recorded(padded, body);
  } else {
    body();
  }
  expected_[ticket] = batch.samples();
  expected_top_[ticket] = passes_.top;
  if (batch.samples())
    check(cudaMemcpyAsync(results_[ticket], sampling_.token, passes_.top ? kResultBytes : kDecodeRows * 8, cudaMemcpyDeviceToHost, s_.stream), "results");
  check(cudaEventRecord(done_[ticket], s_.stream), "results");
}

// The first step of a kind runs as it is, which also loads its kernels; the second is recorded.
void CudaOps::run_recorded(int rows, const std::function<void()>& body) {
  Recording& r = recordings_[{rows, passes_}];
  if (r.seen++ == 0) return body();
  if (!r.graph) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(s_.stream, cudaStreamCaptureModeThreadLocal), "recording a step");
    try {
      body();
    } catch (...) {
      cudaStreamEndCapture(s_.stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(s_.stream, &graph), "recording a step");
    const cudaError_t e = cudaGraphInstantiate(&r.graph, graph, 0);
    cudaGraphDestroy(graph);
    check(e, "recording a step");
  }
  check(cudaGraphLaunch(r.graph, s_.stream), "replaying a step");
}

Sampled CudaOps::collect(int ticket) {
  use();
  check(cudaEventSynchronize(done_[ticket]), "a step failed");
  Sampled out;
  const int n = expected_[ticket];
  const auto* token = reinterpret_cast<const int32_t*>(results_[ticket]);
  const auto* logprob = reinterpret_cast<const float*>(results_[ticket] + kDecodeRows * 4);
  out.token.assign(token, token + n);
  out.logprob.assign(logprob, logprob + n);
  if (expected_top_[ticket] && n > 0) {
    const auto* top_token = reinterpret_cast<const int32_t*>(results_[ticket] + kDecodeRows * 8);
    const auto* top_logprob = reinterpret_cast<const float*>(results_[ticket] + kDecodeRows * 8 + kTopBytes);
    out.top_token.assign(top_token, top_token + n * kTopTokens);
    out.top_logprob.assign(top_logprob, top_logprob + n * kTopTokens);
  }
  return out;
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
  auto epilogue_at = [&](int row) {
    Epilogue at = e;
    at.y = static_cast<char*>(e.y) + int64_t(row) * N * int64_t(e.store == Store::act ? size_of(act_) : 4);
    return at;
  };
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
                  {N, epilogue_at(r)}, split_);
  if (rows == decode) return;
  const char* const from = in + int64_t(decode) * columns * 2;
  if (!is_quantized(w.weight.host.format))
    prefill_linear(s_, act_, from, w.weight.data, rows - decode, N, columns, epilogue_at(decode), prefill_);
  else if (s_.wgmma)
    prefill_linear_quantized(s_, act_, w.weight.host.format, from, w.weight.data, rows - decode, N, columns, prefill_, epilogue_at(decode));
  else
    prefill_linear(s_, act_, from, expanded(w.weight), rows - decode, N, columns, epilogue_at(decode), prefill_);
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

// Decode rows whose x the streaming kernel can read as it is.
bool CudaOps::streams(const void* x, const Linear& w) const {
  return act_ != DType::f32 && decode_rows_ > 0 && decode_rows_ <= kDecodeRows && w.weight.cols % kChunkCols == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

void CudaOps::linear_pair(void* ya, const void* xa, const Linear& wa, const Activation* fn_a, void* yb, const void* xb, const Linear& wb, const Activation* fn_b) {
  const Epilogue ea{Store::act, fn_a ? int(*fn_a) : -1, wa.bias, ya}, eb{Store::act, fn_b ? int(*fn_b) : -1, wb.bias, yb};
  int first = 0;
  if (streams(xa, wa) && streams(xb, wb) && same_chunks(wa, wb)) {
    // what comes next of ya is rope_attention(): it may begin when ya is stored
    Stream stream = s_;
    ready_ = {};
    if (s_.dependent && ready_calls_ < config_.layers && own_sequences_ && rows_ == decode_rows_ &&
        rope_attention_fits(act_, shape(config_, config_.heads, config_.kv_heads))) {
      if (ready_calls_ == 0) {  // a waiting kernel may start several kernels early, but not before this
        check(cudaMemsetAsync(ready_counters_, 0, size_t(config_.layers) * kReadyStride * sizeof(int32_t), s_.stream), "a step");
        stream.dependent = false;
      }
      ready_ = {ready_counters_ + ready_calls_++ * kReadyStride, ready_count(int(wa.weight.rows))};
      ready_of_ = ya;
    }
    decode_linear_pair(stream, act_, decode_rows_, input(xa, wa), {int(wa.weight.rows), ea}, input(xb, wb), {int(wb.weight.rows), eb}, split_, ready_);
    first = decode_rows_;
  }
  linear_rows(xa, wa, ea, first, decode_rows_, rows_);
  linear_rows(xb, wb, eb, first, decode_rows_, rows_);
}

void CudaOps::linear_add_pair(float* y, const void* xa, const Linear& wa, const void* xb, const Linear& wb, bool add_bias) {
  const Epilogue ea{Store::add, -1, add_bias ? wa.bias : nullptr, y}, eb{Store::add, -1, add_bias ? wb.bias : nullptr, y};
  int first = 0;
  if (streams(xa, wa) && streams(xb, wb) && same_chunks(wa, wb)) {
    Epilogue sum = ea;
    sum.bias_b = eb.bias;
    decode_linear_sum(s_, act_, decode_rows_, input(xa, wa), input(xb, wb),
                      {int(wa.weight.rows), sum}, split_);
    first = decode_rows_;
  }
  linear_rows(xa, wa, ea, first, decode_rows_, rows_);
  linear_rows(xb, wb, eb, first, decode_rows_, rows_);
}

void CudaOps::norm_pair(void* ya, const Norm& na, void* yb, const Norm& nb, const float* x, NormKind kind, float eps, int hidden) {
  cuda::norm_pair(s_, act_, ya, na, yb, nb, x, kind, eps, rows_, hidden);
}

void CudaOps::embed(float* x, const Matrix& table) { cuda::embed(s_, act_, x, table.data, meta_, rows_, int(table.cols), int(table.rows)); }
void CudaOps::add_position(float* x, const Matrix& table) { cuda::add_position(s_, act_, x, table.data, meta_, rows_, int(table.cols)); }

void CudaOps::norm(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) {
  cuda::norm(s_, act_, y, x, n, kind, eps, rows_, hidden);
}

void CudaOps::linear(void* y, const void* x, const Linear& w, const Activation* act_fn) {
  linear_rows(x, w, Epilogue{Store::act, act_fn ? int(*act_fn) : -1, w.bias, y}, 0, decode_rows_, rows_);
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
  if (!decode_rows_ || !own_sequences_ || !rope_attention_fits(act_, a)) return Ops::rope_attention(out, qkv, kv, c, heads, kv_heads);
  Ready ready;
  if (ready_of_ == qkv) std::swap(ready, ready_);
  rope_attention_rows(s_, act_, out, qkv, kv, angles_, meta_, decode_rows_, a, attention_, ready);
  if (rows_ == decode_rows_) return;
  StepMeta rest = meta_;
  rest.slot += decode_rows_, rest.position += decode_rows_, rest.sequence += decode_rows_;
  cuda::rope_store(s_, act_, static_cast<char*>(qkv) + int64_t(decode_rows_) * (heads + 2 * kv_heads) * c.head_dim * 2, kv, angles_, rest, rows_ - decode_rows_, a);
  prefill_attention(out, qkv, kv, c, heads, kv_heads);
}

void CudaOps::prefill_attention(void* out, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) {
  const AttentionShape a = shape(c, heads, kv_heads);
  if (rows_ == decode_rows_) return;
  if (act_ == DType::f32 || c.head_dim > 128)
    attention_rows(s_, act_, out, qkv, kv, meta_, decode_rows_, rows_ - decode_rows_, a, attention_);
  else
    attention_tiles(s_, act_, out, qkv, kv, meta_, tiles_, a);
}

void CudaOps::zero(float* y, int64_t n) { cuda::zero(s_, y, rows_ * n); }
void CudaOps::add(float* y, const float* x, int64_t n) { cuda::add(s_, y, x, rows_ * n); }

void CudaOps::take_columns(void* y, const void* x, const int32_t* order, int64_t k) { cuda::take_columns(s_, act_, y, x, order, rows_, k); }

void CudaOps::gather_logit_rows(float* y, const float* x, int hidden) {
  if (samples_) gather_rows(s_, y, x, meta_.logit_row, samples_, hidden);
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
