// The Ops of one GPU: memory and weights in memory.cu, what a step needs in plan.cu, steps in step.cu, dispatch to the kernels in ops.cu.
#pragma once
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/turns.h"
#include "cuda/upload.h"
#include "ops/ops.h"

namespace codefuse::cuda {

class CudaOps final : public Ops {
 public:
  CudaOps(int index, DType act, int threads, int shared_max);
  ~CudaOps() override;

  std::string device() const override { return cat("cuda:", index_); }
  DType act() const override { return act_; }
  const Stream& stream() const { return s_; }
  bool rows_alike() const override { return false; }  // two matrix kernels and two attention kernels

  void* alloc(size_t bytes) override;
  size_t free_memory() const override;
  void read_matrices_by(const ReadBytes& read) override { read_ = read; }
  Matrix load_matrix(const std::vector<HostMatrix>& parts) override;
  void finish_loading() override;
  const float* load_vector(const HostMatrix& v) override;
  void plan(const ModelConfig& config, const Limits& limits, bool replay) override;

  void step(const Batch& batch, int ticket, const std::function<void()>& body) override;
  int rows() const override { return rows_; }
  int samples() const override { return samples_; }
  Sampled collect(int ticket) override;
  void embed(float* x, const Matrix& table) override;
  void add_position(float* x, const Matrix& table) override;
  void norm(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) override;
  void linear(void* y, const void* x, const Linear& w, const Activation* act_fn, Rows rows) override;
  void linear_add(float* y, const void* x, const Linear& w, bool add_bias) override;
  void norm_pair(void* ya, const Norm& na, void* yb, const Norm& nb, const float* x, NormKind kind, float eps, int hidden) override;
  void linear_pair(void* ya, const void* xa, const Linear& wa, const Activation* fn_a, void* yb, const void* xb, const Linear& wb,
                   const Activation* fn_b, bool decode_b) override;
  void linear_add_pair(float* y, const void* xa, const Linear& wa, const void* xb, const Linear& wb, bool add_bias) override;
  void gate(void* y, const void* gate, const void* up, Activation act_fn, int n) override;
  void copy_pages(const std::vector<KvLayer>& layers, const ModelConfig& c, int kv_heads) override;
  void rope_store(void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) override;
  void attention(void* out, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) override;
  void rope_attention(void* out, void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) override;
  void take_columns(void* y, const void* x, const int32_t* order, int64_t k) override;
  bool keep_sampled() override;
  void take_kept(void* y, const void* x, size_t bytes) override;
  void gather_logit_rows(float* y, const float* x, int hidden) override;
  void norm_logit_rows(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) override;
  void logits(float* y, const void* x, const Linear& head) override;
  void sample(const float* logits, int vocab) override;

  std::vector<double> time(const Batch& batch, int repeats, const std::function<void()>& body) override;
  void read_matrix(float* y, const Matrix& m) override;
  void upload(void* dst, const void* src, size_t bytes) override;
  void download(void* dst, const void* src, size_t bytes) override;

 private:
  // ---- memory.cu
  void* allocate(size_t bytes);  // as alloc, but with any content
  Uploader& uploader();
  void check_overflow();
  void use() const;  // makes this thread's calls go to this device
  template <class T> T* alloc_array(size_t n) { return static_cast<T*>(alloc(n * sizeof(T))); }

  // ---- plan.cu
  size_t lay_out(int rows, size_t table_words, size_t tiles);

  // ---- step.cu
  void begin(const Batch& batch);
  void run(const std::function<void()>& body);
  void clear_ready();
  void load(void* to, const void* from, size_t bytes, void* zero = nullptr, size_t zero_bytes = 0);
  void fill_meta(const Batch& batch, int padded_rows, int ticket, bool replayed);
  void fill_edits(const Batch& batch, int padded_samples, int ticket, bool replayed);
  cudaGraphExec_t record(const std::function<void()>& body);

  // ---- ops.cu
  const void* padded(const void* x, int K, int rows);
  const SplitScratch& integers_for(int Ka, int Kb);
  const SplitScratch& scratch_for(const Linear& a, const Linear* b);
  void linear_rows(const void* x, const Linear& w, const Epilogue& e, int first, int decode, int rows);
  const void* expanded(const Matrix& m);
  bool whole(const void* x, const Linear& w) const;
  bool together(const void* xa, const Linear& wa, const void* xb, const Linear& wb) const;
  LinearInput prefill_input(const void* x, const Linear& w) const;
  AttentionShape shape(const ModelConfig& c, int heads, int kv_heads) const;
  void prefill_attention(void* out, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads, bool rotate = false);

  static constexpr int kReadyStride = 32;  // int32 from one counter to the next: a cache line each

  int index_;
  DType act_;
  Stream s_;
  const std::shared_ptr<Turns> turns_;
  std::vector<void*> owned_;
  const int copy_threads_;
  ReadBytes read_;                      // of uploader_; none: memory is copied
  std::unique_ptr<Uploader> uploader_;  // while weights are being loaded
  int32_t* overflow_ = nullptr;  // a weight did not fit the compute dtype

  ModelConfig config_;
  Limits limits_;
  bool planned_ = false, replay_ = false, quantized_ = false;
  StepMeta meta_;
  char *meta_device_ = nullptr, *edits_device_ = nullptr;  // arrays of meta_
  std::array<char*, 2> staging_{}, edits_staging_{};       // pinned, by ticket: the same arrays at the same places
  std::array<StepResults*, 2> results_{};                  // pinned
  std::array<cudaEvent_t, 2> done_{};                      // the step has ended: its staging was read and its results are there
  std::array<int, 2> expected_{};                        // samples of the step
  std::array<bool, 2> expected_top_{};                   // and whether they report their most likely tokens
  float2* angles_ = nullptr;
  SplitScratch split_;
  int32_t* ready_counters_ = nullptr;  // zero before a step
  size_t ready_bytes_ = 0;
  Ready ready_;                     // of ready_of_, until rope_attention() takes it
  const void* ready_of_ = nullptr;
  int ready_calls_ = 0;             // of this step
  PrefillScratch prefill_;
  AttentionScratch attention_;
  bool own_sequences_ = false;  // no decode row's sequence has another row in the step
  SampleScratch sampling_;
  void* padded_ = nullptr;  // x with K rounded up
  size_t padded_bytes_ = 0;
  void* expanded_ = nullptr;  // a quantized matrix in 16-bit tiles, for prefill before Hopper
  size_t expanded_bytes_ = 0;

  int rows_ = 0, decode_rows_ = 0, samples_ = 0, tiles_ = 0, copies_ = 0;  // the current step
  std::optional<KeptRows> kept_;
  bool sampled_only_ = false;  // rows_ are those of kept_
  int64_t prefill_keys_ = 0;  // PrefillRows::keys
  SamplingPasses passes_;
  struct Recording {
    int seen = 0;
    cudaGraphExec_t graph = nullptr;
  };
  std::map<std::pair<int, SamplingPasses>, Recording> recordings_;  // by rows and what sampling does
};

}  // namespace codefuse::cuda
