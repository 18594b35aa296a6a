// Launchers of the kernels, one group per .cu file. Pointers are device memory; T = rows.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "core/config.h"
#include "core/dtype.h"
#include "cuda/device.cuh"
#include "formats/format.h"
#include "ops/batch.h"
#include "ops/ops.h"

namespace codefuse::cuda {

// What a step samples; in pinned memory of the host, where the kernels that choose write it.
struct StepResults {
  int32_t token[kDecodeRows];
  float logprob[kDecodeRows];
  int32_t top_token[kDecodeRows * kTopTokens];
  float top_logprob[kDecodeRows * kTopTokens];
};

// The current step on the device. A row with slot < 0 pads a recorded step and is skipped.
struct StepMeta {
  const int32_t* token = nullptr;     // [T]
  const int32_t* slot = nullptr;      // [T]
  const int32_t* position = nullptr;  // [T]
  const int32_t* sequence = nullptr;  // [T] row of table
  const int32_t* table = nullptr;     // [n, max_pages]
  int32_t* last_token = nullptr;      // [slots]
  const int32_t* logit_row = nullptr;       // [S]
  const int32_t *kept = nullptr, *kept_logit_row = nullptr;  // KeptRows, in a step with prefill rows
  const SampleParams* sample = nullptr;     // [S]
  const int32_t* edit_begin = nullptr;      // [S + 1]; this and the next three only in a step with edits or masks
  const int32_t* mask_of = nullptr;         // [S]
  const uint32_t* masks = nullptr;          // [n, mask_words]
  const LogitEdit* edits = nullptr;
  const int4* tiles = nullptr;        // runs of at most kTileRows prefill rows: first row, rows, position, row of table
  const int32_t* settled = nullptr;   // [T] tokens of the row's sequence whose K and V earlier steps stored; nullptr: 0
  const PageCopy* copies = nullptr;
  StepResults* const* results = nullptr;  // [1] where they go: a recorded step has fixed arguments, but either ticket
  int max_pages = 0;
};
constexpr int kTileRows = 128;

enum class Store { act, add, f32 };  // y = act_fn(z) in the compute dtype | y += z, float32 | y = z, float32
struct Epilogue {
  Store store = Store::act;
  int activation = -1;          // Activation, or -1: none
  const float* bias = nullptr;  // [N]
  void* y = nullptr;            // [T, N]
  const float* bias_b = nullptr;  // [N], added too
};

// Where the blocks of decode_linear leave parts of outputs whose K they share.
struct SplitScratch {
  float* partial = nullptr;  // [2, SMs, kDecodeRows, kGroupRows], all bits set between launches
  uint8_t* integers = nullptr;  // rows of x as quantized weights multiply them (stream_x.cuh)
  size_t integers_bytes = 0;
};
constexpr size_t kIntegersBytes = kDecodeRows * 2 * (128 + 8);  // of them, of 128 columns of kDecodeRows rows, at most

// How a kernel beside the streaming kernel learns that the latter's first output is stored.
struct Ready {
  int32_t* counter = nullptr;  // zero before the streaming kernel; nullptr: no such news
  int expected = 0;            // its value when all is stored
  int room = 0;                // bytes of shared memory that the streaming kernel leaves of a multiprocessor
};

struct LinearInput {
  const void* x;  // [T, K], K a multiple of kChunkCols, 16-byte aligned
  const void* w;  // [N, K] in the chunks of its format (weights.cuh)
  int K;
  Format format = Format::f16;  // f16 stands for any that is in 16-bit tiles
};
struct LinearOutput {
  int N;
  Epilogue epilogue;
};
// y[t] from x W^T + b for T <= kDecodeRows decode rows.
void decode_linear(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const SplitScratch& scratch);
// Two products in one launch, of the same format. ready: of out_a, whose rows are stored first; its room is set.
void decode_linear_pair(const Stream& s, DType act, int T, const LinearInput& in_a, const LinearOutput& out_a, const LinearInput& in_b,
                        const LinearOutput& out_b, const SplitScratch& scratch, Ready& ready);
int ready_count(int N);  // what Ready::expected is for an output of N columns
// One output of two: x_a W_a^T + x_b W_b^T.
void decode_linear_sum(const Stream& s, DType act, int T, const LinearInput& in_a, const LinearInput& in_b, const LinearOutput& out,
                       const SplitScratch& scratch);
// Where blocks of prefill_linear_wgmma leave sums for each other; without it, fewer tiles run side by side.
constexpr int kPrefillSlot = 128 * 256;  // floats of a block
struct PrefillScratch {
  float* partial = nullptr;  // [SMs, kPrefillSlot]
  int32_t* flag = nullptr;   // [SMs, 8], zero between launches
};
// A linear layer of any number of prefill rows, of 16-bit tiles; before Hopper, where expand() comes before it for quantized weights.
void prefill_linear(const Stream& s, DType act, const void* x, const void* w, int T, int N, int K, const Epilogue& e);
bool has_wgmma();  // this build has wgmma code for the current device
// The same on Hopper, of any format. in_b: nullptr, or of the same format a second product of as many columns (out_b given), or without row scales a
// second part of K.
void prefill_linear_wgmma(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const LinearInput* in_b, const LinearOutput* out_b,
                          const PrefillScratch& scratch);
// float32: w [N, K] rows, FMA arithmetic.
void decode_linear_f32(const Stream& s, const float* x, const float* w, int T, int N, int K, const Epilogue& e);
void prefill_linear_f32(const Stream& s, const float* x, const float* w, int T, int N, int K, const Epilogue& e);
// y [T, padded K] = x [T, K], zeros after; 16-bit elements
void pad_columns(const Stream& s, void* y, const void* x, int T, int K, int padded);

// rows [rows, K] dense at src -> tiles of the act dtype (16-bit) beginning with row group `group`, or float32 rows at dst. overflow
// becomes 1 when a finite weight does not fit act.
void repack(const Stream& s, DType act, Format format, const void* src, int rows, int K, void* dst, int64_t first_row, int32_t* overflow);
// Quantized rows: part is dense in device memory, `total_rows` those of the whole matrix at dst (weights.cuh; float32 act: rows).
// overflow becomes 1 when a weight does not fit act.
void repack_quantized(const Stream& s, DType act, const HostMatrix& part, int64_t total_rows, void* dst, int64_t first_row, int32_t* overflow);
// A quantized matrix in 16-bit tiles of act, for prefill where there is no wgmma; the launch after it must not be dependent if it reads
// weights before it waits.
void expand(const Stream& s, DType act, Format format, const void* w, int N, int K, void* tiles);
// y [N, K] = the values of a matrix as it lies in device memory; not scaled down to act.
void read_weights(const Stream& s, DType act, Format format, const void* w, int N, int K, float* y);
void to_float32(const Stream& s, Format format, const void* src, int64_t n, float* dst);

void embed(const Stream& s, DType act, float* x, const void* table, const StepMeta& m, int T, int hidden, int vocab);
void add_position(const Stream& s, DType act, float* x, const void* table, const StepMeta& m, int T, int hidden);
void take_columns(const Stream& s, DType act, void* y, const void* x, const int32_t* order, int T, int64_t k);
// y[t] = x[row[t]], of so many bytes each, a multiple of 2; y and x are 16-byte aligned
void gather_rows(const Stream& s, void* y, const void* x, const int32_t* row, int T, size_t bytes);
void norm(const Stream& s, DType act, void* y, const float* x, const Norm& n, NormKind kind, float eps, int T, int hidden);
// two norms of the same x; each equals norm() bit for bit
void norm_pair(const Stream& s, DType act, void* ya, const Norm& a, void* yb, const Norm& b, const float* x, NormKind kind, float eps, int T, int hidden);
void gate(const Stream& s, DType act, void* y, const void* gate, const void* up, Activation fn, int64_t n);

void copy_pages(const Stream& s, DType act, const std::vector<KvLayer>& layers, const StepMeta& m, int copies, int kv_heads, int head_dim);

struct AttentionShape {
  int heads, kv_heads, head_dim, rope_dim, window;
};
// angles [max_len, rope_dim / 2] (cos, sin). keys_only: qkv stays as it is, Q is rotated where it is read.
void rope_store(const Stream& s, DType act, void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int T, const AttentionShape& a, bool keys_only = false);

struct AttentionScratch {
  float* partial = nullptr;    // [rows, heads, splits, head_dim + 2]
  int32_t* arrived = nullptr;  // [rows, heads], zero between launches
  int rows = 0, splits = 0;
};
constexpr int kSplitTokens = 64;
// One row at a time, its positions in splits of kSplitTokens; rows [row, row + T).
void attention_rows(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, int row, int T,
                    const AttentionShape& a, const AttentionScratch& scratch);
// rope_store and attention_rows of rows [0, T) at once, the same bit for bit; every row of a sequence of its own, qkv left as it is.
// ready: of qkv, which is else read when the kernel's predecessor has ended.
bool rope_attention_fits(DType act, const AttentionShape& a);
// Bytes of a multiprocessor's shared memory that a block takes; one: of a single row, if there is room for more copies under way.
int rope_attention_shared(const AttentionShape& a, bool one);
void rope_attention_rows(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const float2* angles, const StepMeta& m, int T,
                         const AttentionShape& a, const AttentionScratch& scratch, const Ready& ready = {});
// What the host knows of a step's prefill rows and their sequences.
struct PrefillRows {
  int tiles = 0;     // StepMeta::tiles
  int rows = 0;      // of qkv, decode rows too
  int pages = 0;     // of the pool
  int64_t keys = 0;  // positions of the tiles' sequences up to their last rows, in all
  const float2* angles = nullptr;  // of rope_store, which was for keys only, if attention_rotates()
};
bool attention_rotates(const Stream& s, DType act, const AttentionShape& a);
// Tiles of prefill rows on the tensor cores; 16-bit act, head_dim <= 128.
void attention_tiles(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, const PrefillRows& r, const AttentionShape& a);
// Where there is wgmma; head_dim 64 or 128.
void attention_tiles_wgmma(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const StepMeta& m, const PrefillRows& r, const AttentionShape& a);

constexpr int kSampleParts = 32, kSampleBins = 2048;
// How far the search for the threshold of a row (top_k, top_p) has come.
struct SampleSelect {
  unsigned long long need, above;  // count or mass still to be found; mass of the keys found to be above the threshold
  uint32_t prefix, threshold;      // digits of the key found; the least key that is kept
  int32_t digits, by_mass;         // how many are found; by top_p, not by top_k
};
struct SampleScratch {
  unsigned long long* best = nullptr;  // [kDecodeRows, kSampleParts] key of the greatest logit, complement of its id
  float* sum = nullptr;                // [kDecodeRows, kSampleParts]
  int32_t* arrived = nullptr;          // [kDecodeRows], zero between launches
  float2* top = nullptr;               // [kDecodeRows] greatest raw logit, log of the sum of exp(logit - greatest)
  float* edited = nullptr;             // [kDecodeRows, V] rows with edits or masks
  float* most = nullptr;               // [kDecodeRows] greatest logit of the row, edited or not
  int32_t* token = nullptr;            // [kDecodeRows] of that logit
  unsigned long long* top_part = nullptr;  // [kDecodeRows, kSampleParts, kTopTokens]
  SampleSelect* select = nullptr;      // [kDecodeRows]
  uint32_t* count = nullptr;           // [2, kDecodeRows, kSampleBins], zero between launches
  unsigned long long* mass = nullptr;  // [2, kDecodeRows, kSampleBins], zero between launches
};
// How the samples of a step are chosen: the greatest of sampling_of() over them.
enum class Sampling { greedy, temperature, top_k_or_p, top_k_and_p };
Sampling sampling_of(const SampleParams& p);
struct SamplingPasses {
  Sampling kind = Sampling::greedy;
  bool edited = false;  // some sample has edits or a mask
  bool top = false;     // some sample reports its most likely tokens
  bool operator<(const SamplingPasses& o) const { return std::tie(kind, edited, top) < std::tie(o.kind, o.edited, o.top); }
};
void sample(const Stream& s, const float* logits, int vocab, int S, const SamplingPasses& passes, const StepMeta& m, const SampleScratch& scratch);

}  // namespace codefuse::cuda
