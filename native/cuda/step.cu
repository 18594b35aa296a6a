// Steps: the batch goes up at once, the ops become kernels, of which those that sample write results into memory of the host, and an event says
// that they are there. A step of decode rows alone that samples every row is recorded as a CUDA graph for a number of rows (padded) and replayed.
// Around a replayed step a copy engine has no work, as long as the batch is small: it is microseconds until one begins and again until kernels go on.
#include <algorithm>
#include <cstring>

#include "cuda/device_ops.h"

namespace codefuse::cuda {

namespace {

int bucket_of(int rows) {
  for (int b : {1, 2, 4})
    if (rows <= b) return b;
  return (rows + 7) / 8 * 8;
}

constexpr int kLoadThreads = 256;
constexpr size_t kLoadMost = size_t(256) << 10;  // bytes; more come faster by a copy engine

// From pinned memory, 16 bytes a thread; clears `zeros` times 16 bytes. Nothing may start before it has ended, as attention reads where its pages
// are before it waits for its predecessor: it launches no dependents itself, and what it is for comes behind it as a graph.
__global__ void __launch_bounds__(kLoadThreads) load_pinned(uint4* to, const uint4* from, int units, uint4* zero, int zeros) {
  const int i = int(blockIdx.x) * kLoadThreads + int(threadIdx.x);
  uint4 v = make_uint4(0, 0, 0, 0);
  if (i < units) v = __ldcv(from + i);  // from the host, not from a cache
  grid_wait();
  if (i < units) to[i] = v;
  for (int z = i; z < zeros; z += int(gridDim.x) * kLoadThreads) zero[z] = make_uint4(0, 0, 0, 0);
}

}  // namespace

// Pinned memory to the device by a kernel, before a replayed step; `bytes` are rounded up to a multiple of 16, which zero_bytes are.
void CudaOps::load(void* to, const void* from, size_t bytes, void* zero, size_t zero_bytes) {
  const int units = int((bytes + 15) / 16);
  launch(s_, load_pinned, (units + kLoadThreads - 1) / kLoadThreads, kLoadThreads, 0, static_cast<uint4*>(to), static_cast<const uint4*>(from), units,
         static_cast<uint4*>(zero), int(zero_bytes / 16));
}

// Before the first kernel of a step and not between: what waits for a counter may start several kernels early, but not before this has ended.
void CudaOps::clear_ready() {
  if (ready_counters_) check(cudaMemsetAsync(ready_counters_, 0, ready_bytes_, s_.stream), "a step");
}

// Writes the batch to the staging buffer, rows padded, and sends it; clears what the step counts in.
void CudaOps::fill_meta(const Batch& b, int padded, int ticket, bool replayed) {
  check(cudaEventSynchronize(done_[ticket]), "an earlier step failed");
  tiles_ = 0;
  for (const Chunk& c : b.chunks) tiles_ += (c.count + kTileRows - 1) / kTileRows;
  const size_t bytes = lay_out(padded, b.table.size(), size_t(tiles_));
  char* const base = staging_[ticket];
  auto host = [&](const void* device) { return base + (static_cast<const char*>(device) - meta_device_); };
  auto* token = reinterpret_cast<int32_t*>(host(meta_.token));
  auto* slot = reinterpret_cast<int32_t*>(host(meta_.slot));
  auto* position = reinterpret_cast<int32_t*>(host(meta_.position));
  auto* sequence = reinterpret_cast<int32_t*>(host(meta_.sequence));
  auto* settled = reinterpret_cast<int32_t*>(host(meta_.settled));
  auto* logit_row = reinterpret_cast<int32_t*>(host(meta_.logit_row));
  auto* sample = reinterpret_cast<SampleParams*>(host(meta_.sample));
  *reinterpret_cast<StepResults**>(host(meta_.results)) = results_[ticket];
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
  if (kept_) {
    std::copy(kept_->from.begin(), kept_->from.end(), reinterpret_cast<int32_t*>(host(meta_.kept)));
    std::copy(kept_->logit_row.begin(), kept_->logit_row.end(), reinterpret_cast<int32_t*>(host(meta_.kept_logit_row)));
  }
  std::memcpy(host(meta_.table), b.table.data(), b.table.size() * 4);
  prefill_keys_ = 0;
  auto* tile = reinterpret_cast<int4*>(host(meta_.tiles));
  for (const Chunk& c : b.chunks) {
    for (int i = 0; i < c.count; i += kTileRows)
      *tile++ = make_int4(c.row + i, std::min(kTileRows, c.count - i), c.position + i, table_of[size_t(c.slot)]);
    prefill_keys_ += c.position + c.count;
  }
  if (replayed && bytes <= kLoadMost) {
    load(meta_device_, base, bytes, ready_counters_, ready_bytes_);
  } else {
    check(cudaMemcpyAsync(meta_device_, base, bytes, cudaMemcpyHostToDevice, s_.stream), "uploading the batch");
    clear_ready();
  }
  if (passes_.edited) fill_edits(b, std::max(b.samples(), padded > b.rows() ? padded : 0), ticket, replayed);
}

// Likewise the edits and masks; samples that only pad a recorded step have none.
void CudaOps::fill_edits(const Batch& b, int padded, int ticket, bool replayed) {
  char* const base = edits_staging_[ticket];
  auto send = [&](const void* device, size_t bytes) {
    const size_t at = size_t(static_cast<const char*>(device) - edits_device_);
    if (replayed && bytes <= kLoadMost) return load(edits_device_ + at, base + at, bytes);
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

// What the ops of the step go by.
void CudaOps::begin(const Batch& batch) {
  check_batch(batch, limits_, config_.vocab);
  use();
  rows_ = batch.rows();
  decode_rows_ = batch.decode_rows;
  samples_ = batch.samples();
  kept_ = kept_rows(batch);
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
}

void CudaOps::step(const Batch& batch, int ticket, const std::function<void()>& body) {
  begin(batch);
  bool recorded = replay_ && copies_ == 0 && own_sequences_ && decode_rows_ == rows_ && samples_ == rows_;
  for (int i = 0; i < samples_ && recorded; ++i) recorded = batch.logit_row[i] == i;
  const int padded = std::min({bucket_of(rows_), limits_.rows, limits_.slots});
  recorded = recorded && padded >= rows_;
  Recording* const recording = recorded ? &recordings_[{padded, passes_}] : nullptr;
  const bool replayed = recording && recording->seen++ > 0;  // the first step of a kind runs as it is, which also loads its kernels
  fill_meta(batch, recorded ? padded : rows_, ticket, replayed);
  Turns::Turn turn(*turns_, s_.stream, done_[ticket]);  // the batch is on its way before it
  if (recorded) rows_ = decode_rows_ = samples_ = padded;
  if (replayed) {
    if (!recording->graph) recording->graph = record(body);
    check(cudaGraphLaunch(recording->graph, s_.stream), "replaying a step");
  } else {
    run(body);
  }
  expected_[ticket] = batch.samples();
  expected_top_[ticket] = passes_.top;
  turn.end();
}

void CudaOps::run(const std::function<void()>& body) {
  ready_ = {};
  ready_calls_ = 0;
  const int rows = rows_;
  body();
  rows_ = rows;  // keep_sampled() was for this run
  sampled_only_ = false;
}

cudaGraphExec_t CudaOps::record(const std::function<void()>& body) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(s_.stream, cudaStreamCaptureModeThreadLocal), "recording a step");
  try {
    run(body);
  } catch (...) {
    cudaStreamEndCapture(s_.stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(s_.stream, &graph), "recording a step");
  cudaGraphExec_t out = nullptr;
  const cudaError_t e = cudaGraphInstantiate(&out, graph, 0);
  cudaGraphDestroy(graph);
  check(e, "recording a step");
  return out;
}

std::vector<double> CudaOps::time(const Batch& batch, int repeats, const std::function<void()>& body) {
  begin(batch);
  fill_meta(batch, rows_, 0, false);
  Turns::Turn turn(*turns_, s_.stream, done_[0]);
  run(body);
  const auto again = [&] {
    clear_ready();
    body();
  };
  const std::unique_ptr<CUgraphExec_st, decltype(&cudaGraphExecDestroy)> graph(record(again), cudaGraphExecDestroy);
  std::vector<std::unique_ptr<CUevent_st, decltype(&cudaEventDestroy)>> events;
  for (int i = 0; i <= repeats; ++i) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "event");
    events.emplace_back(event, cudaEventDestroy);
  }
  check(cudaGraphLaunch(graph.get(), s_.stream), "replaying a step");
  for (int i = 0; i <= repeats; ++i) {
    check(cudaEventRecord(events[size_t(i)].get(), s_.stream), "event");
    if (i < repeats) check(cudaGraphLaunch(graph.get(), s_.stream), "replaying a step");
  }
  turn.end();
  check(cudaStreamSynchronize(s_.stream), "timing");
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events[size_t(i)].get(), events[size_t(i) + 1].get()), "timing");
    seconds.push_back(double(ms) * 1e-3);
  }
  return seconds;
}

Sampled CudaOps::collect(int ticket) {
  use();
  check(cudaEventSynchronize(done_[ticket]), "a step failed");
  const StepResults& results = *results_[ticket];  // what kernels before an event wrote to the host is there when the event is
  Sampled out;
  const int n = expected_[ticket];
  out.token.assign(results.token, results.token + n);
  out.logprob.assign(results.logprob, results.logprob + n);
  if (expected_top_[ticket] && n > 0) {
    out.top_token.assign(results.top_token, results.top_token + n * kTopTokens);
    out.top_logprob.assign(results.top_logprob, results.top_logprob + n * kTopTokens);
  }
  return out;
}

}  // namespace codefuse::cuda
