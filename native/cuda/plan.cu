// What a step needs on the device, allocated once: the batch's arrays and their pinned copies, angles, scratch of the kernels, results.
#include <algorithm>

#include "cuda/device_ops.h"
#include "cuda/tiles.cuh"
#include "ops/rope_table.h"

namespace codefuse::cuda {

namespace {

constexpr size_t kAttentionScratch = size_t(256) << 20;  // bytes at most; more rows take several launches

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

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

  if (s_.dependent && rope_attention_fits(act_, shape(c, c.heads, c.kv_heads))) s_.beside = 1024 + rope_attention_shared(shape(c, c.heads, c.kv_heads));
  if (act_ != DType::f32) {
    const size_t parts = 2 * size_t(s_.sms) * kDecodeRows * kGroupRows;
    split_.partial = alloc_array<float>(parts);
    check(cudaMemsetAsync(split_.partial, 0xff, parts * sizeof(float), s_.stream), "planning");
    ready_counters_ = alloc_array<int32_t>(size_t(c.layers) * kReadyStride);
  }
  if (quantized_ && act_ != DType::f32) integers_for(std::max(2 * c.hidden, c.heads * c.head_dim + c.intermediate), 0);
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
  attention_.arrived = alloc_array<int32_t>(size_t(attention_.rows) * c.heads);
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

}  // namespace codefuse::cuda
