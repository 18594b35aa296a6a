// What a step needs on the device, allocated once: the batch's arrays, pinned memory of them and of results, angles, scratch of the kernels.
#include <algorithm>
#include <type_traits>

#include "cuda/device_ops.h"
#include "cuda/tiles.cuh"
#include "ops/rope_table.h"

namespace codefuse::cuda {

namespace {

constexpr size_t kAttentionScratch = size_t(256) << 20;  // bytes at most; more rows take several launches

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

// Where the arrays of a step lie; those that a recorded step has depend on its rows alone. Bytes of all.
size_t CudaOps::lay_out(int rows, size_t table_words, size_t tiles) {
  size_t end = 0;
  const auto place = [&](auto& array, size_t n) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(meta_device_ + end);
    end += aligned(n * sizeof *array);
  };
  for (const int32_t** array : {&meta_.token, &meta_.slot, &meta_.position, &meta_.sequence, &meta_.settled}) place(*array, size_t(rows));
  place(meta_.results, 1);
  place(meta_.logit_row, kDecodeRows);
  place(meta_.sample, kDecodeRows);
  place(meta_.copies, kDecodeRows);
  place(meta_.table, table_words);
  place(meta_.tiles, tiles);
  place(meta_.kept, tiles ? 2 * kDecodeRows : 0);
  place(meta_.kept_logit_row, tiles ? kDecodeRows : 0);
  return end;
}

void CudaOps::plan(const ModelConfig& c, const Limits& limits, bool replay) {
  if (c.head_dim % 8 != 0 || c.head_dim < 8 || c.head_dim > 256)
    throw ValueError(cat("head_dim is ", c.head_dim, "; on CUDA it is a multiple of 8 from 8 to 256"));
  use();
  finish_loading();
  config_ = c;
  limits_ = limits;
  replay_ = replay;
  planned_ = true;

  const size_t meta_bytes = lay_out(limits.rows, size_t(limits.slots) * limits.max_pages(), size_t(limits.rows));  // at most
  meta_device_ = alloc_array<char>(meta_bytes);
  meta_.max_pages = limits.max_pages();
  meta_.last_token = alloc_array<int32_t>(size_t(limits.slots));
  // staging of edits and masks: edit_begin [samples + 1], mask_of [samples] | masks | edits
  const size_t words = kDecodeRows * size_t(mask_words(c.vocab)), edits = kDecodeRows * size_t(limits.edits(c.vocab));
  const size_t masks_at = aligned((kDecodeRows + 1) * 4) + aligned(kDecodeRows * 4), edits_at = masks_at + aligned(words * 4);
  const size_t edits_bytes = edits_at + aligned(edits * sizeof(LogitEdit));
  edits_device_ = alloc_array<char>(edits_bytes);
  meta_.edit_begin = reinterpret_cast<int32_t*>(edits_device_);
  meta_.mask_of = reinterpret_cast<int32_t*>(edits_device_ + aligned((kDecodeRows + 1) * 4));
  meta_.masks = reinterpret_cast<uint32_t*>(edits_device_ + masks_at);
  meta_.edits = reinterpret_cast<LogitEdit*>(edits_device_ + edits_at);
  // every device finds pinned memory at the address that the host has for it
  const auto pinned = [](auto& to, size_t bytes) {
    check(cudaHostAlloc(reinterpret_cast<void**>(&to), bytes, cudaHostAllocPortable | cudaHostAllocMapped), "pinned memory for steps");
  };
  for (int i = 0; i < 2; ++i) pinned(staging_[i], meta_bytes), pinned(edits_staging_[i], edits_bytes), pinned(results_[i], sizeof(StepResults));

  const RopeTable table = make_rope_table(c, limits.max_len);
  std::vector<float2> angles(table.cos.size());
  for (size_t i = 0; i < angles.size(); ++i) angles[i] = make_float2(table.cos[i], table.sin[i]);
  angles_ = alloc_array<float2>(angles.size());
  upload(angles_, angles.data(), angles.size() * sizeof(float2));

  if (const AttentionShape a = shape(c, c.heads, c.kv_heads); s_.dependent && rope_attention_fits(act_, a))
    s_.beside = rope_attention_shared(a, false), s_.beside_one = rope_attention_shared(a, true);
  if (act_ != DType::f32) {
    const size_t parts = 2 * size_t(s_.sms) * kDecodeRows * kGroupRows;
    split_.partial = alloc_array<float>(parts);
    check(cudaMemsetAsync(split_.partial, 0xff, parts * sizeof(float), s_.stream), "planning");
  }
  if (act_ != DType::f32 && s_.dependent) {
    ready_bytes_ = size_t(c.layers) * kReadyStride * sizeof(int32_t);
    ready_counters_ = static_cast<int32_t*>(alloc(ready_bytes_));
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
  sampling_.token = alloc_array<int32_t>(kDecodeRows);
  sampling_.top_part = alloc_array<unsigned long long>(kDecodeRows * kSampleParts * kTopTokens);
  sampling_.select = alloc_array<SampleSelect>(kDecodeRows);
  sampling_.count = alloc_array<uint32_t>(2 * kDecodeRows * kSampleBins);
  sampling_.mass = alloc_array<unsigned long long>(2 * kDecodeRows * kSampleBins);
  check(cudaStreamSynchronize(s_.stream), "planning");
}

}  // namespace codefuse::cuda
